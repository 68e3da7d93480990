"""Models with states speculate: drafts that are wrong leave nothing behind, and the text is that of single steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.ahead import allow_runs_ahead
from support.tiny_hybrid import PATTERN, write_hybrid

from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation

PROMPT = np.random.default_rng(3).integers(3, 300, 20)
FEW = {token: -np.inf for token in range(400) if token % 57}  # few tokens are left, so that texts repeat
CASES: list[dict[str, object]] = [
    {}, {"temperature": 1.5, "seed": 4}, {"temperature": 0.8, "seed": 5, "frequency_penalty": 0.5, "logprobs": 1},
]  # fmt: skip


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each run ahead."""
    return allow_runs_ahead(monkeypatch)


@pytest.fixture(scope="module", params=[PATTERN, ("linear", "linear"), ("conv", "attention")], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pattern: Sequence[str] = request.param
    return write_hybrid(tmp_path_factory.mktemp("states") / "bundle", pattern, max_context=300)


def essence(found: Generation) -> tuple[object, ...]:
    return found.token_ids, found.text, found.finish_reason, [entry.logprob for entry in found.logprobs or ()]


@pytest.mark.parametrize("options", CASES, ids=lambda options: " ".join(options) or "greedy")
def test_the_text_is_that_of_single_steps(folder: Path, ahead: list[int], options: dict[str, object]) -> None:
    drafting = Generator.open(folder, threads=1)
    alone = Generator.open(folder, threads=1, speculate="off", prefix_cache_mib=0)
    wrong = 0
    for start in (0, 3, 0):
        found = drafting.generate(PROMPT[start:], 120, logit_bias=FEW, **options)
        assert essence(found) == essence(alone.generate(PROMPT[start:], 120, logit_bias=FEW, **options))
        wrong += found.drafted_tokens - found.accepted_tokens
    assert max(ahead) > 2
    again = drafting.generate([*PROMPT, *found.token_ids, 9, 8], 30, logit_bias=FEW)
    assert essence(again) == essence(alone.generate([*PROMPT, *found.token_ids, 9, 8], 30, logit_bias=FEW))
    assert again.reused_tokens > 0
    assert wrong > 0 or "temperature" not in options


def test_requests_that_join_find_the_states_up_to_date(folder: Path, ahead: list[int]) -> None:
    """One runs alone and drafts, then beside others, which join at any time, then alone again."""
    drafting = Generator.open(folder, threads=1, prefix_cache_mib=0)
    alone = Generator.open(folder, threads=1, speculate="off", prefix_cache_mib=0)
    rng = np.random.default_rng(1)
    scheduler = drafting.scheduler(rows=3)
    requests, numbers, ended = [], {}, {}
    for index in range(8):
        options = GenerationOptions(max_new_tokens=20 + 10 * index, logit_bias=FEW, temperature=1.3, seed=index)
        requests.append(Request(PROMPT[index % 4 :], options))
    while len(ended) < len(requests):
        if len(numbers) < len(requests) and (not scheduler.running or rng.random() < 0.08):
            numbers[scheduler.submit(requests[len(numbers)])] = len(numbers)
        for event in scheduler.step():
            if event.outcome is not None:
                ended[event.id] = event.outcome
    assert len(ahead) > 5
    for number, index in numbers.items():
        each = requests[index].options
        expected = alone.generate(
            requests[index].prompt, each.max_new_tokens, logit_bias=FEW, temperature=1.3, seed=index
        )
        assert essence(ended[number]) == essence(expected)
