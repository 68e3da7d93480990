"""OpenAI's client and the protocol of responses."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from support.chat_bundle import CONTEXT
from support.served import Served

ASKED: dict[str, Any] = {
    "model": "chatty",
    "instructions": "Be brief.",
    "input": "Hello there",
    "max_output_tokens": 12,
}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]


def alone(served: Served) -> Any:
    return served.generator.generate(served.generator.encode_chat(TALK), max_new_tokens=12)


@pytest.mark.parametrize(
    "given",
    [
        "Hello there",
        [{"role": "user", "content": "Hello there"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello there"}]}],
    ],
)
def test_an_answer_is_that_of_the_generator(served: Served, client: openai.OpenAI, given: Any) -> None:
    answer, expected = client.responses.create(**ASKED | {"input": given}), alone(served)
    assert answer.output_text == expected.text
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.input_tokens == expected.prompt_tokens
    assert answer.usage.output_tokens == expected.new_tokens
    assert 0 <= answer.usage.input_tokens_details.cached_tokens < expected.prompt_tokens


def test_a_stream_is_the_answer_in_pieces(served: Served, client: openai.OpenAI) -> None:
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 2
    assert "".join(deltas) == events[-1].response.output_text == alone(served).text
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.incomplete")


def test_an_answer_that_ends_by_itself_is_completed(served: Served, client: openai.OpenAI) -> None:
    stop = alone(served).text[4:6]
    assert client.responses.create(**ASKED, extra_body={"stop": stop}).status == "completed"


@pytest.mark.parametrize(
    "change",
    [
        {"input": []},
        {"input": [{"role": "user"}]},
        {"input": "a b " * CONTEXT},
        {"max_output_tokens": -1},
        {"previous_response_id": "resp-1"},
        {"text": {"format": {"type": "xml"}}},
        {"tools": [{"type": "web_search"}]},
        {"extra_body": {"no_such": 1}},
    ],
)
def test_wrong_requests_are_refused(client: openai.OpenAI, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASKED | change)
    assert caught.value.type == "invalid_request_error"
