"""Reads calls in Python, such as `[add(a=1), clock()]`, as they come. Standard library only."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Generator
from typing import Any, ClassVar

from satchel.runtime.server.call_readers import Schemas
from satchel.runtime.server.call_source import Incomplete, Piece, Pieces, Source, escaped

_CALL = re.compile(r"[\s,;\[]*(?P<name>[^\W\d][\w.-]*)\s*\(\s*(?=\)|[^\W\d]\w*\s*=)")
_KEY = re.compile(r"\s*(?:,\s*)?(?:(?P<end>\))|(?P<key>[^\W\d]\w*)\s*=\s*(?=[^\s]))")
_TEXT = re.compile(r"(?P<quote>\"(?!\"\")|'(?!''))")
_ESCAPE = (
    r"\\(?:(?P<octal>[0-7]{1,3})|x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})"
    r"|N\{(?P<name>[^}]*)\}|(?P<sign>[^0-7xuUN]))"
)
_UNITS = {quote: re.compile(rf"[^\\{quote}]+|{_ESCAPE}", re.DOTALL) for quote in "\"'"}
_SIGNS = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\n": ""}
_SIGNS |= {sign: sign for sign in "\\'\""}
_STRUCTURE = re.compile(
    r"(?P<text>'''(?:[^\\]|\\.)*?'''|\"\"\"(?:[^\\]|\\.)*?\"\"\"|(?P<open>'''|\"\"\")"
    r"|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")|(?P<sign>[\[\](){},'\"])",
    re.DOTALL,
)


def read_python(source: Source, schemas: Schemas) -> Pieces:
    """A call whose arguments are keywords with literals: a list of such calls has one after another.

    Nothing is evaluated: values are numbers, texts, lists, tuples, dictionaries, and True, False and None, or JSON's
    names of those.
    """
    match = yield from source.match(_CALL)
    if match is None:
        raise ValueError("no call with keywords")
    yield Piece("call", "{", match["name"])
    known: set[str] = set()
    while True:
        match = yield from source.match(_KEY)
        if match is None:
            raise Incomplete if source.ended else ValueError("text between arguments")
        if match["end"] is not None:
            yield Piece("call", "}")
            return
        if match["key"] in known:
            raise ValueError("a keyword twice")
        yield Piece("call", f"{', ' if known else ''}{json.dumps(match['key'], ensure_ascii=False)}: ")
        known.add(match["key"])
        yield from _value(source)


def _value(source: Source) -> Pieces:
    """A literal, given as JSON; a text in pieces."""
    while len(source.held) < 3 and not source.ended:
        yield None
    match = _TEXT.match(source.held)
    if match is None:
        place = yield from _literal_end(source)
        value = _literal(source.held[:place])
        source.held = source.held[place:]
        yield Piece("call", json.dumps(value, ensure_ascii=False))
        return
    source.held = source.held[1:]
    yield Piece("call", '"')
    units, place = _UNITS[match["quote"]], 0
    while True:
        text, place = _decoded(units, source.held, closed=source.ended)
        if text:
            yield Piece("call", _as_json(text))
        source.held = source.held[place:]
        if source.held.startswith(match["quote"]):
            source.held = source.held[1:]
            yield Piece("call", '"')
            return
        if source.ended:
            raise Incomplete
        yield None


def _decoded(units: re.Pattern[str], held: str, *, closed: bool) -> tuple[str, int]:
    """The text up to the end of a string or an escape that may go on, and the place of that."""
    found, place = "", 0
    while (match := units.match(held, place)) is not None:
        if match["octal"] is not None and match.end() == len(held) and not closed:
            break  # another digit may follow
        found += _unit(match)
        place = match.end()
    return found, place


def _unit(match: re.Match[str]) -> str:
    """What a run of characters or an escape stands for."""
    if match["octal"] is not None:
        return chr(int(match["octal"], 8))
    for code in ("x", "u", "U"):
        if match[code] is not None:
            return chr(int(match[code], 16))
    if match["name"] is not None:
        return unicodedata.lookup(match["name"])
    sign = match["sign"]
    return match[0] if sign is None else _SIGNS.get(sign, match[0])


def _as_json(text: str) -> str:
    """A text within a string of JSON; halves of characters, as JSON writes them, are written so again."""
    halves = any("\ud800" <= each <= "\udfff" for each in text)
    return json.dumps(text)[1:-1] if halves else escaped(text)


def _literal_end(source: Source) -> Generator[Piece | None, None, int]:
    """The place of what follows a literal."""
    while True:
        depth = 0
        for found in _STRUCTURE.finditer(source.held):
            sign = found["sign"]
            if found["open"] or (sign is not None and sign in "'\""):
                break  # of a text that has not ended
            if sign is None:
                continue
            if depth == 0 and sign in ",)":
                return found.start()
            depth += {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}.get(sign, 0)
        if source.ended:
            raise Incomplete
        yield None


class _Literals(ast.NodeTransformer):
    """Makes JSON's names those of Python."""

    NAMES: ClassVar[dict[str, Any]] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.NAMES[node.id]) if node.id in self.NAMES else node


def _literal(text: str) -> Any:
    """The value of a literal of Python."""
    found = ast.literal_eval(_Literals().visit(ast.parse(text.strip(), mode="eval")))
    json.dumps(found, allow_nan=False)  # bytes, sets and the like are no arguments
    return found
