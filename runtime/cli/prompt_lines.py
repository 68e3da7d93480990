"""Reads JSON lines of prompts. An invalid line is kept with its error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.options import GenerationOptions, from_mapping
from satchel.runtime.generation.sampling.table import shown
from satchel.runtime.util.terminal import printable

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OPTION_KEYS = tuple(option.name for option in dataclasses.fields(GenerationOptions))
OWN_KEYS = ("id", "prompt", "raw", "messages", "tools", "arguments", "template")
TAKEN = ("messages", "tools", "template", "self")  # names that "arguments" cannot have


@dataclass(frozen=True)
class Chat:
    """Messages for the chat template, with its tools and further variables; `template` names one of several."""

    messages: Sequence[Any]
    tools: Sequence[Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


@dataclass(frozen=True)
class PromptLine:
    """A line that is not blank: its number from 1, its id, and either its prompt or its error.

    `error` begins with "line N: ", and `prompt` is then None. `options` are those of the line alone, by field. `raw`
    says whether a text is fed without the chat template; None leaves that to the command line.
    """

    number: int
    id: str | int
    prompt: str | Chat | None
    options: dict[str, Any] = field(default_factory=dict)
    raw: bool | None = None
    error: str | None = None


def read_lines(content: bytes) -> list[PromptLine]:
    """The lines of a file of JSON objects in UTF-8, without blank ones.

    The id of a line without a valid one is its number. Of lines with the same id all but the first are wrong.
    """
    found: list[PromptLine] = []
    owners: dict[str | int, int] = {}
    for number, raw in enumerate(content.removeprefix(BYTE_ORDER_MARK).split(b"\n"), start=1):
        if not raw.strip():
            continue
        line = _read_line(number, raw)
        owner = owners.setdefault(line.id, number)
        if owner != number and line.error is None:
            text = f"id {shown(line.id)}: line {owner} has the same id: ids must be unique"
            line = wrong_line(number, line.id, text)
        found.append(line)
    return found


def wrong_line(number: int, identity: str | int, message: str) -> PromptLine:
    """A line that cannot be answered. `message` says why, with or without "line N: " in front."""
    return PromptLine(number, identity, None, error=located(number, message))


def located(number: int, message: str) -> str:
    """A printable message that begins with "line N: "."""
    place = f"line {number}: "
    return printable(message if message.startswith(place) else place + message)


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises PromptError."""
    try:
        parsed = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise PromptError(f"not JSON ({error.msg}, column {error.pos + 1}): write one object per line") from None
    except RecursionError:
        raise PromptError("not readable: nested too deeply") from None
    except ValueError:  # of a valid document, only the digits of a number can be too many
        raise PromptError("not readable: a number has thousands of digits") from None
    if not isinstance(parsed, dict):
        raise PromptError('not a JSON object: write one like {"id": 1, "prompt": "Once upon a time"}')
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PromptError(f"key {shown(key)} is duplicated: remove one")
        found[key] = value
    return found


def _read_line(number: int, raw: bytes) -> PromptLine:
    identity: str | int = number
    try:
        row = parse_object(_decode(raw))
        if "id" in row:
            identity = _identity(row["id"])
        return PromptLine(number, identity, _prompt(row), _options(row, f"line {number}"), row.get("raw"))
    except PromptError as error:
        return wrong_line(number, identity, str(error))


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"not UTF-8 text (byte {error.start + 1}): convert the file to UTF-8") from None


def _identity(value: object) -> str | int:
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise PromptError(f"id {shown(value)}: not valid Unicode: fix or remove the invalid character")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise PromptError(f"id {shown(value)}: must be a text or a whole number")


def _prompt(row: dict[str, Any]) -> str | Chat:
    unknown = next((key for key in row if key not in OWN_KEYS and key not in OPTION_KEYS), None)
    if unknown is not None:
        known = ", ".join((*OWN_KEYS, *OPTION_KEYS))
        raise PromptError(f"unknown key {shown(unknown)}: the keys are {known}")
    if ("prompt" in row) == ("messages" in row):
        found = "both prompt and messages" if "prompt" in row else "neither prompt nor messages"
        raise PromptError(f"has {found}: one of them is required")
    _require(isinstance(row.get("raw", False), bool), "raw", row.get("raw"), "true or false")
    if row.get("raw") and "messages" in row:
        raise PromptError("raw cannot be combined with messages: only the chat template can use them")
    if "messages" in row:
        messages, tools = row["messages"], row.get("tools")
        arguments = row.get("arguments", {})
        _require(isinstance(messages, list), "messages", messages, "a list")
        _require(tools is None or isinstance(tools, list), "tools", tools, "a list")
        _require(isinstance(arguments, dict), "arguments", arguments, "an object")
        _require(isinstance(arguments.get("documents") or [], list), "documents", arguments.get("documents"), "a list")
        taken = next((key for key in TAKEN if key in arguments), None)
        if taken is not None:
            raise PromptError(f"arguments has {taken}, a reserved name: remove it")
        template = row.get("template")
        _require(template is None or isinstance(template, str), "template", template, "a text")
        return Chat(messages, tools, arguments, template)
    beside = next((key for key in ("tools", "arguments", "template") if key in row), None)
    if beside is not None:
        raise PromptError(f"has {beside} but no messages: only a chat template uses them")
    _require(isinstance(row["prompt"], str), "prompt", row["prompt"], "a text")
    return str(row["prompt"])


def _require(right: bool, key: str, value: object, what: str) -> None:
    if not right:
        raise PromptError(f"{key} {shown(value)}: must be {what}")


def _options(row: dict[str, Any], where: str) -> dict[str, Any]:
    return from_mapping({key: value for key, value in row.items() if key not in OWN_KEYS}, where)
