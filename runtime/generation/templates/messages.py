"""The messages of a chat: checked, and prepared for a template as transformers prepares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from satchel.runtime.errors import PromptError

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message has its reasoning; templates read the first one, and some the second."""

_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Stands in a rendered text where a message is to be continued. Its final space shows whether the template trims."""


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise PromptError, naming the first wrong message by its index, unless all are messages of a chat.

    A message is an object with a `role`. Its `content` is a text, a list of parts (each an object with a `type`), or
    null or absent if there are `tool_calls`.
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
        return None if message.get("tool_calls") else ".content: must be a text, unless there are tool_calls"
    if _is_list(content):
        wrong = (i for i, part in enumerate(content) if not _is_part(part))
        found = next(wrong, None)
        return None if found is None else f'.content[{found}]: must be an object with a "type"'
    return None if isinstance(content, str) else f".content: must be a text, found {type(content).__name__}"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("type"), str)


def normalized(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without keys that are null, and with reasoning under each name that templates read."""
    found = []
    for message in messages:
        given = {key: value for key, value in message.items() if value is not None}
        reasoning = next((given[key] for key in _REASONING if key in given), None)
        if reasoning is not None:
            given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
        found.append(given)
    return found


def open_ending(messages: list[dict[str, Any]], key: str, source: str) -> str:
    """Mark the end of `key` in the last message, and return its text; `source` is the template.

    Raises PromptError if it has no such text, or the template does not read it.
    """
    last = messages[-1]
    value = last.get(key)
    keys = [key] if key not in _REASONING else [name for name in _REASONING if last.get(name) == value]
    if not any(name in source for name in keys):
        raise PromptError(f"continue_final_message: the chat template does not read {key!r}: leave it out")
    if isinstance(value, str):
        last |= dict.fromkeys(keys, value + _MARK)
        return value
    parts: Sequence[Any] = value if isinstance(value, list | tuple) else []
    place = next((i for i in reversed(range(len(parts))) if isinstance(parts[i].get("text"), str)), None)
    if place is None:
        raise PromptError(f"continue_final_message: the last message has no text as {key!r}: give it one")
    text: str = parts[place]["text"]
    last[key] = [*parts[:place], {**parts[place], "text": text + _MARK}, *parts[place + 1 :]]
    return text


def cut_at_ending(text: str, ending: str) -> str:
    """The rendered text up to the end of the message that `open_ending` marked. Raises PromptError if it is not there.

    A template that trims messages has trimmed the mark as well; then the text ends without space, too.
    """
    place = text.rfind(_MARK.strip())
    if place < 0 or ending.strip() not in text:
        raise PromptError("continue_final_message: the chat template leaves out the last message: leave it out")
    whole = text.startswith(_MARK, place)
    return text[:place] if whole else text[:place].rstrip()
