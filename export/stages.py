"""Prints the progress of an export: its stages, how far they are, and the time left at the pace measured so far."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from satchel.runtime.util.progress import progress_bar

STAGES = (
    "opening the checkpoint",
    "tracing the model",
    "optimizing the graphs",
    "measuring the layers",
    "rounding the weights",
    "writing the bundle",
    "checking the bundle",
    "measuring the bundle",
)
LINE_EVERY = 10.0
"""Seconds between two lines of a stage in a log, where no bar can be drawn."""

WORTH_SAYING = 20.0
"""Seconds: a shorter time left is not announced."""

Advance = Callable[[int], object]


def duration(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


class Pace:
    """Estimates the time left from the stages' expected seconds and the pace at which they have really run.

    `expected` are the seconds of each stage, in order. The pace is the time spent over the time expected for it.
    """

    def __init__(self, expected: Mapping[str, float]) -> None:
        self.expected = dict(expected)
        self._spent = 0.0
        self._foreseen = 0.0

    def finish(self, stage: str, seconds: float) -> None:
        """Note what a stage has taken."""
        self._spent += seconds
        self._foreseen += self.expected.pop(stage, 0.0)

    def left(self, stage: str, seconds: float, fraction: float | None) -> float:
        """Seconds left in all, `seconds` into a stage of which `fraction` is done, if that is known."""
        expected = self.expected.get(stage, 0.0)
        later = sum(self.expected.values()) - expected
        if fraction:
            pace = (self._spent + seconds) / max(self._foreseen + fraction * expected, 1e-9)
            return seconds / fraction - seconds + pace * later
        pace = self._spent / self._foreseen if self._foreseen else 1.0
        if seconds > pace * expected:  # so will the others
            pace = (self._spent + seconds) / max(self._foreseen + expected, 1e-9)
        return max(pace * expected - seconds, 0.0) + pace * later


class Stages:
    """Prints each stage as it starts, and how long it took, to standard error; silent unless `shown`.

    On a terminal, a bar shows how far a stage is. In a log, a line every ten seconds does. `names` are the stages that
    this export has.
    """

    def __init__(self, shown: bool, names: tuple[str, ...] = STAGES) -> None:
        self.shown = shown
        self._names = names
        self._pace: Pace | None = None
        self._taken: dict[str, float] = {}
        self._header = ""
        self._done = self._total = 0
        self._broken = False  # whether other lines have followed the stage's header

    def say(self, line: str) -> None:
        """Print one line."""
        if self.shown:
            print(line, file=sys.stderr, flush=True)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Take the forecast of each stage's seconds; from now on the time left is estimated."""
        self._pace = Pace({name: seconds.get(name, 0.0) for name in self._names})
        for name, taken in self._taken.items():
            self._pace.finish(name, taken)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage of `STAGES`; its time is printed when it ends well."""
        start = time.monotonic()
        self._header = f"[{self._names.index(name) + 1}/{len(self._names)}] {name}"
        self._done = self._total = 0
        self._broken = False
        left = 0.0 if self._pace is None else self._pace.left(name, 0.0, None)
        self._begin(f" (about {duration(left)} left)" if left > WORTH_SAYING else "")
        try:
            with self._lines(name, start):
                yield
        except BaseException:
            self.say("")
            raise
        taken = self._taken[name] = time.monotonic() - start
        if self._pace is not None:
            self._pace.finish(name, taken)
        if self._broken:
            self._begin()
        self.say(f"{taken:.1f} s")

    @contextlib.contextmanager
    def bytes(self, total: int) -> Iterator[Advance]:
        """A bar of `total` bytes for the current stage; yields the function that advances it."""
        with self._bar(total, "writing", "B") as advance:
            yield advance

    @contextlib.contextmanager
    def steps(self, total: int, label: str) -> Iterator[Advance]:
        """A bar of `total` steps for the current stage; yields the function that advances it."""
        with self._bar(total, label, "") as advance:
            yield advance

    @contextlib.contextmanager
    def _bar(self, total: int, label: str, unit: str) -> Iterator[Advance]:
        self._total = total
        try:
            with progress_bar(total, label, unit, shown=self.shown) as bar:

                def advance(count: int) -> None:
                    bar.update(count)
                    self._done += count

                yield advance
        finally:
            if sys.stderr.isatty():  # the bar was drawn over the header
                self._begin(start="\r")

    @contextlib.contextmanager
    def _lines(self, name: str, start: float) -> Iterator[None]:
        """Print a line every ten seconds while a stage runs, where standard error is not a terminal."""
        if not self.shown or sys.stderr.isatty():
            yield
            return
        over = threading.Event()

        def tell() -> None:
            while not over.wait(LINE_EVERY):
                self.say(("" if self._broken else "\n") + self._state(name, time.monotonic() - start))
                self._broken = True

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _state(self, name: str, seconds: float) -> str:
        """How far a stage is, after so many seconds."""
        fraction = min(self._done / self._total, 1.0) if self._total else None
        parts = [f"{fraction:.0%}"] if fraction else []
        parts.append(f"{duration(seconds)} so far")
        if self._pace is not None:
            left = self._pace.left(name, seconds, fraction)
            parts.append(f"about {duration(left)} left in all" if left else "longer than expected")
        return f"  {name}: {', '.join(parts)}"

    def _begin(self, note: str = "", start: str = "") -> None:
        if self.shown:
            print(f"{start}{self._header}{note} ... ", end="", file=sys.stderr, flush=True)
