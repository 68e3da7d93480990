"""Ends a text at the first of some strings, also where one comes in several pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through piece by piece, without ever showing a stop string or the beginning of one.

    What might be the beginning of one is held back until it is clear. Of several strings the one that is whole first
    counts, so the text does not depend on how it is split; of those that are whole at once, the longest.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """The text that `piece` makes safe to show, and whether a stop string was found: then nothing may follow."""
        if not self._strings:
            return piece, False
        text = self._held + piece
        places = ((text.find(string), len(string)) for string in self._strings)
        found = [(begin + length, begin) for begin, length in places if begin >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        kept = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def finish(self) -> str:
        """The text still held back: there was no stop string in it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` with which `string` begins, the whole string apart."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
