"""What JSON schemas of arguments say, as far as calls that are not JSON need it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_REFERENCES = 32


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """The schema that a chain of `$ref` into `root` ends with; the last one that can be found."""
    for _ in range(MOST_REFERENCES):
        pointer = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            return schema
        found: Any = root
        for part in pointer.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        if found is None:
            return schema
        schema = found
    return schema


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 8) -> set[str] | None:
    """The types of JSON that a schema allows, "integer" among "number"s; None if it does not say."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or not depth:
        return None
    named = schema.get("type")
    if isinstance(named, str):
        return {named}
    if isinstance(named, list) and all(isinstance(each, str) for each in named):
        return set(named)
    if "const" in schema:
        return {type_of(schema["const"])}
    if isinstance(schema.get("enum"), list):
        return {type_of(value) for value in schema["enum"]}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            each = [types_of(one, root, depth - 1) for one in schema[key]]
            return None if None in each else {kind for kinds in each for kind in kinds or ()}
    return None


def type_of(value: Any) -> str:
    """The type of a value of JSON."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


def texts_of(root: Mapping[str, Any], key: str) -> str:
    """What a property may be: "text", "text or null", or "json" for all else."""
    properties = root.get("properties")
    types = types_of(properties.get(key), root) if isinstance(properties, Mapping) else None
    return {("string",): "text", ("null", "string"): "text or null"}.get(tuple(sorted(types or ())), "json")
