"""Reads the JSON of requests by tables: each key, and what its value must be. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from satchel.runtime.generation.sampling.table import shown
from satchel.runtime.server.errors import RequestError

Field = Callable[[Any], str | None]
"""What an error says after the name of a key if its value is wrong, such as " 7: must be a text"; else None."""

LARGEST = 2**63 - 1
DEEPEST = 64
"""The maximum nesting depth of a body; schemas of tools are the deepest part of one."""


def parse(content: bytes) -> Any:
    """The JSON of a body. Raises RequestError for anything else, for numbers out of range, and for deep nesting."""
    try:
        document = json.loads(content.decode("utf-8"), parse_int=_whole_number, parse_constant=_no_number)
        _check_depth(document, DEEPEST)
    except RecursionError:
        raise RequestError(400, f"the body is nested deeper than {DEEPEST}", code="invalid_json") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON ({error}): correct it", code="invalid_json") from None
    return document


def read(document: Any, table: Mapping[str, Field], *needed: str, where: str = "") -> dict[str, Any]:
    """The keys of an object that are not null, checked. Raises RequestError for others, and for a needed one missing.

    `where` is the object's place in the body, such as "messages[0].".
    """
    if not isinstance(document, dict):
        name = where.rstrip(".") or "the body"
        raise RequestError(400, f"{name}: must be a JSON object, found {shown(document)}", where.rstrip(".") or None)
    found = {}
    for key, value in document.items():
        name = f"{where}{key[:60]}"
        if key not in table:
            raise RequestError(400, f"{name}: there is no such parameter: leave it out", name, "unknown_parameter")
        if value is None:
            continue
        wrong = table[key](value)
        if wrong is not None:
            raise RequestError(400, f"{name}{wrong}", name, "invalid_value")
        found[key] = value
    for key in needed:
        if key not in found:
            name = f"{where}{key}"
            raise RequestError(400, f"{name}: is missing: give it", name, "missing_required_parameter")
    return found


def whole(low: int, high: int) -> Field:
    """A whole number of a range."""
    return _rule(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def one_of(*values: Any) -> Field:
    """One of a few values."""
    words = " or ".join(json.dumps(value) for value in values)
    return _rule(words, lambda value: any(type(value) is type(each) and value == each for each in values))


def ignored(value: Any) -> str | None:
    """Any value, without effect."""
    return None


def refused(*allowed: Any, why: str) -> Field:
    """What satchel does not do: only values that do not ask for it."""

    def wrong(value: Any) -> str | None:
        return None if any(value == each for each in allowed) else f" {shown(value)}: {why}"

    return wrong


def _rule(words: str, right: Callable[[Any], bool]) -> Field:
    def wrong(value: Any) -> str | None:
        return None if right(value) else f" {shown(value)}: must be {words}"

    return wrong


def _is_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= 64 and all(isinstance(each, str) and each for each in texts)


flag = _rule("true or false", lambda value: isinstance(value, bool))
text = _rule("a text", lambda value: isinstance(value, str))
anything = ignored
mapping = _rule("an object", lambda value: isinstance(value, dict))
objects = _rule("a list of objects", lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value))
texts = _rule("a text or a list of up to 64 texts, none of them empty", _is_texts)
number = _rule("a number", lambda value: type(value) in (int, float) and math.isfinite(value))


def _whole_number(digits: str) -> int:
    value = int(digits) if len(digits.lstrip("-")) < 20 else LARGEST + 1
    if abs(value) > LARGEST:
        raise ValueError(f"the number {digits[:20]} is out of range")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _check_depth(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"nested deeper than {DEEPEST}")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, dict | list):
                _check_depth(item, depth - 1)
