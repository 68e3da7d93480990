"""The messages of Anthropic's protocol, from their blocks to what chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, anything, flag, ignored, mapping, one_of, read, text

MESSAGE: dict[str, Field] = {"role": one_of("user", "assistant"), "content": anything}
TEXT: dict[str, Field] = {"type": one_of("text"), "text": text, "cache_control": ignored, "citations": ignored}
BLOCKS: dict[str, dict[str, Field]] = {
    "text": TEXT,
    "tool_use": {
        "type": text, "id": text, "name": text, "input": mapping, "cache_control": ignored, "caller": ignored,
    },
    "tool_result": {
        "type": text, "tool_use_id": text, "content": anything, "is_error": flag, "cache_control": ignored,
    },
    "thinking": {"type": text, "thinking": text, "signature": ignored, "cache_control": ignored},
    "redacted_thinking": {"type": text, "data": ignored, "cache_control": ignored},
}  # fmt: skip
NEEDED = {"text": ("text",), "tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id",)}
KINDS = {"user": ("text", "tool_result"), "assistant": ("text", "tool_use", "thinking", "redacted_thinking")}
"""The blocks that a message of a role may have."""


def for_template(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The system prompt and the messages of a request as chat templates expect them. Raises RequestError."""
    if not given["messages"]:
        raise RequestError(400, "messages: must have at least one message", "messages", "invalid_value")
    found: list[dict[str, Any]] = []
    if given.get("system"):
        found.append({"role": "system", "content": _text(given["system"], "system")})
    names: dict[str, str] = {}
    for place, message in enumerate(given["messages"]):
        where = f"messages[{place}]."
        one = read(message, MESSAGE, "role", "content", where=where)
        blocks = _blocks(one["content"], one["role"], f"{where}content")
        if one["role"] == "assistant":
            found.append(_answer(blocks, names))
        else:
            found += _question(blocks, names, f"{where}content")
    return found


def _blocks(content: Any, role: str, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(400, f"{where}: must be a text or a list of blocks", where, "invalid_value")
    found = []
    for place, block in enumerate(content):
        name = f"{where}[{place}]."
        kind = block.get("type") if isinstance(block, dict) else None
        table = BLOCKS[kind] if kind in KINDS[role] else {**TEXT, "type": one_of(*KINDS[role])}
        found.append(read(block, table, "type", *NEEDED.get(str(kind), ()), where=name))
    return found


def _answer(blocks: list[dict[str, Any]], names: dict[str, str]) -> dict[str, Any]:
    """A message of the assistant; `names` gets the names of its calls by their ids."""
    calls = [block for block in blocks if block["type"] == "tool_use"]
    thoughts = [block.get("thinking", "") for block in blocks if block["type"] == "thinking"]
    message: dict[str, Any] = {"role": "assistant", "content": _joined(blocks)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        names |= {call["id"]: call["name"] for call in calls}
        message["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["input"]}}
            for call in calls
        ]
    return message


def _question(blocks: list[dict[str, Any]], names: dict[str, str], where: str) -> list[dict[str, Any]]:
    """A message of the user: results of tools are messages of their own."""
    found: list[dict[str, Any]] = []
    for place, block in enumerate(blocks):
        if block["type"] == "tool_result":
            id, name = block["tool_use_id"], f"{where}[{place}]."
            if id not in names:
                raise RequestError(
                    400, f"{name}tool_use_id: no earlier tool_use has this id", f"{name}tool_use_id", "invalid_value"
                )
            content = _text(block.get("content", ""), f"{name}content")
            found.append({"role": "tool", "tool_call_id": id, "name": names[id], "content": content})
        elif found and found[-1]["role"] == "user":
            found[-1]["content"] += "\n" + block["text"]
        else:
            found.append({"role": "user", "content": block["text"]})
    return found


def _text(content: Any, where: str) -> str:
    """The text of what holds text only."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(400, f"{where}: must be a text or a list of blocks", where, "invalid_value")
    return _joined(
        [read(block, TEXT, "type", "text", where=f"{where}[{place}].") for place, block in enumerate(content)]
    )


def _joined(blocks: list[dict[str, Any]]) -> str:
    return "\n".join(block["text"] for block in blocks if block["type"] == "text")
