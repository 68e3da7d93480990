"""Anthropic's own client against the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from support.chat_bundle import CONTEXT
from support.served import Served, serving

MODEL = "chatty"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
ASKED: dict[str, Any] = {"model": MODEL, "system": "Be brief.", "messages": TALK[1:], "max_tokens": 12}


@pytest.fixture
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def alone(served: Served, messages: list[dict[str, Any]] = TALK, **options: Any) -> Any:
    return served.generator.generate(served.generator.encode_chat(messages), **{"max_new_tokens": 12, **options})


def test_an_answer_is_that_of_the_generator(served: Served, client: anthropic.Anthropic) -> None:
    answer, expected = client.messages.create(**ASKED), alone(served)
    assert [block.text for block in answer.content] == [expected.text]
    assert (answer.type, answer.role, answer.stop_reason) == ("message", "assistant", "max_tokens")
    used = answer.usage
    assert used.input_tokens + used.cache_read_input_tokens == expected.prompt_tokens
    assert used.output_tokens == expected.new_tokens


def test_a_stream_has_the_events_of_the_protocol(served: Served, client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ASKED) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    own = [kind for kind in kinds if kind not in ("text", "content_block_delta")]
    assert own == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_delta") > 2
    assert final.content[0].text == alone(served).text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)


def test_options_and_stop_texts(served: Served, client: anthropic.Anthropic) -> None:
    whole = alone(served).text
    stop = whole[4:6]
    answer = client.messages.create(**ASKED, stop_sequences=["never", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == whole[: whole.index(stop)]
    drawn = client.messages.create(**ASKED, extra_body={"temperature": 1.0, "top_k": 5, "seed": 4})
    assert drawn.content[0].text == alone(served, temperature=1.0, top_k=5, seed=4).text


def test_a_last_message_of_the_assistant_is_continued_and_blocks_are_text(
    served: Served, client: anthropic.Anthropic
) -> None:
    blocks = [{"type": "text", "text": "Hello there", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "I am"}]
    answer = client.messages.create(model=MODEL, max_tokens=8, messages=messages)
    text = served.generator.template.render(
        [TALK[1], {"role": "assistant", "content": "I am"}], continue_final_message=True
    )
    ids = served.generator.tokenizer.encode_rendered(text)
    assert answer.content[0].text == served.generator.generate(ids, max_new_tokens=8).text


def test_tokens_are_counted(served: Served, client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model=MODEL, system="Be brief.", messages=TALK[1:])
    assert counted.input_tokens == len(served.generator.encode_chat(TALK))


@pytest.mark.parametrize("kind", ["enabled", "disabled"])
def test_reasoning_ends_after_its_budget(
    served: Served, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    asked = []
    new_sequence = served.generator.new_sequence
    scheduler = next(iter(served.state.models.loaded.values())).scheduler
    monkeypatch.setattr(scheduler, "_new_sequence", lambda request: asked.append(request) or new_sequence(request))
    thinking = {"type": kind, "budget_tokens": 5}
    client.messages.create(**ASKED | {"thinking": thinking, "max_tokens": 3})
    assert asked[0].options.max_thinking_tokens == {"enabled": 5}.get(kind)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []}, {"max_tokens": 0}, {"messages": [{"role": "system", "content": "a"}]}, {"system": 5},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, {"extra_body": {"top_k": -1}},
        {"messages": [{"role": "user", "content": "forbidden"}]}, {"extra_body": {"no_such": 1}},
        {"messages": [{"role": "user", "content": "a b " * CONTEXT}]},
        {"thinking": {"type": "enabled", "budget_tokens": 0}}, {"thinking": {"type": "much"}},
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_in_the_protocols_form(client: anthropic.Anthropic, change: dict[str, Any]) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**ASKED | change)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"


def test_a_wrong_key_and_an_unknown_model_are_refused(bundle: Path) -> None:
    with serving(bundle, api_key="secret") as served:

        def ask(key: str, **change: Any) -> None:
            with anthropic.Anthropic(base_url=served.url, api_key=key, max_retries=0) as client:
                client.messages.create(**ASKED | {"max_tokens": 1} | change)

        with pytest.raises(anthropic.AuthenticationError):
            ask("wrong")
        with pytest.raises(anthropic.NotFoundError):
            ask("secret", model="other")
        ask("secret")
