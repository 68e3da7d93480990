"""How much of the prompts is fed between two decode steps."""

from __future__ import annotations

import math

from satchel.runtime.execution.batch import SMALL_PIECE

PLANNED = 0.6  # of the time that pieces may take: what is planned is exceeded now and then
SMOOTHING = 0.2  # the weight of a new measurement
FRESH = 32  # steps with prompts after which one without is measured again
LARGEST = 256  # tokens: larger pieces are not faster
SHRINK, GROW = 0.5, 2.0  # at most, from one step to the next
RUN = 256  # tokens of prompts in a step where none waits: one long piece, or several short ones


class Pace:
    """Plans pieces of prompts from measured times, so that decode steps do not wait for long prompts.

    What a decode step takes alone is measured for each number of rows, in steps without prompts where need be.
    """

    def __init__(self, stretch: float, *, in_pieces: bool) -> None:
        """Up to `stretch` times the time of a decode step may pass between two; infinity plans nothing.

        `in_pieces` is whether prompts are to be fed in small pieces: else each step takes one of the usual spans, or,
        where nothing is planned, several short ones.
        """
        self._stretch, self._in_pieces = stretch, in_pieces
        self._seconds: dict[int, float] = {}  # of a decode step alone, by the number of rows
        self._since: dict[int, int] = {}  # steps with prompts since then
        self._size = float(SMALL_PIECE)  # of a piece that takes all the time there is
        self._rows = self._planned = 0

    def begin(self, rows: int) -> None:
        """Begin a step in which so many rows are decoded; where there is none, none waits."""
        self._rows, self._planned = rows, 0

    def piece(self) -> int | None:
        """The largest size of the next piece: None for what suits the graphs, 0 for no further piece in this step."""
        if not self._rows or not self._in_pieces:
            most = RUN if self._stretch == math.inf or (self._in_pieces and not self._rows) else 1
            return None if self._planned < most else 0
        if self._stretch > 1 and self._since.get(self._rows, FRESH) >= FRESH:
            return 0
        size = int(self._size - self._planned) // 2 * 2
        return size if size >= SMALL_PIECE else 0

    def plan(self, count: int) -> None:
        """Note that a piece of `count` tokens is fed in this step."""
        self._planned += count

    def waited(self, seconds: float) -> None:
        """Note how long rows that are decoded waited for the token of this step, all of its work included."""
        rows, old = self._rows, self._seconds.get(self._rows, seconds)
        if not self._planned:
            self._seconds[rows], self._since[rows] = old + SMOOTHING * (seconds - old), 0
            return
        self._since[rows] = self._since.get(rows, FRESH) + 1
        if self._planned > self._size - SMALL_PIECE:  # fewer tokens do not tell: each run has a fixed part
            there_is = PLANNED * (self._stretch - 1) * old
            ratio = there_is / max(seconds - old, 1e-9)
            change = max(SHRINK, ratio**0.5) if ratio < 1 else min(GROW, ratio**0.25)  # roots dampen outliers
            self._size = min(max(self._size * change, SMALL_PIECE), LARGEST)
