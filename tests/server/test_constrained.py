"""Answers that must have a format, and calls that must be made, in every protocol; the model itself is random."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
from support.chat_bundle import write_chat_bundle
from support.served import Served, serving

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": [1, 20]}, "b": {"$ref": "#/$defs/word"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"word": {"type": "string", "pattern": "^(cat|dog)$"}},
}
OTHER: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
CALLED = {"add": SCHEMA, "clock": OTHER}
QUESTION = [{"role": "user", "content": "1 + 1?"}]
CHAT: dict[str, Any] = {"model": "chatty", "messages": QUESTION, "max_tokens": 200, "temperature": 1.0, "seed": 3}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": each}} for name, each in CALLED.items()]
FORMAT = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}
BAD = {"type": "object", "unevaluatedProperties": False}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with room for schemas in prompts."""
    with serving(write_chat_bundle(tmp_path_factory.mktemp("bundles") / "chatty", max_context=1500)) as served:
        yield served


class TestFormats:
    def test_a_chat(self, client: openai.OpenAI) -> None:
        choice = client.chat.completions.create(**CHAT, response_format=FORMAT).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)

    def test_a_streamed_chat_and_several_answers(self, client: openai.OpenAI) -> None:
        texts = ["", ""]
        for chunk in client.chat.completions.create(**CHAT, response_format=FORMAT, n=2, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        for text in texts:
            jsonschema.validate(json.loads(text), SCHEMA)

    def test_any_object(self, client: openai.OpenAI) -> None:
        choice = client.chat.completions.create(**CHAT, response_format={"type": "json_object"}).choices[0]
        assert choice.message.content.startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)

    def test_a_response(self, client: openai.OpenAI) -> None:
        told = {"format": {"type": "json_schema", "name": "sum", "schema": SCHEMA, "strict": True}}
        found = client.responses.create(model="chatty", input="1 + 1?", text=told, max_output_tokens=200)
        jsonschema.validate(json.loads(found.output_text), SCHEMA)
        assert found.text.format.type == "json_schema"

    def test_a_text(self, client: openai.OpenAI) -> None:
        grammar = {"grammar": {"regex": "(cat|dog){2}"}}
        found = client.completions.create(model="chatty", prompt="the", max_tokens=50, extra_body=grammar)
        assert re.fullmatch("(cat|dog){2}", found.choices[0].text)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}}}, "unevaluated"),
            ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
            ({"response_format": {"type": "xml"}}, "response_format.type"),
            ({"response_format": FORMAT, "grammar": {"regex": "a"}}, "grammar"),
            ({"response_format": FORMAT, "tools": TOOLS}, "tools"),
            ({"grammar": {"regex": "a("}}, "unclosed"),
            ({"grammar": "a"}, "grammar"),
            ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "sub"),
            ({"tool_choice": "required"}, "tool_choice"),
        ],
        ids=str,
    )
    def test_what_cannot_be_done_is_refused(self, served: Served, given: dict[str, Any], said: str) -> None:
        for stream in (False, True):
            error = served.refuses("/v1/chat/completions", CHAT | given | {"stream": stream})
            assert said in error["message"]

    def test_a_response_refuses_too(self, served: Served) -> None:
        told = {"format": {"type": "json_schema", "name": "x", "schema": BAD}}
        assert "unevaluated" in served.refuses("/v1/responses", {"input": "x", "text": told})["message"]


class TestCalls:
    def check(self, name: str, arguments: Any) -> None:
        jsonschema.validate(arguments, CALLED[name])

    def test_a_chat_that_must_call(self, client: openai.OpenAI) -> None:
        options = CHAT | {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        choice = client.chat.completions.create(**options).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        self.check(call.function.name, json.loads(call.function.arguments))

    @pytest.mark.parametrize("name", list(CALLED))
    def test_a_chat_that_must_call_one(self, client: openai.OpenAI, name: str) -> None:
        chosen = {"type": "function", "function": {"name": name}}
        (call,) = client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice=chosen).choices[0].message.tool_calls
        assert call.function.name == name
        self.check(name, json.loads(call.function.arguments))

    def test_a_response_that_must_call(self, client: openai.OpenAI) -> None:
        tools = [{"type": "function", "name": name, "parameters": each} for name, each in CALLED.items()]
        chosen = {"type": "function", "name": "add"}
        found = client.responses.create(
            model="chatty", input="1 + 1?", tools=tools, tool_choice=chosen, max_output_tokens=200
        )
        (call,) = found.output
        assert call.name == "add"
        self.check("add", json.loads(call.arguments))

    @pytest.mark.parametrize("chosen", [{"type": "any"}, {"type": "tool", "name": "clock"}], ids=str)
    def test_a_message_that_must_call(self, claude: anthropic.Anthropic, chosen: dict[str, Any]) -> None:
        tools = [{"name": name, "input_schema": each} for name, each in CALLED.items()]
        chosen = chosen | {"disable_parallel_tool_use": True}
        found = claude.messages.create(
            model="chatty", messages=QUESTION, max_tokens=200, tools=tools, tool_choice=chosen
        )
        (block,) = found.content
        assert found.stop_reason == "tool_use"
        assert block.name == chosen.get("name", block.name)
        self.check(block.name, block.input)
