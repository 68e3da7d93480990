"""What a text must look like: a grammar as options, JSON lines and the server give it. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from satchel.runtime.errors import PromptError

KINDS = ("json_schema", "json_object", "regex", "lark")
FORM = '{"json_schema": {...}}, {"json_object": true}, {"regex": "..."} or {"lark": "..."}'


@dataclass(frozen=True)
class Grammar:
    """A grammar that a text has to match as a whole.

    Attributes:
        kind: "json_schema", "regex" or "lark" (the dialect of llguidance).
        source: The schema as JSON, the regular expression (that of Rust), or the Lark grammar.
        chat: The text answers a chat: a model that reasons may do so first, and what follows has to match.
        calls: The text is calls of tools, which models that answer in channels write in a message of its own.
    """

    kind: str
    source: str
    chat: bool = False
    calls: bool = False

    @classmethod
    def of(cls, value: object, where: str = "grammar") -> Grammar:
        """The grammar that a mapping of one kind to its source describes. Raises PromptError."""
        if isinstance(value, Grammar):
            return value
        if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
            raise PromptError(f"{where} {str(value)[:60]!r}: must be {FORM}")
        kind, source = next(iter(value.items()))
        if kind == "json_object":
            if source is not True:
                raise PromptError(f"{where}: json_object must be true")
            return cls("json_schema", '{"type": "object"}')
        if kind == "json_schema":
            return cls(kind, _schema(source, where))
        if not isinstance(source, str) or not source:
            raise PromptError(f"{where}: {kind} must be a text of at least one character")
        return cls(kind, source)


def _schema(source: Any, where: str) -> str:
    """A schema as JSON; the order of its properties is kept, since texts have them in that order."""
    try:
        schema = json.loads(source) if isinstance(source, str) else source
        text = json.dumps(schema)
    except (ValueError, TypeError, RecursionError) as error:
        raise PromptError(f"{where}: the JSON schema is not JSON ({error})") from None
    if not isinstance(schema, Mapping | bool):
        raise PromptError(f"{where}: a JSON schema must be an object, or true or false")
    return text
