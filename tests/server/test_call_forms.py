"""Calls that must be made, in each form that a model may have: a random model writes them, and they are valid."""

# ruff: noqa: RUF001 - DeepSeek's marks have wide characters

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import openai
import pytest
from support.chat_bundle import END, TEMPLATE, write_chat_bundle
from support.schemas import schema
from support.served import Served, serving

from satchel.runtime.generation.reasoning import shown
from satchel.runtime.server.call_grammars import call_grammar
from satchel.runtime.server.replies import Syntax
from satchel.runtime.server.tool_forms import FORMS, Form, forms_of
from satchel.runtime.server.tools import chat_tools

FORCED = [form for form in FORMS if form.write]
NAMES = [f"{form.begin or 'bare'} {'|'.join(form.signs)}" for form in FORCED]
OWN = [form for form in FORCED if form.notation is not None]
SPECIAL = ("<|", "<｜", "<tool_call|", "[", "<start", "<end", "<escape")
MARKS = sorted(
    {mark for form in FORCED for mark in (form.begin, form.end, *form.inner, "<|end|>", "<|call|>")
     if mark.startswith(SPECIAL) and " " not in mark}
)  # fmt: skip
"""The marks that are special tokens; others, such as <arg_key>, are text."""


def word(**more: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": 9, **more}


def parameters(properties: dict[str, Any], *optional: str, **more: Any) -> dict[str, Any]:
    required = [key for key in properties if key not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


CODE = {"code": {"type": "string", "enum": ["a", "b c", 'd"e', "ü <x> / \\ y"]}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "nothing": {"type": "object", "properties": {}, "additionalProperties": False},
    "texts": parameters({
        "free": word(), "coded": {"$ref": "#/$defs/code"}, "matched": word(pattern=r"^\d{2}-[a-c]\w$"),
        "short": word(minLength=1, maxLength=3), "day": {"type": "string", "format": "date"},
        "or_none": {"anyOf": [word(minLength=2, maxLength=4), {"type": "null"}]}, "within": word(pattern="a[bc]"),
    }, "coded", "or_none", **{"$defs": CODE}),
    "numbers": parameters({
        "whole": {"type": "integer", "minimum": -3, "maximum": 12}, "part": {"enum": [0.5, -1e-9]},
        "yes": {"type": "boolean"}, "none": {"type": "null"}, "one": {"const": 7},
    }, "whole", "none"),
    "nested": parameters({
        "list": {"type": "array", "items": {"enum": [1, "two", None]}, "minItems": 1, "maxItems": 3},
        "object": parameters({"x": word(), "y": {"type": "array", "items": word(), "maxItems": 2}}, "y"),
        "either": {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, word()]},
        "last": {"$ref": "#/$defs/code"},
    }, "either", **{"$defs": CODE}),
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bundles") / "chatty"
    with serving(write_chat_bundle(folder, max_context=3000, marks=tuple(MARKS))) as served:
        yield served


@pytest.fixture
def writes(served: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the model one whose template shows a form."""

    def writes(form: Form) -> None:
        source = TEMPLATE.replace("<tool_call>", "".join(form.signs or (form.begin,)))
        assert forms_of(source)[0] is form
        monkeypatch.setitem(served.generator.template.sources, "default", source)

    return writes


def ask(client: openai.OpenAI, tools: dict[str, dict[str, Any]], seed: int, **more: Any) -> Any:
    listed = [{"type": "function", "function": {"name": name, "parameters": each}} for name, each in tools.items()]
    return client.chat.completions.create(
        model="chatty", messages=[{"role": "user", "content": "?"}], tools=listed, temperature=1.0, seed=seed,
        extra_body={"max_thinking_tokens": 5},
        **{"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 500, **more},
    )  # fmt: skip


@pytest.mark.parametrize("form", FORCED, ids=NAMES)
def test_forced_calls_are_valid(client: openai.OpenAI, writes: Any, form: Form) -> None:
    writes(form)
    for seed in range(2):
        for name in SCHEMAS:
            chosen = {"type": "function", "function": {"name": name}}
            choice = ask(client, SCHEMAS, seed, tool_choice=chosen).choices[0]
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            (call,) = choice.message.tool_calls
            assert call.function.name == name
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[name])


@pytest.mark.parametrize("form", FORCED, ids=NAMES)
def test_a_forced_stream_has_the_arguments_in_pieces(client: openai.OpenAI, writes: Any, form: Form) -> None:
    writes(form)
    tools = {"texts": SCHEMAS["texts"]}
    whole = ask(client, tools, 5).choices[0].message.tool_calls[0].function.arguments
    pieces = [
        call.function.arguments
        for chunk in ask(client, tools, 5, stream=True)
        for call in chunk.choices[0].delta.tool_calls or []
    ]
    assert "".join(pieces) == whole
    assert sum(map(bool, pieces)) > 3


@pytest.mark.parametrize("form", [form for form in FORCED if form.several], ids=lambda form: form.begin)
def test_several_calls_are_read(client: openai.OpenAI, writes: Any, form: Form) -> None:
    writes(form)
    small = {"one": parameters({"a": {"enum": [1, 2]}}), "two": parameters({"b": {"enum": ["x", "y"]}})}
    counts = set()
    for seed in range(3):
        more = {"parallel_tool_calls": True, "max_tokens": 400, "logit_bias": {str(END): -1e9}}
        choice = ask(client, small, seed, **more).choices[0]
        calls = choice.message.tool_calls[: None if choice.finish_reason == "tool_calls" else -1]
        for call in calls:
            jsonschema.validate(json.loads(call.function.arguments), small[call.function.name])
        counts.add(len(calls))
    assert max(counts) > 1 or not form.end or form.listed  # whether a list goes on, this model's numbers decide


@pytest.mark.parametrize("begin", ["<|python_start|>", "<function_calls>"])
def test_a_forced_call_in_python_is_python(served: Served, begin: str) -> None:
    """Python itself reads what the grammar of such calls lets a model write, and the reader reads the same."""
    form = next(form for form in FORMS if form.begin == begin)
    tokenizer = served.generator.tokenizer
    assert tokenizer is not None
    for name, parameters in SCHEMAS.items():
        tools = chat_tools({"tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}]})
        source = call_grammar(form, replace(tools, choice="required", name=name), tokenizer)
        for seed in range(3):
            options = {"grammar": {"lark": source}, "temperature": 1.0, "seed": seed}
            ids = served.generator.generate("a", max_new_tokens=800, **options).token_ids
            text = shown(tokenizer, ids)
            inner = text.removeprefix(form.begin).removesuffix(form.end).strip()
            (call,) = [node for node in ast.walk(ast.parse(inner)) if isinstance(node, ast.Call)]
            assert ast.unparse(call.func) == name
            arguments = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
            jsonschema.validate(arguments, parameters)
            reply = Syntax("".join(form.signs or (form.begin,))).reply("", tools.functions)
            (first, *rest) = reply.add(text, final=True)
            assert (first.name, json.loads("".join(piece.text for piece in (first, *rest)))) == (name, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("form", OWN, ids=lambda form: form.begin)
def test_generated_schemas_are_held_to_or_refused(client: openai.OpenAI, writes: Any, form: Form) -> None:
    writes(form)
    held = 0
    for seed in random.Random(1).sample(range(1000), 12):
        try:
            choice = ask(client, {"tool": schema(seed)}, seed).choices[0]
        except openai.BadRequestError as error:
            assert error.code == "tool_choice_not_supported"
            continue
        held += 1
        jsonschema.validate(json.loads(choice.message.tool_calls[0].function.arguments), schema(seed))
    assert held >= 3


WRONG: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"type": "string", "format": "no-such"}}, "required": ["a"]},
    {"type": "object", "unevaluatedProperties": False},
    {"type": "object", "properties": {"a": {"not": {"type": "string"}}}},
    {"type": "object", "properties": 5},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}, "required": ["a"]},
]


@pytest.mark.parametrize("form", [*OWN, FORCED[-1]], ids=lambda form: form.begin)
def test_a_schema_that_cannot_be_held_to_is_refused(client: openai.OpenAI, writes: Any, form: Form) -> None:
    writes(form)
    for wrong in WRONG:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, {"tool": wrong}, 0)
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        ask(client, {"tool": WRONG[0]}, 0, stream=True)


@pytest.mark.parametrize("form", OWN, ids=lambda form: form.begin)
def test_names_that_a_form_cannot_hold_are_refused(client: openai.OpenAI, writes: Any, form: Form) -> None:
    writes(form)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, {"a <b>": {"type": "object"}}, 0)
    assert caught.value.code == "tool_choice_not_supported"
