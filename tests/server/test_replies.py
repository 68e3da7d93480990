"""Reasoning and calls of tools are taken out of the text, however it is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.served import Served

from satchel.runtime.generation.request import Request
from satchel.runtime.server.replies import Piece, Reply

CALL = '{"name": "add", "arguments": {"a": 1, "b": "<x>"}}'
LLAMA = '{"name": "add", "parameters": {"a": 1, "b": "<x>"}}'
ADD = ("call", '{"a": 1, "b": "<x>"}', "add")

CASES: list[tuple[str, list[tuple[str, ...]]]] = [
    ("Hello <b>you</b>", [("content", "Hello <b>you</b>")]),
    ("  Hello \n", [("content", "  Hello \n")]),
    (f"<tool_call>\n{CALL}\n</tool_call>", [ADD]),
    (f"I add.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", [("content", "I add."), ADD, ADD]),
    (f"<think>\nHm. </thin\n</think>\n\n<tool_call>{CALL}</tool_call>", [("reasoning", "\nHm. </thin\n"), ADD]),
    ("<think>Hm</think>Yes", [("reasoning", "Hm"), ("content", "Yes")]),
    ("<think>Hm", [("reasoning", "Hm")]),
    (f"[TOOL_CALLS] [{CALL}, {CALL}]", [ADD, ADD]),
    (LLAMA, [ADD]),
    (f"<|python_tag|>{LLAMA}; {LLAMA}", [ADD, ADD]),
    ('{"answer": 5}', [("content", '{"answer": 5}')]),
    ("<tool_call>nonsense</tool_call> x", [("content", "<tool_call>nonsense</tool_call> x")]),
    (f"<tool_call>{CALL}", [ADD]),
    ("<tool_call>{", [("content", "<tool_call>{")]),
    ("a < b and <tool", [("content", "a < b and <tool")]),
    ('<tool_call>{"name": 5}</tool_call>', [("content", '<tool_call>{"name": 5}</tool_call>')]),
]


def joined(pieces: list[Piece]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for piece in pieces:
        if piece.kind == "call":
            found.append((piece.kind, piece.text, piece.name))
        elif found and found[-1][0] == piece.kind:
            found[-1] = (piece.kind, found[-1][1] + piece.text)
        else:
            found.append((piece.kind, piece.text))
    return found


@pytest.mark.parametrize(("text", "expected"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_reply_is_split_however_it_comes(text: str, expected: list[tuple[str, ...]], size: int) -> None:
    reply, pieces = Reply(tools=True), []
    for place in range(0, len(text), size):
        pieces += reply.add(text[place : place + size])
    assert joined(pieces + reply.add("", final=True)) == expected


def test_without_tools_a_call_is_text_and_an_open_thought_is_reasoning() -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    assert joined(Reply().add(text, final=True)) == [("content", text)]
    assert joined(Reply(thinking=True).add("Hm</think>Yes", final=True)) == [("reasoning", "Hm"), ("content", "Yes")]


@pytest.fixture
def says(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A list whose only text is what the model says to each request."""
    model, texts = next(iter(served.state.models.loaded.values())), [""]

    def scripted(request: Request) -> Any:
        ids = iter([*model.tokenizer.encode_rendered(texts[0]), 346])
        return model.generator.new_sequence(request, choose=lambda logits: next(ids))

    monkeypatch.setattr(model.scheduler, "_new_sequence", scripted)
    yield texts


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASKED: dict[str, Any] = {"model": "chatty", "messages": [{"role": "user", "content": "1 + 1?"}], "tools": [TOOL]}


def test_a_client_gets_calls_and_sends_results(client: openai.OpenAI, says: list[str]) -> None:
    says[0] = f"<think>Hm</think>Well.\n<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    choice = client.chat.completions.create(**ASKED).choices[0]
    message = choice.message
    assert (choice.finish_reason, message.content, message.reasoning_content) == ("tool_calls", "Well.", "Hm")
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [
        ("add", {"a": 1, "b": "<x>"})
    ] * 2
    assert len({call.id for call in message.tool_calls}) == 2
    calls: dict[int, list[str]] = {}
    reasons = []
    for chunk in client.chat.completions.create(**ASKED, stream=True):
        reasons.append(chunk.choices[0].finish_reason)
        for call in chunk.choices[0].delta.tool_calls or []:
            found = calls.setdefault(call.index, ["", ""])
            found[0] += call.function.name or ""
            found[1] += call.function.arguments
    assert calls == {0: ["add", ADD[1]], 1: ["add", ADD[1]]}
    assert reasons[-1] == "tool_calls"
    says[0] = "2"
    results = [{"role": "tool", "tool_call_id": call.id, "content": "2"} for call in message.tool_calls]
    talk = [*ASKED["messages"], message.model_dump(exclude_none=True), *results]
    assert client.chat.completions.create(**ASKED | {"messages": talk}).choices[0].message.content == "2"


def test_without_a_choice_of_tools_a_call_is_text(client: openai.OpenAI, says: list[str]) -> None:
    says[0] = f"<tool_call>{CALL}</tool_call>"
    choice = client.chat.completions.create(**ASKED, tool_choice="none").choices[0]
    assert (choice.message.content, choice.finish_reason) == (says[0], "stop")


@pytest.mark.parametrize(
    "change",
    [{"tool_choice": "required"}, {"tools": [{"type": "web"}]}, {"tools": [{"type": "function", "function": {}}]}],
)
def test_wrong_tools_are_refused(client: openai.OpenAI, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="tool"):
        client.chat.completions.create(**ASKED | change)
