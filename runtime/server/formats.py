"""What an answer must be: from the forms in which protocols ask for it to grammars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from satchel.runtime.generation.grammar import Grammar
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.server.call_grammars import call_grammar
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, flag, ignored, mapping, one_of, read, text
from satchel.runtime.server.replies import Syntax
from satchel.runtime.server.tools import Tools

TYPE: dict[str, Field] = {"type": one_of("text", "json_object", "json_schema")}
NAMED: dict[str, Field] = {"name": text, "description": text, "schema": mapping, "strict": flag}
FORMAT: dict[str, Field] = {**TYPE, "json_schema": mapping}
RESPONSES_FORMAT: dict[str, Field] = {**TYPE, **NAMED}
RESPONSES_TEXT: dict[str, Field] = {"format": mapping, "verbosity": ignored}


def chat_format(given: Mapping[str, Any]) -> dict[str, Any]:
    """The key `grammar` of a chat completion that has a `response_format`. Raises RequestError."""
    if "response_format" not in given:
        return {}
    found = read(given["response_format"], FORMAT, "type", where="response_format.")
    schema = found.get("json_schema", {})
    if found["type"] == "json_schema":
        schema = read(schema, NAMED, "name", "schema", where="response_format.json_schema.")["schema"]
    return _grammar(given, found["type"], schema, "response_format")


def responses_format(given: Mapping[str, Any]) -> dict[str, Any]:
    """The key `grammar` of a response that has a format in `text`. Raises RequestError."""
    found = read(given.get("text", {}), RESPONSES_TEXT, where="text.")
    if "format" not in found:
        return {}
    found = read(found["format"], RESPONSES_FORMAT, "type", where="text.format.")
    if found["type"] == "json_schema":
        read(found, RESPONSES_FORMAT, "name", "schema", where="text.format.")
    return _grammar(given, found["type"], found.get("schema"), "text.format")


def _grammar(given: Mapping[str, Any], kind: str, schema: Any, where: str) -> dict[str, Any]:
    if kind == "text":
        return {}
    if "grammar" in given:
        raise RequestError(400, f"{where}: cannot be combined with grammar", where, "invalid_value")
    return {"grammar": {"json_object": True} if kind == "json_object" else {"json_schema": schema}}


def answer_grammar(
    grammar: Grammar | None, tools: Tools, syntax: Syntax, tokenizer: Tokenizer, *, unfinished: bool = False
) -> Grammar | None:
    """What the answer to a chat must match: the given grammar, or calls of tools. Raises RequestError.

    `unfinished` is whether the answer continues a message.
    """
    if grammar is None and tools.choice == "auto":
        return None
    if grammar is not None and tools.functions:
        raise RequestError(400, "tools: cannot be combined with a format of the answer", "tools", "invalid_value")
    if grammar is not None:
        return Grammar(grammar.kind, grammar.source, chat=True)
    forms = sorted((each for each in syntax.forms if each.write), key=lambda each: each.begin != "")  # as Llama calls
    if not forms:
        why = "the form in which this model writes calls cannot be constrained: use auto"
        raise RequestError(400, f"tool_choice: {why}", "tool_choice", "tool_choice_not_supported")
    if syntax.is_harmony and unfinished:
        why = "this model writes a call as a message of its own, which cannot continue another one"
        raise RequestError(400, f"tool_choice: {why}", "tool_choice", "tool_choice_not_supported")
    return Grammar("lark", call_grammar(forms[0], tools, tokenizer), chat=True, calls=True)
