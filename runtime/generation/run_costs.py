"""What a run of the graph costs by the number of its rows, and how many drafted rows pay."""

from __future__ import annotations

import math
import operator
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

GAIN = 1.05  # in tokens per second, that a draft must promise: less is within the error of what is measured
ROW = 0.5  # of the time of a run of one row, that a further row is taken to cost before it is measured
SMOOTHING = 0.1
SURE = 2  # times that a run must have been measured: the first is slower


def reached(chances: Iterable[float]) -> list[float]:
    """The probability that each token of a draft counts: that it and those before it are right."""
    return list(accumulate(chances, operator.mul))


class Costs:
    """Seconds of a run by the number of its rows (tokens with logits), measured on this machine as it works."""

    def __init__(self, steps: Mapping[int, float] | None = None) -> None:
        """`steps` are what runs took in single steps when the bundle was specialized, until they are measured here."""
        self._shape = dict(sorted({1: 1.0, **(steps or {})}.items()))
        self._seconds: dict[int, float] = {}
        self._times: dict[int, int] = {}
        self._sure: list[int] = []  # numbers of rows that were measured often enough, in ascending order

    def note(self, rows: int, seconds: float) -> None:
        """Count a measurement. What disturbs a run makes it slower only, so that less time counts at once."""
        old, times = self._seconds.get(rows, seconds), self._times.get(rows, 0)
        self._seconds[rows] = seconds if seconds < old else old + SMOOTHING * (seconds - old)
        self._times[rows] = times + 1
        if times + 1 == SURE:
            self._sure.insert(bisect(self._sure, rows), rows)

    def of(self, rows: int) -> float:
        """Seconds of a run; infinity before anything was measured.

        A number of rows that was not measured is taken to be slower than the next smaller that was, or else faster
        than the next larger, as it was when the bundle was specialized.
        """
        sure = self._sure
        if not sure:
            return math.inf
        near = sure[max(bisect(sure, rows) - 1, 0)]
        return self._seconds[near] * (1.0 if near == rows else self._steps(rows) / self._steps(near))

    def best(
        self,
        gains: Sequence[float],
        further: Iterable[int],
        *,
        rows: int = 1,
        each: float = 0.0,
        before: float = 0.0,
        again: bool = False,
    ) -> tuple[int, float]:
        """How many drafted rows, of the numbers `further`, give the most tokens per second, and that number.

        0 if none gives more than `rows` alone, each of which gives a token. `gains` are the tokens that each drafted
        row is expected to give, `each` is the time to draft one, `before` that to draft all.
        With `again`, the rows of a draft that is not all right are fed again in the next run.
        """
        plain = self.of(rows)
        best, rate = 0, GAIN * rows / plain
        if plain == math.inf:
            return best, rate
        expected = list(accumulate(gains, initial=float(rows)))
        for count in further:
            if 0 < count <= len(gains):
                more = (1 - gains[count - 1]) * (self.of(rows + count) - plain) if again else 0.0
                found = expected[count] / (self.of(rows + count) + count * each + before + more)
                if found > rate:
                    best, rate = count, found
        return best, rate

    def price(self, further: Iterable[int], rows: int) -> float:
        """The tokens that a drafted row has to give, at the least, to pay beside `rows` others: less never does."""
        plain = self.of(rows)
        if plain == math.inf:
            return math.inf
        return min((rows * (self.of(rows + count) / plain - 1) / count for count in further), default=math.inf)

    def _steps(self, rows: int) -> float:
        """What a run takes in runs of one row, by what was known before: straight lines between known numbers."""
        known = list(self._shape)
        after = bisect(known, rows)
        if self._shape.get(rows) is not None:
            return self._shape[rows]
        if len(known) == 1:
            return 1 + ROW * (rows - 1)
        low, high = (known[after - 1], known[after]) if after < len(known) else known[-2:]
        slope = (self._shape[high] - self._shape[low]) / (high - low)
        return self._shape[low] + slope * (rows - low)


class DraftCosts(Costs):
    """Those of runs of a small model that drafts: no time before they were measured, so that it is tried."""

    def of(self, rows: int) -> float:
        """Seconds of a run; 0 before anything was measured."""
        known = super().of(rows)
        return 0.0 if known == math.inf else known
