"""Tells the user where an export is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator

from satchel.export.config import ExportConfig
from satchel.export.writing.bundle_writer import Advance
from satchel.graphs.quant.recipe import Recipe
from satchel.runtime.util.progress import progress_bar

STAGES = (
    "opening the checkpoint",
    "tracing the model",
    "optimizing the graphs",
    "rounding the weights",
    "writing the bundle",
    "checking the bundle",
    "measuring the bundle",
)


class Stages:
    """Prints each stage as it starts, and how long it took, to standard error; silent unless `shown`.

    `skipped` are stages that this export does not have.
    """

    def __init__(self, shown: bool, skipped: Collection[str] = ()) -> None:
        self.shown = shown
        self._header = ""
        self._names = [name for name in STAGES if name not in skipped]

    def say(self, line: str) -> None:
        """Print one line."""
        if self.shown:
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage of `STAGES`; its time is printed when it ends well."""
        start = time.monotonic()
        self._header = f"[{self._names.index(name) + 1}/{len(self._names)}] {name} ... "
        self._begin()
        try:
            yield
        except BaseException:
            self.say("")
            raise
        self.say(f"{time.monotonic() - start:.1f} s")

    @contextlib.contextmanager
    def bytes(self, total: int) -> Iterator[Advance]:
        """A bar of `total` bytes for the stage that is running; yields the function that advances it."""
        with self._bar(total, "writing", "B") as advance:
            yield advance

    @contextlib.contextmanager
    def steps(self, total: int, what: str) -> Iterator[Callable[[int], object]]:
        """A bar of `total` steps for the stage that is running; yields the function that advances it."""
        with self._bar(total, what, "") as advance:
            yield advance

    @contextlib.contextmanager
    def _bar(self, total: int, what: str, unit: str) -> Iterator[Advance]:
        try:
            with progress_bar(total, what, unit, shown=self.shown) as bar:
                yield bar.update
        finally:
            if sys.stderr.isatty():
                self._begin("\r")  # the bar was drawn over it

    def _begin(self, start: str = "") -> None:
        if self.shown:
            print(f"{start}{self._header}", end="", file=sys.stderr, flush=True)


def skipped_stages(config: ExportConfig, recipe: Recipe | None) -> list[str]:
    """The stages that an export does not have."""
    skipped = [] if config.certificate else ["measuring the bundle"]
    return skipped if recipe is not None else ["rounding the weights", *skipped]
