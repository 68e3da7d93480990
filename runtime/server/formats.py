"""What an answer must be: from the forms in which protocols ask for it to grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from satchel.runtime.generation.constraint import JSON_FORM
from satchel.runtime.generation.grammar import Grammar
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, flag, ignored, mapping, one_of, read, text
from satchel.runtime.server.replies import Syntax
from satchel.runtime.server.tool_forms import Form
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


def answer_grammar(grammar: Grammar | None, tools: Tools, syntax: Syntax, tokenizer: Tokenizer) -> Grammar | None:
    """What the answer to a chat must match: the given grammar, or calls of tools. Raises RequestError."""
    if grammar is None and tools.choice == "auto":
        return None
    if grammar is not None and tools.functions:
        raise RequestError(400, "tools: cannot be combined with a format of the answer", "tools", "invalid_value")
    if grammar is not None:
        return Grammar(grammar.kind, grammar.source, chat=True)
    forms = sorted((each for each in syntax.forms if each.write), key=lambda each: each.begin != "")  # as Llama calls
    form = forms[0] if forms else None
    if form is None or syntax.is_harmony:
        why = "the form in which this model writes calls cannot be constrained: use auto"
        raise RequestError(400, f"tool_choice: {why}", "tool_choice", "tool_choice_not_supported")
    return Grammar("lark", call_grammar(form, tools, tokenizer), chat=True)


def call_grammar(form: Form, tools: Tools, tokenizer: Tokenizer) -> str:
    """A Lark grammar of calls in a form, as many as are allowed."""
    functions = [tool["function"] for tool in tools.functions if tools.name in (None, tool["function"]["name"])]
    rules, marks = [], (form.begin, form.end, *form.inner)

    def literal(words: str) -> str:
        """A text, in which special tokens are tokens."""
        parts = re.split(f"({'|'.join(re.escape(mark) for mark in marks if mark)})", words) if any(marks) else [words]
        found = []
        for part in filter(None, parts):
            token = tokenizer.special_token(part) if part in marks else None
            found.append(json.dumps(part, ensure_ascii=False) if token is None else f"<[{token}]>")
        return " ".join(found)

    for place, function in enumerate(functions):
        quoted = form.write.startswith("{")
        name = json.dumps(function["name"], ensure_ascii=False) if quoted else function["name"]
        before, after = form.write.replace("NAME", name, 1).split("ARGUMENTS")
        schema = {"type": "object", **function.get("parameters", {}), "x-guidance": JSON_FORM}
        rules.append(f"call{place}: {literal(before)} args{place} {literal(after)}")
        rules.append(f"args{place}: %json {json.dumps(schema)}")
    several = tools.several and tools.name is None
    call = " | ".join(f"call{place}" for place in range(len(functions)))
    calls = "call"
    if form.listed:
        calls = '"[" call (", " call)* "]"' if several else '"[" call "]"'
    part = " ".join(filter(None, [literal(form.begin), '"\\n"?' if form.end else "", calls]))
    if form.end:
        part += f' "\\n"? {literal(form.end)}'
    many = several and not form.listed and form.begin and form.end
    start = 'part ("\\n"? part)*' if many else "part"
    return "\n".join([f"start: {start}", f"part: {part}", f"call: {call}", *rules])
