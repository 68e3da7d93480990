"""How much of the prompts is fed between two decode steps."""

from __future__ import annotations

import math
import time

from satchel.runtime.execution.batch import SMALL_PIECE

PLANNED = 0.7  # of the time that pieces may take: what is planned is exceeded now and then
SMOOTHING = 0.2  # the weight of a new measurement
LARGEST = 256  # tokens: larger pieces are not faster


class Pace:
    """Plans pieces of prompts from measured times, so that decode steps do not wait for long prompts."""

    def __init__(self, stretch: float, *, in_pieces: bool) -> None:
        """Up to `stretch` times the time of a decode step may pass between two; infinity plans nothing.

        `in_pieces` is whether prompts may be fed in small pieces: else each step takes one of the usual spans.
        """
        self._stretch, self._in_pieces = stretch, in_pieces
        self._decode_seconds = 0.0
        self._size = float(SMALL_PIECE)  # of a piece that takes all the time there is
        self._alone = self._first = True
        self._seconds = self._end = 0.0

    def begin(self, *, alone: bool) -> None:
        """Begin a step; `alone` means that no row is decoded, so that none waits."""
        self._alone, self._first = alone, True
        if self._stretch < math.inf:
            self._seconds = PLANNED * (self._stretch - 1) * self._decode_seconds
            self._end = time.perf_counter() + self._seconds

    def piece(self) -> int | None:
        """The largest size of the next piece: None for what suits the graphs, 0 for no further piece in this step."""
        first, self._first = self._first, False
        if self._stretch == math.inf:
            return None
        if self._alone or not self._in_pieces:
            return None if first else 0
        left = 1.0 if first else (self._end - time.perf_counter()) / self._seconds if self._seconds else 0.0
        size = int(left * self._size) // 2 * 2
        return size if size >= SMALL_PIECE else 0

    def fed(self, count: int, seconds: float) -> None:
        """Note how long a piece of `count` tokens took."""
        if not self._alone and count >= self._size // 2 * 2:  # a smaller one does not tell: each run has a fixed part
            change = min(2.0, max(0.5, math.sqrt(self._seconds / max(seconds, 1e-9))))  # the root dampens outliers
            self._size = min(max(self._size * change, SMALL_PIECE), LARGEST)

    def decoded(self, seconds: float) -> None:
        """Note how long a decode step took."""
        old = self._decode_seconds
        self._decode_seconds = old + SMOOTHING * (seconds - old) if old else seconds
