"""Reads parsed JSON into frozen dataclasses, strictly: an unknown key, a missing key or a wrong type is an error.

A key whose field has a default is optional, and is not written if it has that value.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from typing import Any

JSON_NAMES = {
    str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "an object",
    tuple: "a list",
}  # fmt: skip


DEEPEST = 40
"""The maximum nesting depth of objects and lists."""


class StrictJsonError(ValueError):
    """Parsed JSON does not have the declared shape. The message names the key and what was found there."""


def loads(text: bytes) -> Any:
    """Parse JSON that every parser reads in the same way.

    Raises ValueError for anything but UTF-8 JSON, for duplicate keys in an object, for NaN and Infinity, and for
    nesting deeper than `DEEPEST`.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST}") from None
    _check_depth(value, DEEPEST)
    return value


def from_json(kind: Any, value: Any, key: str = "") -> Any:
    """Build a value of type `kind` from parsed JSON.

    `kind` is str, int, float, bool, Any, a frozen dataclass, `tuple[T, ...]`, `dict[str, T]`, or a union of those
    (`T | None`, `int | str`). A whole number is also a float. `key` is the path of `value` in the document, for
    messages. Raises StrictJsonError.
    """
    if kind is Any:
        return value
    if type(value) is kind:
        return value
    origin, arguments = _parts(kind)
    if origin is types.UnionType:
        return _union(arguments, value, key)
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), value, key)
    if origin is tuple:
        _require(isinstance(value, list), tuple, value, key)
        if all(type(item) is arguments[0] for item in value):
            return tuple(value)
        return tuple(from_json(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        _require(isinstance(value, dict), dict, value, key)
        return {name: from_json(arguments[1], item, _join(key, name)) for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    _require(type(value) is kind, kind, value, key)
    return value


def to_json(value: Any) -> Any:
    """The inverse of `from_json`: dataclasses become dicts in the order of their fields, tuples become lists."""
    if dataclasses.is_dataclass(value):
        items = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: to_json(item) for field, item in items if item != field.default}
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


@functools.cache
def required(kind: type) -> tuple[str, ...]:
    """The names of a dataclass's fields that have no default."""
    return tuple(field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice[:60]!r} in an object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _check_depth(value: Any, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth == 0:
            raise ValueError(f"nested deeper than {DEEPEST}")
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, dict | list):
                _check_depth(item, depth - 1)


@functools.cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(kind), typing.get_args(kind)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    types_of = typing.get_type_hints(kind)
    return {field.name: types_of[field.name] for field in dataclasses.fields(kind)}


def _dataclass(kind: type, value: Any, key: str) -> Any:
    _require(isinstance(value, dict), dict, value, key)
    hints = _hints(kind)
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        raise StrictJsonError(f"unknown key '{_join(key, unknown[0])}'")
    missing = [name for name in required(kind) if name not in value]
    if missing:
        raise StrictJsonError(f"missing key '{_join(key, missing[0])}'")
    return kind(**{name: from_json(hints[name], item, _join(key, name)) for name, item in value.items()})


def _union(alternatives: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and types.NoneType in alternatives:
        return None
    kinds = [kind for kind in alternatives if kind is not types.NoneType]
    matching = [kind for kind in kinds if type(value) is kind]
    return from_json((matching or kinds)[0], value, key)


def _require(condition: bool, kind: type, value: Any, key: str) -> None:
    if not condition:
        raise StrictJsonError(f"'{key}' must be {JSON_NAMES[kind]}, found {str(value)[:60]!r}")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
