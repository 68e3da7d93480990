"""A thread that steps a scheduler, so that any number of other threads can ask it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from satchel.runtime.generation.events import Event
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.scheduler import Scheduler


class Driver:
    """Steps a scheduler in a thread of its own while there are requests; a context manager.

    Requests are submitted to the scheduler with a function that gets their events, in this thread: that is a queue's
    `put`, or, with asyncio, `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        """Start the thread."""
        self.scheduler = scheduler
        self._thread = threading.Thread(target=self._run, name="satchel-scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; False once it is closed, or a step has failed."""
        return self._thread.is_alive()

    def events(self, request: Request) -> Iterator[Event]:
        """Submit a request, and yield its events as they come; leaving the iterator early cancels it.

        Raises what `Scheduler.submit` does.
        """
        found: queue.SimpleQueue[Event] = queue.SimpleQueue()
        number = self.scheduler.submit(request, found.put)
        return self._until_ended(number, found)

    def close(self, *, drain: bool = True) -> None:
        """Take no further requests, and wait until all have ended; without `drain` they are cancelled."""
        self.scheduler.close(cancel=not drain)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def _until_ended(self, number: int, found: queue.SimpleQueue[Event]) -> Iterator[Event]:
        try:
            outcome = None
            while outcome is None:
                event = found.get()
                outcome = event.outcome
                yield event
        finally:
            self.scheduler.cancel(number)

    def _run(self) -> None:
        while self.scheduler.wait():
            try:
                self.scheduler.step()
            except Exception as error:  # nothing can go on after it, and nobody is to wait
                self.scheduler.close()
                self.scheduler.fail_all(error)
                raise
