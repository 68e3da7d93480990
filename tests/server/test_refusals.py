"""Bad requests: each is refused in the protocol's own form, and nothing is left running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.served import Served, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
PICTURE = {"type": "image_url"}

WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hello"}, "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [PICTURE]}]}, "messages[0].content[0].type"),
    (CHAT, {"messages": [{"role": "user", "content": "forbidden"}]}, "messages"),
    (CHAT, {"messages": HELLO, "max_tokens": -1}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 2**40}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": True}, "max_tokens"),
    (CHAT, {"messages": HELLO, "n": 0}, "n"),
    (CHAT, {"messages": HELLO, "n": 10**6}, "n"),
    (CHAT, {"messages": HELLO, "temperature": -0.1}, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": HELLO, "top_p": 0}, "top_p"),
    (CHAT, {"messages": HELLO, "top_k": -5}, "top_k"),
    (CHAT, {"messages": HELLO, "seed": -1}, "seed"),
    (CHAT, {"messages": HELLO, "presence_penalty": 3}, "presence_penalty"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logit_bias": {"-3": 1}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"a": 1}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "stop": [""]}, "stop"),
    (CHAT, {"messages": HELLO, "stop": ["a"] * 100}, "stop"),
    (CHAT, {"messages": HELLO, "stream": "yes"}, "stream"),
    (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"messages": HELLO, "no_such": 1}, "no_such"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [1, -2]}, "prompt"),
    (TEXT, {"prompt": [1, 399_999]}, "prompt"),
    (TEXT, {"prompt": ["a"] * 100}, "prompt"),
    (TEXT, {"prompt": "a", "echo": True}, "echo"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    (TEXT, {"prompt": "a", "best_of": 3}, "best_of"),
    (TEXT, {"prompt": "a\ud800b"}, "prompt"),
    ("/tokenize", {"content": 5}, "content"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ("/apply-template", {"messages": [5]}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_a_wrong_value_is_named(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    error = served.refuses(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', b"{}{}", b'{"n": NaN}', b'{"n": ' + b"9" * 30 + b"}", b"[" * 5000,
     b'{"a":' * 100 + b"1" + b"}" * 100, b'{"n": ' + b"9" * 9000 + b"}"],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(served: Served, body: bytes) -> None:
    served.refuses(CHAT, content=body)


def test_values_that_contradict_each_other_are_refused(served: Served) -> None:
    error = served.refuses(CHAT, {"messages": HELLO, "max_tokens": 2, "min_new_tokens": 5})
    assert "min_new_tokens" in error["message"]
    assert "top_p" in served.refuses(TEXT, {"prompt": "a", "top_p": 0.5})["message"]
    assert "vocabulary" in served.refuses(TEXT, {"prompt": "a", "logit_bias": {"4000": 1}})["message"]


def test_an_unknown_model_or_path_or_method_is_refused(served: Served) -> None:
    assert served.refuses(CHAT, {"messages": HELLO, "model": "other"}, 404)["code"] == "model_not_found"
    served.refuses("/v1/nothing", {}, 404)
    assert served.get(CHAT).status_code == 405


def test_a_body_that_is_too_large_is_refused(bundle: Path) -> None:
    with serving(bundle, max_body=1000) as served:
        assert served.refuses(CHAT, {"messages": HELLO * 100}, 413)["code"] == "body_too_large"

        def blocks() -> Iterator[bytes]:
            yield from [b" " * 300] * 10

        assert served.refuses(CHAT, status=413, content=blocks())["code"] == "body_too_large"
        assert served.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200


def test_only_the_right_key_is_let_in(bundle: Path) -> None:
    with serving(bundle, api_key="secret") as served:
        body = {"messages": HELLO, "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "secre"}):
            assert served.refuses(CHAT, body, 401, headers=headers)["code"] == "invalid_api_key"
        for path in ("/v1/models", "/metrics"):
            assert served.get(path).status_code == 401
        assert served.get("/health").status_code == 200
        for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert served.post(CHAT, body, headers=headers).status_code == 200


def test_pages_of_other_origins_are_refused_but_those_named(bundle: Path) -> None:
    named = "http://localhost:3000"
    with serving(bundle, cors_origins=(named,)) as served:
        body = {"messages": HELLO, "max_tokens": 1}
        refused = served.post(CHAT, body, headers={"Origin": "http://evil.example"})
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
        allowed = served.post(CHAT, body, headers={"Origin": named})
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, named)
        assert served.post(CHAT, body, headers={"Origin": served.url}).status_code == 200
        assert served.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_a_full_queue_says_when_to_ask_again(bundle: Path) -> None:
    with serving(bundle, rows=1, queue=1) as served:
        body = {"prompt": ["a", "b", "c"], "max_tokens": 300, "max_repeats": 0}
        answer = served.post(TEXT, body)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "queue_full"
        served.wait_until_idle()  # the two that were taken are cancelled
        assert served.post(TEXT, body | {"prompt": ["a", "b"], "max_tokens": 3}).status_code == 200


def test_a_time_limit_before_the_first_token_is_an_error(bundle: Path) -> None:
    with serving(bundle, timeout=1e-9) as served:
        assert served.refuses(TEXT, {"prompt": "a"}, 504)["code"] == "timeout"


def test_an_error_of_one_request_ends_that_one(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = next(iter(served.state.models.loaded.values()))

    def fails(*arguments: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(model.tokenizer, "encode", fails, raising=False)
        assert served.refuses(TEXT, {"prompt": "a"}, 500)["code"] == "internal_error"
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert served.post(TEXT, {"prompt": "a", "max_tokens": 1}).status_code == 200
