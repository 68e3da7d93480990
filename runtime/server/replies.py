"""Splits the text of an answer into content, reasoning and calls of tools.

Calls are read as Hermes and Qwen (`<tool_call>`), Mistral (`[TOOL_CALLS]`) and Llama 3 (an object of JSON, with or
without `<|python_tag|>`) write them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

THINK, THOUGHT = "<think>", "</think>"
CLOSED = {"<tool_call>": "</tool_call>", "[TOOL_CALLS]": None, "<|python_tag|>": None}
"""What begins a call, and what ends it; None for the end of the answer."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer: "content" or "reasoning" with its text, or a "call" with the text of its arguments."""

    kind: str
    text: str
    name: str = ""


class Reply:
    """Takes the text of one answer as it comes, and gives its pieces."""

    def __init__(self, *, tools: bool = False, thinking: bool = False) -> None:
        """`tools` are looked for only if there are any; `thinking` is whether the prompt ends within reasoning."""
        self._tools = tools
        self._state = "thinking" if thinking else "start"
        self._held = ""
        self._open = ""

    def add(self, text: str, *, final: bool = False) -> list[Piece]:
        """The pieces that are known with this text; with a `final` one, all that was held back too."""
        self._held += text
        found: list[Piece] = []
        state = None
        while state != self._state:
            state = self._state
            step = {"start": self._start, "thinking": self._think, "content": self._content, "call": self._call}[state]
            found += [piece for piece in step(final) if piece.text or piece.kind == "call"]
        return found

    def _start(self, final: bool) -> Iterator[Piece]:
        stripped = self._held.lstrip()
        if stripped.startswith(THINK):
            self._state, self._held = "thinking", stripped.removeprefix(THINK)
        elif THINK.startswith(stripped) and not final:
            return
        elif self._tools and stripped.startswith("{"):
            self._state, self._open, self._held = "call", "", stripped
        else:
            self._state = "content"
        yield from ()

    def _think(self, final: bool) -> Iterator[Piece]:
        thought, closed, rest = self._held.partition(THOUGHT)
        if closed:
            self._state, self._held = "start", rest.lstrip()
            yield Piece("reasoning", thought)
        else:
            yield self._flush("reasoning", (THOUGHT,), final)

    def _content(self, final: bool) -> Iterator[Piece]:
        begun = [mark for mark in CLOSED if mark in self._held] if self._tools else []
        if not begun:
            yield self._flush("content", tuple(CLOSED) if self._tools else (), final)
            return
        self._open = min(begun, key=self._held.index)
        before, _, self._held = self._held.partition(self._open)
        self._state = "call"
        yield Piece("content", before.rstrip())

    def _call(self, final: bool) -> Iterator[Piece]:
        end = CLOSED.get(self._open)
        inner, closed, rest = self._held.partition(end) if end else (self._held, "", "")
        if not closed and not final:
            return
        calls = _calls(inner)
        yield from calls or [Piece("content", self._open + inner + closed)]
        self._state, self._held = "content", rest.lstrip() if calls else rest

    def _flush(self, kind: str, marks: tuple[str, ...], final: bool) -> Piece:
        """The held text, but for an end of it that may begin one of the marks, with the space before it."""
        length = len(self._held)
        if marks and not final:
            sizes = [size for mark in marks for size in range(1, len(mark)) if self._held.endswith(mark[:size])]
            length -= max(sizes, default=0)
            length = len(self._held[:length].rstrip()) if kind == "content" else length
        text, self._held = self._held[:length], self._held[length:]
        return Piece(kind, text)


def _calls(text: str) -> list[Piece]:
    """The calls in a text of JSON: an object, several separated by semicolons, or a list. Empty if it is none."""
    decoder, place, values = json.JSONDecoder(), 0, []
    text = text.strip()
    try:
        while place < len(text):
            value, place = decoder.raw_decode(text, place)
            values += value if isinstance(value, list) else [value]
            while place < len(text) and text[place] in "; \n\t":
                place += 1
    except (ValueError, RecursionError):
        return []
    found = [_one(value) for value in values]
    return [piece for piece in found if piece is not None] if all(found) else []


def _one(value: Any) -> Piece | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Piece("call", arguments, value["name"]) if isinstance(arguments, str) else None
