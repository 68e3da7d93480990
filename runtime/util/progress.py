"""Progress on standard error, for work that takes longer than two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Self

SHOW_AFTER = 2.0  # seconds: shorter work shows nothing
REDRAW_AFTER = 0.5  # seconds


def stage_printer(*, shown: bool) -> Callable[[str], None]:
    """A function that prints the name of each stage of some work to standard error, if `shown`."""

    def stage(name: str) -> None:
        if shown:
            print(f"{name} ...", file=sys.stderr)

    return stage


class Waiting:
    """A context manager that shows a label and the elapsed time, and clears both at its end.

    A thread draws, so that the time advances during one long call. It shows nothing unless `shown` and
    standard error is a terminal.
    """

    def __init__(self, label: str, *, shown: bool) -> None:
        self.label = label
        self._start = time.monotonic()
        self._over = threading.Event()
        self._stream = sys.stderr
        self._thread: threading.Thread | None = None
        if shown and self._stream.isatty():
            self._thread = threading.Thread(target=self._show, daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Clear the line and stop; anything may be printed afterwards."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        if not self._over.wait(SHOW_AFTER):
            self._draw()

    def _draw(self) -> None:
        """Redraw until the work is over, then clear the line. Without tqdm, which takes 4 MiB of memory."""
        line = ""
        while True:
            minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
            line = f"{self.label} ... {minutes}:{seconds:02d}"
            self._stream.write(f"\r{line}")
            self._stream.flush()
            if self._over.wait(REDRAW_AFTER):
                break
        self._stream.write(f"\r{' ' * len(line)}\r")
        self._stream.flush()


class Bar(Waiting):
    """A bar of `total` units; `update` counts those that are done. `total` may be set later."""

    def __init__(self, total: int, label: str, unit: str, *, shown: bool) -> None:
        self.total = total
        self.done = 0
        self._unit = unit
        super().__init__(label, shown=shown)

    def update(self, count: int = 1) -> None:
        """Count units that are done."""
        self.done += count

    def _draw(self) -> None:
        try:
            from tqdm import tqdm
        except ImportError:  # a packed bundle runs without it
            super()._draw()
            return
        scale = self._unit == "B"  # bytes in kB, MB
        with tqdm(
            total=self.total, desc=self.label, unit=self._unit, unit_scale=scale, leave=False, file=self._stream
        ) as bar:
            bar.start_t -= time.monotonic() - self._start
            while True:
                bar.total, bar.n = self.total, self.done
                bar.refresh()
                if self._over.wait(REDRAW_AFTER):
                    break


def waiting(label: str, *, shown: bool) -> Waiting:
    """Show `label` and the elapsed time while the work in its context takes longer than two seconds."""
    return Waiting(label, shown=shown)


def progress_bar(total: int, label: str, unit: str, *, shown: bool) -> Bar:
    """A bar of `total` units: a context manager with `update(count)` and `close()`, cleared at its end.

    It appears only if `shown`, on a terminal, for work that takes longer than two seconds, even before the first unit
    is done.
    """
    return Bar(total, label, unit, shown=shown)
