"""Reads the calls of tools that models write, in each form that there is. Standard library only."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schemas of the parameters of tools, by the names of the tools."""

Calls = list[tuple[str, dict[str, Any]]]
"""Names of tools, and arguments."""

UNREADABLE = (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError)
"""What a reader raises for a text that holds no calls."""

JSON = json.JSONDecoder()
_PARAMETER = r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>"
_PAIR = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"


def read_objects(text: str, schemas: Schemas) -> Calls:
    """Objects of JSON with a name and arguments: one, several with semicolons or spaces between, or a list."""
    place, values = 0, []
    text = text.strip().removeprefix("```json").removesuffix("```").strip()
    while place < len(text):
        value, place = JSON.raw_decode(text, place)
        values += value if isinstance(value, list) else [value]
        place = _after(re.compile(r"[;,\s]*"), text, place)
    return [_from_object(value) for value in values]


def read_named(text: str, schemas: Schemas, *, before: str, after: str = r"\s*") -> Calls:
    """Calls of a name and an object of JSON; the patterns are of what stands before the object, and after it.

    The first one has a group "name".
    """
    opening, closing = re.compile(before), re.compile(after)
    place, found = 0, []
    while place < len(text):
        match = opening.match(text, place)
        if match is None:
            raise ValueError(place)
        arguments, place = JSON.raw_decode(text, match.end())
        found.append((match["name"], _arguments(arguments)))
        place = _after(closing, text, place)
    return found


def read_python(text: str, schemas: Schemas) -> Calls:
    """Calls of Python with keywords that are literals, such as `[add(a=1), clock()]`: a list, or one a line."""
    body = ast.parse(text.strip()).body
    found: Calls = []
    for statement in body:
        if not isinstance(statement, ast.Expr):
            raise ValueError("a statement")
        items = statement.value.elts if isinstance(statement.value, ast.List) else [statement.value]
        found += [_from_python(item) for item in items]
    return found


def read_elements(text: str, schemas: Schemas) -> Calls:
    """`<function=NAME><parameter=KEY>VALUE</parameter>...</function>`, one or several."""
    return _read_tagged(text, schemas, r"\s*<function=([^>\s]+)>(.*?)</function>\s*", _PARAMETER)


def read_pairs(text: str, schemas: Schemas) -> Calls:
    """`NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...`."""
    return _read_tagged(text, schemas, r"\s*([^<\s]+)(.*)", _PAIR)


def read_bare_keys(text: str, schemas: Schemas, *, quote: str) -> Calls:
    """`call:NAME{key:value,...}`, as JSON but for keys without quotation marks, and texts between `quote`s."""
    found, place = [], 0
    while place < len(text):
        match = re.compile(r"\s*call:([\w.-]+)(?=\{)").match(text, place)
        if match is None:
            raise ValueError(place)
        value, place = _bare_value(text, match.end(), quote)
        found.append((match[1], _arguments(value)))
        place = _after(re.compile(r"\s*"), text, place)
    return found


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    if match is None:
        raise ValueError(place)
    return match.end()


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, str):  # some models write the object as a text of JSON
        value = json.loads(value)
    if not isinstance(value, dict):
        raise ValueError("arguments that are no object")
    return value


def _from_object(value: Any) -> tuple[str, dict[str, Any]]:
    name = value["tool_name"] if "tool_name" in value else value["name"]
    if not isinstance(name, str):
        raise ValueError("a name that is no text")
    return name, _arguments(value.get("arguments", value.get("parameters", {})))


def _from_python(call: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(call, ast.Call) or call.args or not all(each.arg for each in call.keywords):
        raise ValueError("no call with keywords")
    return ast.unparse(call.func), {str(each.arg): _literal(each.value) for each in call.keywords}


class _Literals(ast.NodeTransformer):
    """Makes JSON's names those of Python."""

    NAMES: ClassVar[dict[str, Any]] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.NAMES[node.id]) if node.id in self.NAMES else node


def _literal(value: ast.expr) -> Any:
    """The value of a literal of Python."""
    found = ast.literal_eval(_Literals().visit(value))
    json.dumps(found)  # bytes, sets and the like are no arguments
    return found


def _read_tagged(text: str, schemas: Schemas, call: str, argument: str) -> Calls:
    pattern, found, place = re.compile(call, re.DOTALL), [], 0
    while place < len(text):
        match = pattern.match(text, place)
        if match is None or match.end() == place:
            raise ValueError(place)
        name, inner = match[1], match[2]
        if re.sub(argument, "", inner, flags=re.DOTALL).strip():
            raise ValueError("text between arguments")
        pairs = re.findall(argument, inner, re.DOTALL)
        found.append((name, {key.strip(): _typed(value, schemas.get(name, {}), key.strip()) for key, value in pairs}))
        place = match.end()
    return found


def _typed(text: str, schema: Mapping[str, Any], key: str) -> Any:
    """The value that a text stands for: a text where the schema wants one, else JSON if it is some."""
    properties = schema.get("properties")
    wanted = properties.get(key) if isinstance(properties, dict) else None
    if isinstance(wanted, dict) and wanted.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _bare_value(text: str, place: int, quote: str) -> tuple[Any, int]:
    """The value at a place of a text, and the place after it."""
    if text.startswith(quote, place):
        end = text.index(quote, place + len(quote))
        return text[place + len(quote) : end], end + len(quote)
    opened = text[place : place + 1]
    if opened not in ("{", "["):
        if opened == '"':
            return JSON.raw_decode(text, place)
        end = _after(re.compile(r"[^,\]}]*"), text, place)
        return json.loads(text[place:end]), end
    closed, items, pairs = {"{": "}", "[": "]"}[opened], [], {}
    place = _after(re.compile(r"\s*"), text, place + 1)
    while not text.startswith(closed, place):
        if opened == "{":
            key, place = _bare_key(text, place, quote)
            pairs[key], place = _bare_value(text, place, quote)
        else:
            item, place = _bare_value(text, place, quote)
            items.append(item)
        place = _after(re.compile(rf"\s*(?:,\s*|(?=\{closed}))"), text, place)
    return (pairs if opened == "{" else items), place + 1


def _bare_key(text: str, place: int, quote: str) -> tuple[str, int]:
    pattern = re.compile(rf"{re.escape(quote)}(.*?){re.escape(quote)}:\s*|\"?([^:,{{}}\"]+?)\"?\s*:\s*", re.DOTALL)
    match = pattern.match(text, place)
    if match is None:
        raise ValueError(place)
    return match[1] if match[1] is not None else match[2], match.end()
