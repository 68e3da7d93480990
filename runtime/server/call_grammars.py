"""Grammars of calls that must be made: Lark in the dialect of llguidance, from a form and the schemas of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from satchel.runtime.generation.constraint import JSON_FORM
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.schemas import resolved, texts_of, types_of
from satchel.runtime.server.text_grammars import Unwritable, check_reference, terminal, text_pattern
from satchel.runtime.server.tool_forms import Form, Notation
from satchel.runtime.server.tools import Tools

ASSERTIONS = frozenset({
    "$dynamicRef", "additionalProperties", "allOf", "anyOf", "const", "contains", "dependencies",
    "dependentRequired", "dependentSchemas", "else", "enum", "if", "items", "maxContains", "maxItems",
    "maxProperties", "minContains", "minItems", "minProperties", "not", "oneOf", "patternProperties", "prefixItems",
    "properties", "propertyNames", "required", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
})  # fmt: skip
"""What a schema may demand of a value beyond its type; of strings and numbers see `text_grammars`, and llguidance."""
OBJECT, ARRAY = {"properties", "required", "additionalProperties"}, {"items", "minItems", "maxItems"}
DEFINITIONS = ("$defs", "definitions")
SCALAR = {"type": ["number", "boolean", "null"]}
CONSTANTS = {"boolean": ("True", "False"), "null": ("None",)}
"""The literals of Python that JSON writes in another way, by their types."""


def call_grammar(form: Form, tools: Tools, tokenizer: Tokenizer) -> str:
    """A grammar of calls in a form, as many as are allowed. Raises RequestError for what the form cannot hold."""
    functions = [tool["function"] for tool in tools.functions if tools.name in (None, tool["function"]["name"])]
    writer = _Writer(form, tokenizer)
    calls = []
    for function in functions:
        try:
            calls.append(writer.call(function["name"], function.get("parameters", {})))
        except Unwritable as error:
            why = f"the tool {function['name'][:60]} {error}, which this model's calls cannot be held to: use auto"
            raise RequestError(400, f"tool_choice: {why}", "tool_choice", "tool_choice_not_supported") from None
        except (TypeError, AttributeError, ValueError):
            why = f"the parameters of the tool {function['name'][:60]} are no JSON schema"
            raise RequestError(400, f"tools: {why}", "tools", "invalid_value") from None
    call = writer.rule("call", " | ".join(calls))
    several = tools.several and tools.name is None and form.several
    if form.listed is not None:
        opened, between, closed = (writer.literal(part) for part in form.listed)
        call = f"{opened} {call} ({between} {call})* {closed}" if several else f"{opened} {call} {closed}"
    part = f"{writer.literal(form.begin)} {writer.space if form.end else ''} {call}"
    part = writer.rule("part", f"{part} {writer.space} {writer.literal(form.end)}" if form.end else part)
    many = several and form.listed is None and form.begin and form.end
    return "\n".join([f"start: {part} ({writer.space} {part})*" if many else f"start: {part}", *writer.rules])


class _Writer:
    """Writes rules, each of which has a name; expressions refer to them."""

    space = '"\\n"?'

    def __init__(self, form: Form, tokenizer: Tokenizer) -> None:
        self.rules: list[str] = []
        self._form, self._tokenizer, self._count = form, tokenizer, 0
        marks = sorted({mark for mark in (form.begin, form.end, *form.inner) if mark}, key=len, reverse=True)
        tokens = {mark: tokenizer.special_token(mark) for mark in marks}
        self._tokens = {mark: token for mark, token in tokens.items() if token is not None}
        self._references: dict[str, str] = {}

    def rule(self, name: str, expression: str) -> str:
        """Add a rule; returns its name."""
        self._count += 1
        self.rules.append(f"{name}{self._count}: {expression}")
        return f"{name}{self._count}"

    def parts(self, words: str) -> list[str]:
        """A text, cut at special tokens."""
        pattern = "|".join(re.escape(mark) for mark in self._tokens)
        return [part for part in (re.split(f"({pattern})", words) if pattern else [words]) if part]

    def literal(self, words: str) -> str:
        """A text, in which special tokens are tokens."""
        return " ".join(f"<[{self._tokens[part]}]>" if part in self._tokens else _quoted(part)
                        for part in self.parts(words)) or '""'  # fmt: skip

    def call(self, name: str, schema: Mapping[str, Any]) -> str:
        """A call of one tool."""
        form = self._form
        if not re.fullmatch(form.names, name):
            raise Unwritable("has a name")
        quoted = json.dumps(name, ensure_ascii=False) if form.write.startswith("{") else name
        before, after = form.write.replace("NAME", quoted, 1).split("ARGUMENTS")
        before, number, last = before.partition("NUMBER")
        head = self.literal(before) + (f" /[0-9]{{1,3}}/ {self.literal(last)}" if number else "")
        if form.notation is None:
            arguments = self._json({"type": "object", **schema, "x-guidance": JSON_FORM})
        else:
            arguments = self._object({"type": "object", **schema}, schema, form.notation)
        return self.rule("call", f"{head} {arguments} {self.literal(after)}")

    def _json(self, schema: Mapping[str, Any]) -> str:
        return self.rule("json", f"%json {json.dumps(schema)}")

    def _object(self, schema: Mapping[str, Any], root: Mapping[str, Any], notation: Notation) -> str:
        """Properties in the order of the schema; others only if it has no list of them."""
        check_reference(schema, ASSERTIONS)
        schema = resolved(schema, root)
        _check(schema, OBJECT)
        named, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        needed = list(schema.get("required", []))
        properties = {**named, **{key: more for key in needed if key not in named}}
        opened, closed = (self.literal(each) for each in notation.around)
        between = self.literal(notation.between)
        if not properties and "properties" not in schema and more is not False:
            pair = self._pair(None, {} if more is True else more, root, notation)
            return self.rule("object", f"{opened} ({pair} ({between} {pair})*)? {closed}")
        first = rest = '""'
        for key, value in reversed(properties.items()):
            if value is False and key not in needed:
                continue
            pair = self._pair(key, {} if value is True else value, root, notation)
            others = "" if key in needed else f" | {first}"
            first = self.rule("first", f"{pair} {rest}{others}")
            others = "" if key in needed else f" | {rest}"
            rest = self.rule("rest", f"{between} {pair} {rest}{others}")
        return self.rule("object", f"{opened} {first} {closed}")

    def _pair(self, key: str | None, value: Any, root: Mapping[str, Any], notation: Notation) -> str:
        """A key with its value; of None, any key."""
        before, after = notation.pair.split("VALUE")
        begin, finish = before.split("KEY")
        if key is None:
            head = f"{self.literal(begin)} {self.rule('key', notation.any_key)} {self.literal(finish)}"
        else:
            head = self.literal(begin + self._key(key, notation) + finish)
        if notation.values is not None:
            return self.rule("pair", f"{head} {self._nested(value, root, notation.values)} {self.literal(after)}")
        kind = "json" if key is None else texts_of(root, key)
        if kind == "json":
            shared = {key: root[key] for key in DEFINITIONS if key in root}
            _check_references([value, shared])
            inner = {**value, **shared, "x-guidance": JSON_FORM}
            return self.rule("pair", f"{head} {self._json(inner)} {self.literal(after)}")
        return self.rule("pair", f"{head} {self._text(text_pattern(value, root, null=kind != 'text'), after)}")

    def _key(self, key: str, notation: Notation) -> str:
        if re.fullmatch(notation.keys, key):
            return key
        if notation.quote and notation.quote not in key:
            return f"{notation.quote}{key}{notation.quote}"
        raise Unwritable(f"has the key {key[:60]}")

    def _text(self, pattern: str, after: str) -> str:
        """A text as it is and what follows it, up to a special token as one terminal, since that takes all it can."""
        head, *tail = self.parts(after)
        if head in self._tokens:
            head, tail = "", [head, *tail]
        stops = [mark for mark in (after.strip(), self._form.end) if mark]
        self._count += 1
        name = f"TEXT{self._count}"
        self.rules.append(terminal(name, pattern, stops, head))
        return f"{name} {self.literal(''.join(tail))}"

    def _nested(self, schema: Any, root: Mapping[str, Any], notation: Notation) -> str:
        """A value in a notation that holds nested values too."""
        if not isinstance(schema, Mapping):
            schema = {}
        if "$ref" in schema:
            pointer, target = str(schema["$ref"]), resolved(schema, root)
            check_reference(schema, ASSERTIONS)
            if "$ref" in target:
                raise Unwritable("has a schema with a $ref that leads nowhere")
            if pointer not in self._references:
                self._references[pointer] = name = self.rule("value", '""')
                place = self.rules.index(f'{name}: ""')
                self.rules[place] = f"{name}: {self._nested(target, root, notation)}"
            return self._references[pointer]
        kinds: dict[str, Callable[..., str]] = {"object": self._object, "array": self._array}
        types = types_of(schema, root)
        if "const" in schema or "enum" in schema:
            _check(schema, {"const", "enum"})
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return self._one_of(self.literal(_written(value, notation)) for value in values)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                _check(schema, {key})
                if key == "oneOf" and not _are_disjoint([types_of(each, root) for each in schema[key]]):
                    raise Unwritable("has a schema with oneOf of alike values")
                return self._one_of(self._nested(each, root, notation) for each in schema[key])
        if types is None:
            _check(schema, set())
            return self._any(notation)
        if len(types) > 1:
            return self._one_of(self._nested({**schema, "type": kind}, root, notation) for kind in sorted(types))
        (kind,) = types
        if kind in kinds:
            return kinds[kind]({**schema, "type": kind}, root, notation)
        if notation.literals and kind in CONSTANTS:
            _check(schema, set())
            return self._one_of(self.literal(word) for word in CONSTANTS[kind])
        if kind == "string" and not notation.literals:
            text = self._text(text_pattern(schema, root), notation.quote)
            return self.rule("text", f"{self.literal(notation.quote)} {text}")
        _check(schema, set())
        return self._json(schema)

    def _one_of(self, expressions: Any) -> str:
        return self.rule("choice", " | ".join(expressions))

    def _array(self, schema: Mapping[str, Any], root: Mapping[str, Any], notation: Notation) -> str:
        _check(schema, ARRAY)
        item = self._nested(schema.get("items", {}), root, notation)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return self.literal("[]")
        if most == 1:
            return self.rule("array", f'"[" {item if least else f"{item}?"} "]"')
        upper = "" if most is None else most - 1
        several = f"{item} ({self.literal(notation.between)} {item}){{{max(least - 1, 0)},{upper}}}"
        return self.rule("array", f'"[" {several if least else f"({several})?"} "]"')

    def _any(self, notation: Notation) -> str:
        """Any value."""
        if "any" not in self._references:
            self._references["any"] = name = self.rule("value", '""')
            place = self.rules.index(f'{name}: ""')
            if notation.literals:
                words = (self.literal(word) for words in CONSTANTS.values() for word in words)
                scalar = " | ".join([self._json({"type": ["string", "number"]}), *words])
            else:
                text = f"{self.literal(notation.quote)} {self._text('/(?s:.*)/', notation.quote)}"
                scalar = f"{text} | {self._json(SCALAR)}"
            between = self.literal(notation.between)
            opened, closed = notation.pair.removesuffix("VALUE").split("KEY")
            pair = f"{self.literal(opened)} {self.rule('key', notation.any_key)} {self.literal(closed)} {name}"
            array, object = f'"[" ({name} ({between} {name})*)? "]"', f'"{{" ({pair} ({between} {pair})*)? "}}"'
            self.rules[place] = f"{name}: {scalar} | {array} | {object}"
        return self._references["any"]


def _check(schema: Mapping[str, Any], handled: set[str]) -> None:
    """Raise Unwritable for what would not be held to."""
    others = sorted((ASSERTIONS - handled) & set(schema))
    if others:
        raise Unwritable(f"has a schema with {others[0]}")


def _check_references(schema: Any) -> None:
    """Raise Unwritable for references beyond definitions: a part of a schema does not have what they lead to."""
    if isinstance(schema, Mapping):
        pointer = schema.get("$ref", "#/$defs/")
        if not str(pointer).startswith(tuple(f"#/{key}/" for key in DEFINITIONS)):
            raise Unwritable(f"has a schema with the $ref {str(pointer)[:60]}")
    for each in schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ():
        _check_references(each)


def _are_disjoint(kinds: list[set[str] | None]) -> bool:
    known = [{"number" if kind == "integer" else kind for kind in each or ()} for each in kinds]
    return None not in kinds and sum(map(len, known)) == len(set().union(*known))


def _written(value: Any, notation: Notation) -> str:
    """A value in a notation that holds nested values too."""
    if isinstance(value, str) and not notation.literals:
        return f"{notation.quote}{value}{notation.quote}"
    if isinstance(value, list):
        return f"[{notation.between.join(_written(each, notation) for each in value)}]"
    if isinstance(value, dict):
        colon = ": " if notation.literals else ":"
        pairs = [f"{_written_key(key, notation)}{colon}{_written(each, notation)}" for key, each in value.items()]
        return f"{{{notation.between.join(pairs)}}}"
    if notation.literals and (value is None or isinstance(value, bool)):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _written_key(key: str, notation: Notation) -> str:
    is_bare = not notation.literals and re.fullmatch(notation.keys, key)
    return key if is_bare else _written(key, notation)


def _quoted(words: str) -> str:
    return json.dumps(words, ensure_ascii=False)
