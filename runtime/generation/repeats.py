"""Notices a text that repeats itself without end, as small models do when they are stuck."""

from __future__ import annotations

import numpy as np

MAX_BLOCK = 256
"""Tokens of the longest block whose repetition is noticed."""
MIN_TOKENS = 128
"""Tokens that the repetition must span, so that a row of dots or an empty table is not taken for a loop."""


class RepeatDetector:
    """Counts, for each block length up to `MAX_BLOCK`, how many of the last tokens equal the one a block before."""

    def __init__(self, max_repeats: int) -> None:
        """`max_repeats` is the number of repetitions in a row that makes a loop, 2 or more."""
        lengths = np.arange(1, MAX_BLOCK + 1)
        self._needed = np.maximum(lengths * max_repeats, MIN_TOKENS) - lengths
        self._equal = np.zeros(MAX_BLOCK, np.int64)
        self._last = np.full(MAX_BLOCK, -1, np.int64)  # the newest token first

    def add(self, token: int) -> bool:
        """Take the next token. Returns whether the text now ends in a loop."""
        self._equal = np.where(self._last == token, self._equal + 1, 0)
        self._last[1:] = self._last[:-1]
        self._last[0] = token
        return bool((self._equal >= self._needed).any())
