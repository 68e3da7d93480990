"""What an export begins before it needs it, for cores that would wait: work in a thread, and processes that load."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

GoOn = Callable[[int], object]
"""Called from time to time by work that is ahead, with a count that is not read. Raises Left if nobody waits for it."""


class Left(Exception):
    """The export has ended, so what runs ahead is of no more use."""


@contextlib.contextmanager
def in_thread(name: str, work: Callable[[GoOn], T]) -> Iterator[Future[T]]:
    """While it is entered, a thread does `work`. Leaving stops it, the next time that it calls what it was given."""
    left = threading.Event()

    def go_on(_: int) -> None:
        if left.is_set():
            raise Left

    with ThreadPoolExecutor(1, name) as pool:
        try:
            yield pool.submit(work, go_on)
        finally:
            left.set()


@contextlib.contextmanager
def in_order() -> Iterator[ThreadPoolExecutor]:
    """A thread that does one thing after the other. Leaving drops what it has not begun."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Helper:
    """A process without torch that has loaded its modules before it is told what to do, by lines of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def ended(self) -> bool:
        """Whether the process runs no more."""
        return self._process.poll() is not None

    def tell(self, message: Any) -> None:
        """Send one line; a process that has ended gets none, and `finish` says so."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def finish(self) -> str | None:
        """Wait for the end of the process; returns the last line of what it complains about, or None if it did not."""
        output, complaint = self._process.communicate()
        if self._process.returncode == 0:
            return None
        lines = (complaint or output).strip().splitlines()
        return lines[-1] if lines else "no message"


@contextlib.contextmanager
def helper(module: str) -> Iterator[Helper]:
    """While it is entered, `python -m module` runs."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-m", module], text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield Helper(process)
        finally:
            process.kill()  # it has ended, unless something failed
            with contextlib.suppress(BrokenPipeError):  # what it was told and never read
                process.stdin.close()  # type: ignore[union-attr]
