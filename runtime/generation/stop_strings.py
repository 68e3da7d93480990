"""Ends a text at the first of several stop strings, which may span pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on piece by piece, without a stop string or the beginning of one.

    What could be the beginning of one is held back until that is decided. Of several strings the one that is complete
    first counts, so the result does not depend on how the text is split; of those complete at once, the longest.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """The text that is now safe to show, and whether a stop string was found, after which nothing may be added."""
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
        """The text still held back, which has no stop string in it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
