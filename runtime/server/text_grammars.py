"""Texts by their schemas as regular expressions of llguidance: texts that stand in calls as they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from satchel.runtime.server.schemas import resolved

HANDLED = {"enum", "const", "pattern", "minLength", "maxLength", "format", "anyOf"}
REFUSED = {"allOf", "oneOf", "not", "if", "then", "else", "contentEncoding", "contentMediaType", "contentSchema"}
ANY = "/(?s:.*)/"

_DAYS = "(?:0[1-9]|1[0-9]|2[0-8])"
_DATE = rf"[0-9]{{4}}-(?:(?:0[1-9]|1[0-2])-{_DAYS}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "email": r"[A-Za-z0-9_+\-]+(?:\.[A-Za-z0-9_+\-]+)*@[A-Za-z0-9]+(?:[.\-][A-Za-z0-9]+)*",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "uri": r"[A-Za-z][A-Za-z0-9+.\-]*:\/\/[A-Za-z0-9.\-]+(?:\/[A-Za-z0-9._~\-]*)*(?:\?[A-Za-z0-9=&._~\-]*)?",
}
"""Texts that are valid in a format; not all such texts (29 February is left out)."""


class Unwritable(Exception):
    """What a form of calls cannot hold; the message follows the name of a tool."""


def text_pattern(schema: Any, root: Mapping[str, Any], *, null: bool = False) -> str:
    """The texts of a schema of texts, or `null` where that is allowed, as a Lark expression of a terminal.

    Raises Unwritable for what cannot be held to.
    """
    check_reference(schema, HANDLED | REFUSED)
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return ANY
    others = sorted(REFUSED & set(schema))
    if others or "$ref" in schema:
        raise Unwritable(f"has a schema with {others[0] if others else '$ref'}")
    if schema.get("type") == "null":
        return "/null/"
    found = []
    if "anyOf" in schema:
        found.append(f"({' | '.join(text_pattern(each, root, null=null) for each in schema['anyOf'])})")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        words = "|".join(_literal("null" if value is None else str(value)) for value in values)
        return f"/(?:{words})/" if not found else f"(/(?:{words})/ & {found[0]})"
    if "pattern" in schema:
        found.append(f"/{_pattern(str(schema['pattern']))}/")
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if least or most is not None:
        found.append(f"/(?s:.{{{least},{'' if most is None else most}}})/")
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise Unwritable(f"has a schema with the format {str(schema['format'])[:60]}")
        found.append(f"/{FORMATS[schema['format']]}/")
    text = f"({' & '.join(found)})" if found else ANY
    listed = schema.get("type")
    return f"(/null/ | {text})" if null and isinstance(listed, list) and found else text


def check_reference(schema: Any, others: Collection[str]) -> None:
    """Raise Unwritable for a reference that has others of these keys beside it."""
    if isinstance(schema, Mapping) and "$ref" in schema and set(others) & set(schema):
        raise Unwritable("has a schema with more than $ref")


def terminal(name: str, pattern: str, stops: Sequence[str], after: str) -> str:
    """A terminal of texts that have none of `stops` in them, followed by a text."""
    words = "|".join(_literal(stop) for stop in stops)
    body = f"({pattern} & ~/(?s:.*)(?:{words})(?s:.*)/)" if words else pattern
    return f"{name}: {body}" + (f" /{_literal(after)}/" if after else "")


def _literal(words: str) -> str:
    """A text as it stands within a regular expression between slashes."""
    return re.sub(r"[^\w ]", lambda found: _ESCAPES.get(found[0], "\\" + found[0]) if found[0].isascii() else found[0],
                  words)  # fmt: skip


_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '"', "'": "'", "<": "<", ">": ">", "`": "`", "=": "="}


def _pattern(given: str) -> str:
    """A pattern of a schema, which may match anywhere, as one that matches the whole text."""
    begins, ends = given.startswith("^"), re.search(r"(?<!\\)\$$", given) is not None
    core = given.removeprefix("^")
    core = core[:-1] if ends else core
    core = re.sub(r"\\(.)|([/\n])", _in_slashes, core, flags=re.DOTALL)
    return f"{'' if begins else '(?s:.*)'}(?:{core}){'' if ends else '(?s:.*)'}"


def _in_slashes(found: re.Match[str]) -> str:
    if found[2] is not None:
        return {"/": "\\/", "\n": "\\n"}[found[2]]
    return {"d": "[0-9]", "w": "[0-9A-Za-z_]"}.get(found[1], found[0])
