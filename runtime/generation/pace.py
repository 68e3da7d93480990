"""How much of the prompts is fed between two decode steps."""

from __future__ import annotations

import math
import time

from satchel.runtime.execution.batch import SMALL_PIECE

PLANNED = 0.7  # of the time that pieces may take: what is planned is exceeded now and then
SMOOTHING = 0.2  # the weight of a new measurement


class Pace:
    """Plans pieces of prompts from measured times, so that decode steps do not wait for long prompts."""

    def __init__(self, stretch: float, *, in_pieces: bool) -> None:
        """Up to `stretch` times the time of a decode step may pass between two; infinity plans nothing.

        `in_pieces` is whether prompts may be fed in small pieces: else each step takes one of the usual spans.
        """
        self._stretch, self._in_pieces = stretch, in_pieces
        self._decode_seconds = 0.0
        self._token_seconds = 0.0
        self._size = SMALL_PIECE
        self._alone = True
        self._first = True
        self._end = 0.0

    def begin(self, *, alone: bool) -> None:
        """Begin a step; `alone` means that no row is decoded, so that none waits."""
        self._alone, self._first = alone, True
        if self._stretch < math.inf:
            self._end = time.perf_counter() + PLANNED * (self._stretch - 1) * self._decode_seconds

    def piece(self) -> int | None:
        """The largest size of the next piece: None for what suits the graphs, 0 for no further piece in this step."""
        first, self._first = self._first, False
        if self._stretch == math.inf:
            return None
        if self._alone or not self._in_pieces:
            return None if first else 0
        size = 0
        if self._token_seconds:
            size = max(0, min(int((self._end - time.perf_counter()) / self._token_seconds), 2 * self._size))
        if first:
            size = self._size = max(size - size % 2, SMALL_PIECE)
        return size - size % 2 if size >= SMALL_PIECE else 0

    def fed(self, count: int, seconds: float) -> None:
        """Note how long a piece of `count` tokens took."""
        if not self._alone:
            self._token_seconds = _smoothed(self._token_seconds, seconds / count)

    def decoded(self, seconds: float) -> None:
        """Note how long a decode step took."""
        self._decode_seconds = _smoothed(self._decode_seconds, seconds)


def _smoothed(old: float, new: float) -> float:
    return old + SMOOTHING * (new - old) if old else new
