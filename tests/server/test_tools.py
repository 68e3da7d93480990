"""Tools in every protocol, with the clients of OpenAI and Anthropic: calls, their results, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest
from support.chat_bundle import TEMPLATE
from support.served import Served

from satchel.runtime.server import tool_forms

CALL = '{"name": "add", "arguments": {"a": 1, "b": "<x>"}}'
ARGUMENTS = {"a": 1, "b": "<x>"}
TWICE = f"<think>Hm</think>Well.\n<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
SCHEMA: dict[str, Any] = {"type": "object"}
QUESTION = [{"role": "user", "content": "1 + 1?"}]

CHAT: dict[str, Any] = {
    "model": "chatty",
    "messages": QUESTION,
    "tools": [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}],
}
RESPONSE: dict[str, Any] = {
    "model": "chatty",
    "input": "1 + 1?",
    "tools": [{"type": "function", "name": "add", "parameters": SCHEMA}],
}
MESSAGE: dict[str, Any] = {
    "model": "chatty",
    "messages": QUESTION,
    "max_tokens": 300,
    "tools": [{"name": "add", "input_schema": SCHEMA}],
}


class TestChat:
    def test_a_client_gets_calls_and_sends_results(self, client: openai.OpenAI, says: list[str]) -> None:
        says[0] = TWICE
        choice = client.chat.completions.create(**CHAT).choices[0]
        message = choice.message
        assert (choice.finish_reason, message.content, message.reasoning_content) == ("tool_calls", "Well.", "Hm")
        calls = message.tool_calls
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [("add", ARGUMENTS)] * 2
        assert len({call.id for call in calls}) == 2
        says[0] = "2"
        results = [{"role": "tool", "tool_call_id": call.id, "content": "two"} for call in calls]
        talk = [*QUESTION, message.model_dump(exclude_none=True), *results]
        assert client.chat.completions.create(**CHAT | {"messages": talk}).choices[0].message.content == "2"
        assert says[-1].count("tool\ntwo") == 2

    def test_a_stream_has_names_then_arguments(self, client: openai.OpenAI, says: list[str]) -> None:
        says[0] = TWICE
        calls: dict[int, list[str]] = {}
        reasons, parts = [], 0
        for chunk in client.chat.completions.create(**CHAT, stream=True):
            reasons.append(chunk.choices[0].finish_reason)
            for call in chunk.choices[0].delta.tool_calls or []:
                found = calls.setdefault(call.index, ["", ""])
                found[0] += call.function.name or ""
                parts += bool(call.function.arguments)
                found[1] += call.function.arguments
        assert calls == {0: ["add", json.dumps(ARGUMENTS)], 1: ["add", json.dumps(ARGUMENTS)]}
        assert parts > 8
        assert reasons[-1] == "tool_calls"

    def test_one_call_and_none(self, client: openai.OpenAI, says: list[str]) -> None:
        says[0] = TWICE
        one = client.chat.completions.create(**CHAT, parallel_tool_calls=False).choices[0]
        assert len(one.message.tool_calls) == 1
        says[0] = f"<tool_call>{CALL}</tool_call>"
        none = client.chat.completions.create(**CHAT, tool_choice="none").choices[0]
        assert (none.message.content, none.finish_reason) == (says[0], "stop")
        assert "tools" not in says[-1]

    @pytest.mark.parametrize(
        ("change", "where"),
        [
            ({"tools": [{"type": "web"}]}, "tools[0].type"),
            ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
            ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
            (
                {"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]},
                "tools[0].function.parameters",
            ),
            ({"tool_choice": "often"}, "tool_choice"),
            ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
            ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ],
    )
    def test_wrong_tools_are_refused(self, client: openai.OpenAI, change: dict[str, Any], where: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**CHAT | change)
        assert caught.value.param == where


class TestResponses:
    def test_a_client_gets_calls_and_sends_results(self, client: openai.OpenAI, says: list[str]) -> None:
        says[0] = TWICE
        answer = client.responses.create(**RESPONSE)
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
        assert answer.output[0].content[0].text == "Hm"
        assert (answer.output_text, answer.status) == ("Well.", "completed")
        calls = answer.output[2:]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("add", ARGUMENTS)] * 2
        assert len({call.call_id for call in calls}) == 2
        says[0] = "2"
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "two"} for call in calls]
        history = [*QUESTION, *(item.model_dump(exclude_none=True) for item in answer.output), *results]
        assert client.responses.create(**RESPONSE | {"input": history}).output_text == "2"
        assert says[-1].count("tool\ntwo") == 2
        assert says[-1].count("assistant\n") == 2  # the items of one answer are one message

    def test_a_stream_has_the_events_of_its_items(self, client: openai.OpenAI, says: list[str]) -> None:
        says[0] = TWICE
        with client.responses.stream(**RESPONSE) as stream:
            events = list(stream)
            final = stream.get_final_response()
        kinds = [event.type.removeprefix("response.") for event in events]
        assert [kind for kind in dict.fromkeys(kinds) if "delta" in kind or "done" in kind] == [
            "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done", "output_text.delta",
            "output_text.done", "function_call_arguments.delta", "function_call_arguments.done",
        ]  # fmt: skip
        added = [event for event in events if event.type == "response.output_item.added"]
        assert [event.output_index for event in added] == [0, 1, 2, 3]
        told = [event for event in events if event.type.startswith("response.function_call_arguments")]
        assert all(event.item_id == added[event.output_index].item.id for event in told)
        for place in (2, 3):
            deltas = [event.delta for event in told if event.output_index == place and event.type.endswith("delta")]
            done = [event.arguments for event in told if event.output_index == place and event.type.endswith("done")]
            assert len(deltas) > 3
            assert ["".join(deltas)] == done == [json.dumps(ARGUMENTS)]
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
        assert final.output[3].arguments == json.dumps(ARGUMENTS)

    @pytest.mark.parametrize(
        ("change", "where"),
        [
            ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
            ({"tools": [{"type": "function"}]}, "tools[0].name"),
            ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
            ({"input": [{"type": "function_call_output", "call_id": "a", "output": ""}]}, "input[0].call_id"),
            ({"input": [{"type": "function_call", "call_id": "a", "name": "add"}]}, "input[0].arguments"),
            ({"input": [{"type": "picture"}]}, "input[0].type"),
        ],
    )
    def test_wrong_tools_are_refused(self, client: openai.OpenAI, change: dict[str, Any], where: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**RESPONSE | change)
        assert caught.value.param == where


class TestMessages:
    def test_a_client_gets_calls_and_sends_results(self, claude: anthropic.Anthropic, says: list[str]) -> None:
        says[0] = TWICE
        answer = claude.messages.create(**MESSAGE)
        assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert (answer.content[0].thinking, answer.content[1].text, answer.stop_reason) == ("Hm", "Well.", "tool_use")
        calls = answer.content[2:]
        assert [(call.name, call.input) for call in calls] == [("add", ARGUMENTS)] * 2
        says[0] = "2"
        results: list[dict[str, Any]] = [
            {"type": "tool_result", "tool_use_id": calls[0].id, "content": "two"},
            {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": "two"}]},
            {"type": "text", "text": "Well?"},
        ]
        said = [block.model_dump(exclude_none=True) for block in answer.content]
        talk = [*QUESTION, {"role": "assistant", "content": said}, {"role": "user", "content": results}]
        assert claude.messages.create(**MESSAGE | {"messages": talk}).content[0].text == "2"
        assert says[-1].count("tool\ntwo") == 2
        assert says[-1].rstrip().endswith("user\nWell?\nassistant")

    def test_a_stream_has_blocks_in_order(self, claude: anthropic.Anthropic, says: list[str]) -> None:
        says[0] = TWICE
        with claude.messages.stream(**MESSAGE) as stream:
            events = list(stream)
            final = stream.get_final_message()
        open_blocks: list[int] = []
        for event in events:
            if event.type == "content_block_start":
                assert open_blocks == []
                open_blocks.append(event.index)
            elif event.type == "content_block_delta":
                assert open_blocks == [event.index]
            elif event.type == "content_block_stop":
                assert open_blocks.pop() == event.index
        assert open_blocks == []
        json_deltas = [event.partial_json for event in events if event.type == "input_json"]
        assert len(json_deltas) > 8
        assert "".join(json_deltas) == json.dumps(ARGUMENTS) * 2
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert (final.content[3].input, final.stop_reason) == (ARGUMENTS, "tool_use")

    def test_one_call_and_none(self, claude: anthropic.Anthropic, says: list[str]) -> None:
        says[0] = TWICE
        one = claude.messages.create(**MESSAGE, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        assert [block.type for block in one.content] == ["thinking", "text", "tool_use"]
        none = claude.messages.create(**MESSAGE, tool_choice={"type": "none"})
        assert ([block.type for block in none.content], none.stop_reason) == (["thinking", "text"], "end_turn")

    def test_tools_are_counted(self, served: Served, claude: anthropic.Anthropic) -> None:
        more = claude.messages.count_tokens(**{key: value for key, value in MESSAGE.items() if key != "max_tokens"})
        assert more.input_tokens == len(served.generator.encode_chat(QUESTION, tools=CHAT["tools"]))

    @pytest.mark.parametrize(
        "change",
        [
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            {"tools": [{"name": "", "input_schema": {}}]},
            {"tool_choice": {"type": "tool"}},
            {"tool_choice": {"type": "tool", "name": "other"}},
            {"tool_choice": {"type": "often"}},
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "a", "input": {}}]}]},
            {"messages": [*QUESTION, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "a"}]}]},
        ],
    )
    def test_wrong_tools_are_refused(self, claude: anthropic.Anthropic, change: dict[str, Any]) -> None:
        with pytest.raises(anthropic.BadRequestError, match=r"tool|messages"):
            claude.messages.create(**MESSAGE | change)


def test_a_template_without_tools_refuses_them(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(served.generator.template.sources, "default", "{{ messages }}")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT)
    assert caught.value.code == "tools_not_supported"


def test_a_mark_that_is_a_special_token_is_seen(
    served: Served, client: openai.OpenAI, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hermes = next(form for form in tool_forms.FORMS if form.begin == "<tool_call>" and form.notation is None)
    form = replace(hermes, begin="<|im_start|>", end="")
    monkeypatch.setattr(tool_forms, "FORMS", (form,))
    monkeypatch.setitem(served.generator.template.sources, "default", TEMPLATE + "{# #}")
    says[0] = f"Well. <|im_start|>{CALL}"
    message = client.chat.completions.create(**CHAT).choices[0].message
    assert (message.content, message.tool_calls[0].function.name) == ("Well.", "add")
    says[0] = "Well. <|im_start|>No."
    assert client.chat.completions.create(**CHAT).choices[0].message.content == says[0]
    without = {key: value for key, value in CHAT.items() if key != "tools"}
    assert client.chat.completions.create(**without).choices[0].message.content == "Well. No."
