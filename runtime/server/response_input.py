"""The input of /v1/responses, from its items to the messages that chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.fields import Field, anything, ignored, objects, one_of, read, text
from satchel.runtime.server.messages import content_text, for_template

KEPT: dict[str, Field] = {"type": text, "id": ignored, "status": ignored}
ITEMS: dict[str, dict[str, Field]] = {
    "message": {
        **KEPT,
        "role": one_of("system", "developer", "user", "assistant"),
        "content": anything,
        "phase": ignored,
    },
    "function_call": {**KEPT, "call_id": text, "name": text, "arguments": text, "namespace": ignored},
    "function_call_output": {**KEPT, "call_id": text, "output": anything},
    "reasoning": {**KEPT, "summary": objects, "content": objects, "encrypted_content": ignored},
}
NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


def messages_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a request, its instructions as the first one. Raises RequestError."""
    items = given["input"]
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise RequestError(400, "input: must be a text or a list of items", "input", "invalid_value")
    found: list[dict[str, Any]] = []
    if given.get("instructions"):
        found.append({"role": "system", "content": given["instructions"]})
    names: dict[str, str] = {}
    for place, item in enumerate(items):
        where = f"input[{place}]."
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        table = ITEMS[kind] if kind in ITEMS else {"type": one_of(*ITEMS)}
        one = read(item, table, *NEEDED.get(kind, ()), where=where)
        _ADDED[kind](found, one, names, where)
    return for_template([message for message in found if message.keys() != {"role", "reasoning_content"}])


def _add_message(found: list[dict[str, Any]], item: dict[str, Any], names: dict[str, str], where: str) -> None:
    if item["role"] == "assistant":
        last = _answer(found)
        if "content" not in last and "tool_calls" not in last:
            last["content"] = item["content"]
            return
    found.append({"role": item["role"], "content": item["content"]})


def _add_call(found: list[dict[str, Any]], item: dict[str, Any], names: dict[str, str], where: str) -> None:
    names[item["call_id"]] = item["name"]
    call = {"id": item["call_id"], "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]}}  # fmt: skip
    _answer(found).setdefault("tool_calls", []).append(call)


def _add_result(found: list[dict[str, Any]], item: dict[str, Any], names: dict[str, str], where: str) -> None:
    id = item["call_id"]
    if id not in names:
        raise RequestError(
            400, f"{where}call_id: no earlier function_call has this id", f"{where}call_id", "invalid_value"
        )
    content = content_text(item["output"], f"{where}output")
    found.append({"role": "tool", "tool_call_id": id, "name": names[id], "content": content})


def _add_reasoning(found: list[dict[str, Any]], item: dict[str, Any], names: dict[str, str], where: str) -> None:
    parts = [part.get("text") for part in item.get("content") or item.get("summary") or []]
    if not all(isinstance(part, str) for part in parts):
        raise RequestError(400, f"{where}content: must be parts of text", f"{where}content", "invalid_value")
    if parts:
        found.append({"role": "assistant", "reasoning_content": "\n".join(parts)})


_ADDED = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_result,
    "reasoning": _add_reasoning,
}


def _answer(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message if it is the assistant's, else a new one: an answer may be several items."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant"})
    return found[-1]
