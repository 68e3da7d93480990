"""Templates in the style of each model family render as transformers' `apply_chat_template` renders them."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from support.chat_templates import SPECIAL, TURNS
from support.tiny_tokenizers import byte_level_json
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.templates.chat_template import ChatTemplate

CORPUS = sorted((Path(__file__).parents[1] / "data" / "chat_templates").glob("*.jinja"))

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather in a <place> & its "surroundings"; grüße',
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "a town"},
                    "days": {"type": ["integer", "null"], "default": 3},
                    "units": {"type": "string", "enum": ["C", "F"]},
                    "hours": {"type": "array", "items": {"type": "number"}},
                },
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"properties": {}}}},
]
DOCUMENTS = [{"title": "One", "text": "first\ntext"}, {"title": "Zwei & <drei>", "text": "zweiter"}]
SYSTEM = {"role": "system", "content": "You are a {{ parrot }}. /no_think"}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}
CALLED = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "reasoning": "I must look.", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sky": "wet"}', "tool_call_id": "abcdef123", "name": "weather"},
]
PARTS = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": " what is it? "}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": TURNS[:1],
    "system": [SYSTEM, *TURNS],
    "turns": TURNS,
    "answered": TURNS[:2],
    "no turns taken": [TURNS[0], TURNS[2]],
    "called": CALLED,
    "called twice": [*CALLED[:1], {**CALLED[1], "tool_calls": [CALL, CALL]}, CALLED[2], CALLED[2], TURNS[1]],
    "answered after a call": [SYSTEM, *CALLED, {"role": "assistant", "content": "Wet.\n"}, TURNS[2]],
    "thought": [TURNS[0], {"role": "assistant", "content": "<think>\nfour\n</think>\n\nIt is 4."}, TURNS[2], TURNS[1]],
    "parts": [SYSTEM, {"role": "user", "content": PARTS}],
    "another role": [{"role": "observer", "content": "hm"}, *TURNS],
}
GIVEN: list[dict[str, Any]] = [
    {},
    {"tools": TOOLS},
    {"tools": []},
    {"documents": DOCUMENTS, "citation_mode": "accurate", "controls": {"citations": True}},
    {"tools": TOOLS, "documents": DOCUMENTS, "enable_thinking": False, "tools_in_user_message": False},
    {"bos_token": "<other>", "reasoning_effort": "high", "date_string": "1 Jan 2026", "enable_thinking": True},
]


def test_the_corpus_covers_the_families() -> None:
    assert len(CORPUS) >= 40
    assert len({path.read_text(encoding="utf-8") for path in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("path", CORPUS, ids=[path.stem for path in CORPUS])
def test_a_template_renders_as_in_transformers(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    rendered = 0
    with ChatTemplate(source, SPECIAL) as template:
        for messages, given, how in itertools.product(CONVERSATIONS.values(), GIVEN, HOW):
            expected = reference(source, messages, {**given, **how})
            try:
                found = template.render(copy.deepcopy(messages), **given, **how)
            except PromptError as error:
                found = error
            if isinstance(expected, str):
                assert found == expected
                rendered += 1
            elif isinstance(expected, TemplateError) and "undefined" not in str(expected):
                assert isinstance(found, PromptError) and " ".join(str(expected).split())[:200] in str(found)
            else:
                assert isinstance(found, PromptError)
    assert rendered >= 12


HOW: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
]


def reference(source: str, messages: list[dict[str, Any]], given: dict[str, Any]) -> str | Exception:
    """What transformers renders, or its error."""
    try:
        text = original().apply_chat_template(copy.deepcopy(messages), chat_template=source, tokenize=False, **given)
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        return error
    assert isinstance(text, str)
    return text


@cache
def original() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level_json().decode()), **SPECIAL)
