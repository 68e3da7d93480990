"""Every protocol: the same answers whatever runs beside them, and wrong values refused in the protocol's own form."""

from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from support.chat_bundle import CONTEXT
from support.served import PATIENCE, Served, serving

from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.server import anthropic, chat, completions, response_items
from satchel.runtime.server.records import Metrics, Record

HELLO = [{"role": "user", "content": "Hello"}]
LONG = "a b c d " * CONTEXT
CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO, "max_tokens": 1},
    TEXT: {"prompt": "Hello", "max_tokens": 1},
    RESPONSES: {"input": "Hello", "max_output_tokens": 1},
    MESSAGES: {"messages": HELLO, "max_tokens": 1},
}
TABLES = {CHAT: chat.TABLE, TEXT: completions.TABLE, RESPONSES: response_items.TABLE, MESSAGES: anthropic.TABLE}
TOLD = {
    CHAT: lambda text: {"messages": [{"role": "user", "content": text}]},
    TEXT: lambda text: {"prompt": text},
    RESPONSES: lambda text: {"input": text},
    MESSAGES: lambda text: {"messages": [{"role": "user", "content": text}]},
}
"""How each protocol is given a text."""


def message_of(answer: Any, path: str) -> str:
    """The message of an error, which must be in the form of the path's protocol."""
    document = answer.json()
    if path == MESSAGES:
        assert document["type"] == "error"
        assert set(document["error"]) == {"type", "message"}
    else:
        assert set(document["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in document["error"]["message"]
    return str(document["error"]["message"])


@pytest.mark.parametrize("path", BODIES)
def test_no_value_of_any_key_is_an_error_of_the_server(served: Served, path: str) -> None:
    values: list[Any] = [2**63 - 1, 1 - 2**63, -1, 0, 1e308, -0.5, "", "x", [], [[]], {}, {"a": {}}, True, None]
    with httpx2.Client(base_url=served.url, timeout=PATIENCE) as client:
        for key, value in itertools.product(TABLES[path], values):
            answer = client.post(path, json=BODIES[path] | {"stream": False} | {key: value})
            assert answer.status_code in (200, 400, 404), (key, value, answer.text)
            if answer.status_code == 400:
                assert key in message_of(answer, path), (key, value, answer.text)
    served.wait_until_idle()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("digits", ["-1", "9223372036854775807", "9223372036854775808", "1e400", "-1e400", "1" * 5000])
def test_huge_and_negative_numbers_are_refused(served: Served, path: str, digits: str) -> None:
    key = "max_output_tokens" if path == RESPONSES else "max_tokens"
    body = json.dumps({k: v for k, v in BODIES[path].items() if k != key})[:-1] + f', "{key}": {digits}}}'
    answer = served.post(path, content=body.encode())
    assert answer.status_code == 400
    message_of(answer, path)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_can_never_fit_is_refused_before_a_stream_begins(served: Served, path: str, stream: bool) -> None:
    answer = served.post(path, BODIES[path] | TOLD[path](LONG) | {"stream": stream})
    assert answer.status_code == 400
    assert str(CONTEXT) in message_of(answer, path)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_what_the_template_refuses_is_refused_with_its_words(served: Served, path: str) -> None:
    answer = served.post(path, BODIES[path] | TOLD[path]("forbidden"))
    assert answer.status_code == 400
    assert "no such talk" in message_of(answer, path)


@pytest.mark.parametrize("path", BODIES)
def test_a_missing_key_an_unknown_model_and_no_json_are_refused(served: Served, path: str) -> None:
    for key in TOLD[path](""):
        body = {k: v for k, v in BODIES[path].items() if k != key}
        assert key in message_of(served.post(path, body), path)
    unknown = served.post(path, BODIES[path] | {"model": "other"})
    assert unknown.status_code == 404
    assert "other" in message_of(unknown, path)
    for content in (b"", b"{", b"\xff", b"[" * 9999):
        answer = served.post(path, content=content)
        assert answer.status_code == 400
        message_of(answer, path)


@pytest.mark.parametrize("path", BODIES)
def test_limits_of_the_server_are_told_in_the_form_of_the_protocol(bundle: Path, path: str) -> None:
    with serving(bundle, rows=1, queue=0, max_body=2000, api_key="secret") as served:
        refused = served.post(path, BODIES[path])
        assert (refused.status_code, bool(message_of(refused, path))) == (401, True)
        key = {"x-api-key": "secret"}
        large = served.post(path, BODIES[path] | {"user": "a" * 2000}, headers=key)
        assert (large.status_code, bool(message_of(large, path))) == (413, True)
        scheduler = next(iter(served.state.models.loaded.values())).scheduler
        step, go = scheduler.step, threading.Event()
        scheduler.step = lambda: go.wait(PATIENCE) and step()  # type: ignore[assignment, method-assign, return-value]
        scheduler.submit(Request("a", GenerationOptions(max_new_tokens=1)))
        busy = served.post(path, BODIES[path] | {"stream": path != CHAT}, headers=key)
        assert (busy.status_code, bool(message_of(busy, path))) == (429, True)
        assert int(busy.headers["retry-after"]) > 0
        go.set()
        served.wait_until_idle()
        assert served.post(path, BODIES[path], headers=key).status_code == 200


@pytest.mark.parametrize(("path", "rows"), [*((path, 3) for path in BODIES), (TEXT, 1), (TEXT, 8)])
def test_greedy_answers_are_the_same_in_batches_of_any_size_and_without_a_cache(
    bundle: Path, path: str, rows: int
) -> None:
    """Eight requests at once, some with a shared prefix and some repeated, are answered as each is alone."""
    key = "max_output_tokens" if path == RESPONSES else "max_tokens"
    texts = [f"Once upon a time there was a {word}" for word in ("cat", "dog", "cat")] + [
        "x" * 150,
        "y",
        "Hello",
        "",
        "y",
    ]
    texts = [text or "z" for text in texts]
    open_more = {"prefix_cache_mib": 0} if rows == 3 else {}
    with serving(bundle, rows=rows, open_more=open_more) as served, ThreadPoolExecutor(8) as pool:
        generator = served.generator
        asked = [BODIES[path] | TOLD[path](text) | {key: 20 + place} for place, text in enumerate(texts)]
        answers = [each.json() for each in pool.map(lambda body: served.post(path, body), asked)]
        for place, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            prompt = text if path == TEXT else generator.encode_chat([{"role": "user", "content": text}])
            assert text_of(answer) == generator.generate(prompt, max_new_tokens=20 + place).text


def text_of(answer: dict[str, Any]) -> str:
    """The text of an answer of any protocol."""
    if "choices" in answer:
        choice = answer["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    if "output" in answer:
        return "".join(part["text"] for item in answer["output"] for part in item["content"])
    return "".join(block["text"] for block in answer["content"])


def test_a_text_with_stop_texts_streamed_or_not(served: Served, client: openai.OpenAI) -> None:
    whole = served.generator.generate("Once", 12).text
    stop = whole[4:6]
    asked: dict[str, Any] = {"model": "chatty", "prompt": "Once", "max_tokens": 12, "stop": ["never", stop]}
    choice = client.completions.create(**asked).choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == (choice.text, "stop")


def test_metrics_count_the_tokens_of_all_protocols(bundle: Path) -> None:
    with serving(bundle) as served:
        new = 0
        for path, body in BODIES.items():
            key = "max_output_tokens" if path == RESPONSES else "max_tokens"
            usage = served.post(path, body | {key: 7}).json()["usage"]
            new += usage.get("completion_tokens", usage.get("output_tokens"))
        usage = served.post(CHAT, BODIES[CHAT] | {"n": 3, "temperature": 1, "max_tokens": 5}).json()["usage"]
        new += usage["completion_tokens"]
        page = served.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert int(values["satchel_tokens_predicted_total"]) == new
    ended = len(BODIES) + 3  # an end token takes a step too
    assert new - ended <= int(values["satchel_tokens_decoded_total"]) <= new
    assert 0 < float(values["satchel_tokens_decoded_seconds_total"]) < 60
    assert values['satchel_requests_processing{model="chatty"}'] == "0"
    assert values['satchel_requests_deferred{model="chatty"}'] == "0"
    assert int(values['satchel_kv_cache_bytes{model="chatty"}']) > 0


def test_metrics_count_drafts(served: Served) -> None:
    result = served.generator.generate("Hello", 3)
    metrics, record = Metrics(), Record("POST", TEXT)
    record.add([replace(result, drafted_tokens=5, accepted_tokens=3), replace(result, drafted_tokens=2)])
    metrics.add(record, True)
    lines = metrics.text([]).splitlines()
    assert {"satchel_tokens_drafted_total 7", "satchel_tokens_accepted_total 3"} <= set(lines)
