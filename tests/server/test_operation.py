"""What those need who run a server: figures that can be trusted, a log that cannot be forged, rows that come free."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import httpx2
import pytest
from support.chat_bundle import CONTEXT
from support.served import PATIENCE, Served, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ENDLESS = {"prompt": "a", "max_tokens": CONTEXT, "logit_bias": {"346": -1e9, "1": -1e9, "2": -1e9}, "stream": True}


def figures(served: Served) -> dict[str, float]:
    """The metrics by name and labels."""
    lines = served.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_metrics_are_finite_grow_and_agree_with_what_answers_tell(bundle: Path) -> None:
    with serving(bundle) as served:
        seen, told, cached, new = [figures(served)], 0, 0, 0
        for size in (1, 5, 5):
            usage = served.post(CHAT, {"messages": HELLO, "max_tokens": size}).json()["usage"]
            told, new = told + usage["prompt_tokens"], new + usage["completion_tokens"]
            cached += usage["prompt_tokens_details"]["cached_tokens"]
            seen.append(figures(served))
    assert all(math.isfinite(value) and value >= 0 for page in seen for value in page.values())
    counters = [name for name in seen[0] if name.split("{")[0].endswith("_total")]
    assert len(counters) > 8
    for name in counters:
        values = [page[name] for page in seen]
        assert values == sorted(values), name
    last = seen[-1]
    assert (last["satchel_prompt_tokens_total"], last["satchel_prompt_tokens_cached_total"]) == (told - cached, cached)
    assert cached > 0
    assert last["satchel_tokens_predicted_total"] == new
    assert seen[1]["satchel_tokens_decoded_total"] <= 1, "the first token of an answer is none of decoding"
    assert [last[f'satchel_requests_{what}{{model="chatty"}}'] for what in ("processing", "deferred")] == [0, 0]


@pytest.mark.parametrize("place", ["model", "path", "prompt", "key"])
def test_no_line_of_the_log_can_be_forged(bundle: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    lie = "x\r\nPOST /v1/completions 200, forged\x1b[2K\u2028POST"
    body = {"model": {"model": lie}, "prompt": {"prompt": lie}, "key": {lie: 1}}.get(place, {})
    path = f"{TEXT}%0d%0aPOST%20/v1/completions%20200,%20forged%1b[2K" if place == "path" else TEXT
    with serving(bundle, quiet=False, log_prompts=True) as served:
        served.post(path, {"prompt": "a", "max_tokens": 1} | body)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "\x1b" not in said


def test_a_client_that_leaves_has_its_row_for_one_step_more_at_the_most(bundle: Path) -> None:
    """Another request, which waits for the only row, gets it with the next step."""
    with serving(bundle, rows=1) as served:
        scheduler = next(iter(served.state.models.loaded.values())).scheduler
        step, cancel = scheduler.step, scheduler.cancel
        left, steps = threading.Event(), []

        def counted() -> object:
            gone = left.is_set()
            events = step()
            if gone:
                steps.append(scheduler.running)
            return events

        def noted(id: int) -> bool:
            found = cancel(id)
            left.set()
            return found

        scheduler.step, scheduler.cancel = counted, noted  # type: ignore[method-assign, assignment]
        with httpx2.stream("POST", served.url + TEXT, json=ENDLESS, timeout=PATIENCE) as answer:
            next(answer.iter_lines())
        assert left.wait(PATIENCE)
        served.wait_until_idle()
        assert steps[:1] in ([], [0])
        assert served.post(TEXT, {"prompt": "b", "max_tokens": 1}).status_code == 200
