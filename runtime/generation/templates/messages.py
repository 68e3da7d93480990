"""What messages must look like before a chat template sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from satchel.runtime.errors import PromptError


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise PromptError, naming the first wrong message by its index, unless all are as a chat has them.

    A message is an object with a `role`. Its `content` is a text, a list of parts (each an object with a `type`), or
    null or absent where there are `tool_calls`.
    """
    if not _is_list(messages) or not messages:
        raise PromptError("messages: must be a list with at least one message")
    for index, message in enumerate(messages):
        complaint = _complaint(message)
        if complaint:
            raise PromptError(f"messages[{index}]{complaint}")


def _complaint(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f': must be an object like {{"role": "user", "content": "..."}}, found {type(message).__name__}'
    if not isinstance(message.get("role"), str):
        return '.role: must be a text such as "user"'
    content = message.get("content")
    if content is None:
        return None if message.get("tool_calls") else ".content: must be a text, except beside tool_calls"
    if _is_list(content):
        wrong = (i for i, part in enumerate(content) if not _is_part(part))
        found = next(wrong, None)
        return None if found is None else f'.content[{found}]: must be an object with a "type"'
    return None if isinstance(content, str) else f".content: must be a text, found {type(content).__name__}"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("type"), str)
