"""Splits the text of an answer into what the protocols keep apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A part of an answer: its kind is "content", with `text`."""

    kind: str
    text: str


class Reply:
    """Takes the text of one answer as it comes, and gives its pieces."""

    def add(self, text: str) -> list[Piece]:
        """The pieces that are complete with this text."""
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece]:
        """What was held back; nothing may be added afterwards."""
        return []
