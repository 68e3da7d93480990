"""Tells the user where an export is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from satchel.export.bundle_writer import Advance
from satchel.runtime.progress import progress_bar

STAGES = (
    "opening the checkpoint",
    "tracing the model",
    "optimising the graphs",
    "writing the weights",
    "checking the bundle",
)


class Stages:
    """Prints each stage as it starts, and how long it took, to standard error; silent unless `shown`."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def say(self, line: str) -> None:
        """Print one line."""
        if self.shown:
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage of `STAGES`; its time is printed when it ends well."""
        start = time.monotonic()
        if self.shown:
            print(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name} ... ", end="", file=sys.stderr, flush=True)
        try:
            yield
        except BaseException:
            self.say("")
            raise
        self.say(f"{time.monotonic() - start:.1f} s")

    @contextlib.contextmanager
    def bytes(self, total: int) -> Iterator[Advance]:
        """A bar of `total` bytes for the stage that is running; yields the function that advances it."""
        with progress_bar(total, "writing", "B", shown=self.shown) as bar:
            yield bar.update
