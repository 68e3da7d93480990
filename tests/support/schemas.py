"""Seeded JSON schemas, each with a bounded size, so that a text by any of them ends."""

from __future__ import annotations

import random
from typing import Any


def schema(seed: int) -> dict[str, Any]:
    """An object of up to three levels with all kinds of values, references among them."""
    random_ = random.Random(seed)
    definitions = {"code": {"type": "string", "enum": ["a", "b c", 'd"e']}, "pair": _array(random_, 0)}
    return {**_object(random_, 2), "$defs": definitions}


def _value(random_: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_text, _number, _whole, _constant, _choice, _pattern, _reference]
    kinds += [_object, _array, _any] if depth else []
    return random_.choice(kinds)(random_, depth)


def _object(random_: random.Random, depth: int) -> dict[str, Any]:
    names = random_.sample(["name", "age", "tags", "x y", "größe", "n/a"], random_.randint(1, 4))
    properties = {name: _value(random_, depth - 1) for name in names}
    required = [name for name in names if random_.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(random_: random.Random, depth: int) -> dict[str, Any]:
    least = random_.randint(0, 2)
    items = _value(random_, depth - 1) if depth else {"type": "boolean"}
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + random_.randint(0, 2)}


def _any(random_: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(random_, depth - 1), {"type": "null"}, _whole(random_, 0)]}


def _text(random_: random.Random, depth: int) -> dict[str, Any]:
    least = random_.randint(0, 2)
    return {"type": "string", "minLength": least, "maxLength": least + random_.randint(0, 6)}


def _whole(random_: random.Random, depth: int) -> dict[str, Any]:
    least = random_.randint(-50, 50)
    return {"type": "integer", "minimum": least, "maximum": least + random_.randint(0, 900)}


def _number(random_: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "number", "minimum": -1.5, "exclusiveMaximum": 1.0 + random_.randint(0, 20), "multipleOf": 0.25}


def _constant(random_: random.Random, depth: int) -> dict[str, Any]:
    return {"const": random_.choice([None, True, "é\n", 7, [1, {"a": "b"}]])}


def _choice(random_: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": random_.sample(["red", "green", 3, None, False], 3)}


def _pattern(random_: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "pattern": random_.choice(["^[a-c]{1,4}$", r"^\d{4}-\d{2}$", "^(yes|no)$"])}


def _reference(random_: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": random_.choice(["#/$defs/code", "#/$defs/pair"])}
