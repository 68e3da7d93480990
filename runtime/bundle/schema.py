"""Generates the JSON Schema of a manifest from its dataclasses: `python -m satchel.runtime.bundle.schema`.

The schema covers keys and types; only the reader checks that names and counts are consistent.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from typing import Any

from satchel.runtime.bundle.contract import CACHE_MODES, POOLINGS, STATE_KINDS, TOKENIZER_KINDS
from satchel.runtime.bundle.digest import FORMAT, VERSION
from satchel.runtime.bundle.dtypes import DTYPES
from satchel.runtime.bundle.limits import LIMITS
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.strict_json import required

DIALECT = "https://json-schema.org/draft/2020-12/schema"

SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    types.NoneType: {"type": "null"},
    Any: {},
}

HEX_256 = {"pattern": "^[0-9a-f]{64}$"}
SIZE = {"minimum": 1, "maximum": LIMITS["kv_cache sizes"].most}

NARROWER: dict[str, dict[str, Any]] = {
    "CacheSpec.mode": {"enum": list(CACHE_MODES)},
    "CacheSpec.dtype": {"enum": list(DTYPES)},
    "CacheSpec.layers": {"maxItems": LIMITS["kv_cache.layers"].most},
    "CacheLayer.kv_heads": SIZE,
    "CacheLayer.key_dim": SIZE,
    "CacheLayer.value_dim": SIZE | {"minimum": 0},
    "Embeddings.pooling": {"enum": list(POOLINGS)},
    "Embeddings.size": {"minimum": 1, "maximum": LIMITS["embeddings.size"].most},
    "FileRecord.bytes": {"minimum": 0, "maximum": LIMITS["bytes of a file"].most},
    "FileRecord.sha256": HEX_256,
    "NamedFile.sha256": HEX_256,
    "GraphSpec.session_of": {"enum": ["prefill", None]},
    "Manifest.states": {"maxItems": LIMITS["states"].most},
    "Manifest.files": {"maxProperties": LIMITS["files"].most},
    "ModelFacts.parameters": {"minimum": 1, "maximum": LIMITS["model.parameters"].most},
    "ModelFacts.vocab_size": {"minimum": 1, "maximum": LIMITS["model.vocab_size"].most},
    "ModelFacts.max_context": {"minimum": 1, "maximum": LIMITS["model.max_context"].most},
    "ModelFacts.eos_token_ids": {"maxItems": LIMITS["model.eos_token_ids"].most},
    "StateSpec.layer": {"minimum": 0, "maximum": LIMITS["kv_cache.layers"].most},
    "StateSpec.kind": {"enum": list(STATE_KINDS)},
    "StateSpec.dtype": {"enum": list(DTYPES)},
    "TensorSpec.dtype": {"enum": list(DTYPES)},
    "TokenizerSpec.kind": {"enum": list(TOKENIZER_KINDS)},
    "TokenizerSpec.corpus": {"maxItems": LIMITS["tokenizer.corpus"].most},
    "TokenizerSpec.added": {"maxItems": LIMITS["tokenizer.added"].most},
    "AddedToken.id": {"minimum": 0},
    "AddedToken.content": {"minLength": 1},
}
"""Constraints beyond the types, by class and field."""


def manifest_schema() -> dict[str, Any]:
    """The schema of the current manifest version, as plain JSON values."""
    definitions: dict[str, Any] = {}
    body = _object(Manifest, definitions)
    first = {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
        "digest": {"type": "string", **HEX_256},
    }
    return {
        "$schema": DIALECT,
        "title": f"Manifest of a satchel bundle, version {VERSION}",
        **body,
        "properties": {**first, **body["properties"]},
        "required": [*first, *body["required"]],
        "$defs": dict(sorted(definitions.items())),
    }


def _object(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    properties = {
        name: _schema(hints[name], definitions) | NARROWER.get(f"{kind.__name__}.{name}", {}) for name in names
    }
    description = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return {
        "description": description,
        "type": "object",
        "properties": properties,
        "required": list(required(kind)),
        "additionalProperties": False,
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind in SIMPLE:
        return dict(SIMPLE[kind])
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if origin is types.UnionType:
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"no schema for {kind}")
    name = typing.cast(type, kind).__name__
    if name not in definitions:
        definitions[name] = {}  # in progress
        definitions[name] = _object(typing.cast(type, kind), definitions)
    return {"$ref": f"#/$defs/{name}"}


def as_text() -> str:
    """The schema as in `docs/manifest.schema.json`: what fits stands on one line, such as all that is said of a key."""
    return _written(manifest_schema()) + "\n"


def _written(value: Any, indent: str = "") -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or len(indent + line) <= 120:
        return line
    inner = (f"{indent} {json.dumps(key)}: {_written(part, f'{indent} ')}" for key, part in value.items())
    return "{\n" + ",\n".join(inner) + f"\n{indent}}}"


if __name__ == "__main__":
    sys.stdout.write(as_text())
