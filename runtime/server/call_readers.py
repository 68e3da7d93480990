"""Reads the calls of tools that models write, in each form that there is, as they come. Standard library only.

A reader takes one or more calls from a source, and yields their pieces. It raises one of UNREADABLE for other text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

from satchel.runtime.server.call_source import Incomplete, Piece, Pieces, Source
from satchel.runtime.server.schemas import texts_of

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schemas of the parameters of tools, by the names of the tools."""

Calls = list[tuple[str, dict[str, Any]]]
"""Names of tools, and arguments."""

Reader = Callable[[Source, Schemas], Pieces]
Whole = Callable[[str], Calls]

UNREADABLE = (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError)
"""What a reader raises for a text that holds no calls."""

JSON = json.JSONDecoder()
_SPACE = re.compile(r"\s*")
_STRING = r'"(?:[^"\\]|\\.)*"'
OBJECT = rf'[\[,;\s]*\{{\s*"(?:tool_)?name"\s*:\s*(?P<name>{_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*'
OBJECT_END = rf'\s*(?:,\s*"\w+"\s*:\s*(?:{_STRING}|\d+)\s*)*\}}'


def read_all(read: Reader, source: Source, schemas: Schemas) -> Pieces:
    """All calls up to the end of a source."""
    found = False
    while not (yield from source.at_end()):
        yield from read(source, schemas)
        found = True
    if not found:
        raise ValueError("no calls")


def read_json(source: Source, schemas: Schemas, *, before: str, after: str = r"\s*", whole: Whole) -> Pieces:
    """A call with arguments in JSON, between what the patterns match; `before` has a group "name".

    Where it is not written so, `whole` reads all that there is.
    """
    match = yield from source.match(re.compile(f"{before}(?={{)"))
    if match is None:
        yield from read_whole(source, schemas, read=whole)
        return
    name = json.loads(match["name"]) if match["name"].startswith('"') else match["name"]
    yield Piece("call", "", name)
    yield from source.json_object()
    if (yield from source.match(re.compile(after))) is None and not source.ended:
        raise ValueError("text after arguments")


def read_whole(source: Source, schemas: Schemas, *, read: Whole) -> Pieces:
    """Calls that are read when all of them have come."""
    for name, arguments in read((yield from source.whole())):
        yield Piece("call", json.dumps(arguments, ensure_ascii=False), name)


def read_tagged(
    source: Source, schemas: Schemas, *, before: str, key: str, close: str, longest: int, after: str
) -> Pieces:
    """A call whose arguments are pairs of a key and a value; `close` matches `longest` characters or less after one."""
    match = yield from source.match(re.compile(before))
    if match is None:
        raise ValueError("no name")
    name, pair, closing = match[1], re.compile(f"(?:{key})|(?P<end>{after})", re.DOTALL), re.compile(close)
    yield Piece("call", "{", name)
    separator = ""
    while True:
        match = yield from source.match(pair)
        if match is None:
            raise Incomplete if source.ended else ValueError("text between arguments")
        if match["end"] is not None:
            yield Piece("call", "}")
            return
        word = match[1].strip()
        yield Piece("call", f"{separator}{json.dumps(word, ensure_ascii=False)}: ")
        separator, kind = ", ", texts_of(schemas.get(name, {}), word)
        if kind == "text":
            yield from source.text_until(closing, longest)
        else:
            value = yield from _value_until(source, closing, kind == "text or null")
            yield Piece("call", json.dumps(value, ensure_ascii=False))


def read_bare(source: Source, schemas: Schemas, *, quote: str) -> Pieces:
    """`call:NAME{key:value,...}`, as JSON but for keys without quotation marks, and texts between `quote`s."""
    match = yield from source.match(re.compile(r"\s*call:([\w.-]+)(?=\{)"))
    if match is None:
        raise ValueError("no name")
    yield Piece("call", "", match[1])
    yield from _bare(source, quote)


def objects_in(text: str) -> Calls:
    """Objects of JSON with a name and arguments: one, several with semicolons or spaces between, or a list."""
    place, values = 0, []
    text = text.strip().removeprefix("```json").removesuffix("```").strip()
    while place < len(text):
        value, place = JSON.raw_decode(text, place)
        values += value if isinstance(value, list) else [value]
        place = _after(re.compile(r"[;,\s]*"), text, place)
    return [_from_object(value) for value in values]


def named_in(text: str, *, before: str, after: str = r"\s*") -> Calls:
    """Calls of a name and an object of JSON, or a text of one; the patterns are those of `read_json`."""
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


def _value_until(source: Source, closing: re.Pattern[str], nullable_text: bool) -> Generator[Piece | None, None, Any]:
    """A value before a mark: JSON, else a text; of a text that may be null, `null` alone is no text."""
    while True:
        found = closing.search(source.held)
        if found is not None:
            value, place = (None, -1) if nullable_text else _decoded(source.held)
            match = closing.match(source.held, place) if place >= 0 else None
            if match is not None:  # a string of JSON may hold the mark
                source.held = source.held[match.end() :]
                return value
            if nullable_text or source.closed or source.held.lstrip()[:1] not in ("{", "[", '"'):
                text, source.held = source.held[: found.start()], source.held[found.end() :]
                return None if text == "null" else text
        if source.ended:
            raise Incomplete
        yield None


def _decoded(text: str) -> tuple[Any, int]:
    """The value of JSON at the beginning of a text, and the place after it and space; -1 if there is none."""
    try:
        value, place = JSON.raw_decode(text, _after(_SPACE, text, 0))
    except (ValueError, RecursionError):
        return None, -1
    return value, _after(_SPACE, text, place)


def _bare(source: Source, quote: str) -> Pieces:
    """A value, given as JSON."""
    match = yield from source.match(re.compile(rf'(?P<quote>{re.escape(quote)})|[\[{{]|{_STRING}|[^,\]}}{{\["<]+'))
    if match is None:
        raise Incomplete if source.ended else ValueError("no value")
    found = match[0]
    if match["quote"] is not None:
        yield from source.text_until(re.compile(re.escape(quote)), len(quote) - 1)
    elif found not in ("{", "["):
        yield Piece("call", json.dumps(json.loads(found), ensure_ascii=False))
    else:
        closed = "}" if found == "{" else "]"
        yield Piece("call", found)
        separator = ""
        while True:
            match = yield from source.match(re.compile(rf"\s*(?:,\s*)?(?:(?P<end>\{closed})|(?=[^\s,\{closed}]))"))
            if match is None:
                raise Incomplete if source.ended else ValueError("no item")
            if match["end"] is not None:
                yield Piece("call", closed)
                return
            if found == "{":
                key = yield from _bare_key(source, quote)
                yield Piece("call", f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            elif separator:
                yield Piece("call", separator)
            separator = ", "
            yield from _bare(source, quote)


def _bare_key(source: Source, quote: str) -> Generator[Piece | None, None, str]:
    mark = re.escape(quote)
    pattern = re.compile(rf"{mark}(.*?){mark}:\s*|\"?([^:,{{}}\"<]+?)\"?\s*:\s*", re.DOTALL)
    match = yield from source.match(pattern)
    if match is None:
        raise Incomplete if source.ended else ValueError("no key")
    return match[1] if match[1] is not None else match[2]
