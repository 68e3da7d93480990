"""Asks a model, and gives its answers to a coroutine as they come."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from starlette.requests import Request as HttpRequest

from satchel.runtime.generation.events import Event
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.server.errors import Gone, RequestError
from satchel.runtime.server.models import Model
from satchel.runtime.server.records import record_of


class Answers:
    """The events of several requests of one client, each with the index of its request, until all have ended.

    Iterating raises the error that ends any of them, and Gone when the client closes the connection.
    """

    def __init__(self, model: Model, count: int) -> None:
        self.model = model
        self.results: dict[int, Generation] = {}
        self.count = count
        self._loop = asyncio.get_running_loop()
        self._found: deque[tuple[int, Event] | None] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._lock = threading.Lock()  # of the two that follow
        self._ids: list[int] = []
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while len(self.results) < self.count:
            if not self._found:
                self._waiter = self._loop.create_future()
                await self._waiter
            found = self._found.popleft()
            if found is None:
                raise Gone
            if self._found:
                await asyncio.sleep(0)  # a burst: let the loop see that the client has gone
            index, event = found
            if isinstance(event.outcome, Exception):
                raise event.outcome
            if event.outcome is not None:
                self.results[index] = event.outcome
                _check_end(event.outcome)
            yield index, event

    async def whole(self) -> list[Generation]:
        """The results of all requests, in their order."""
        async for _ in self:
            pass
        return [self.results[index] for index in range(self.count)]

    def submit(self, requests: Sequence[Request]) -> None:
        """Put the requests into the queue of the model; blocks for as long as that takes. Raises SatchelError."""
        for index, request in enumerate(requests):
            id = self.model.scheduler.submit(request, self._deliver(index))
            with self._lock:
                self._ids.append(id)
                closed = self._closed
            if closed:
                self.model.scheduler.cancel(id)

    def close(self) -> None:
        """Cancel what still runs: its rows are free from the next step on."""
        with self._lock:
            self._closed, ids = True, list(self._ids)
        for id in ids:
            self.model.scheduler.cancel(id)

    def leave(self) -> None:
        """End the iteration: the client has gone."""
        self.close()
        self._add(None)

    def _deliver(self, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            self.model.mail.put(self._loop, self._add, (index, event))

        return deliver

    def _add(self, found: tuple[int, Event] | None) -> None:
        """Add an event, or None for the end of the iteration; in the thread of the loop."""
        self._found.append(found)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@asynccontextmanager
async def asking(
    model: Model, requests: Sequence[Request], http: HttpRequest, timeout: float | None
) -> AsyncIterator[Answers]:
    """Ask a model; leaving the context cancels what still runs. Raises SatchelError if a request is refused."""
    answers = Answers(model, len(requests))
    client = http.client.host if http.client else ""
    requests = [replace(request, client=client, timeout=timeout) for request in requests]
    watcher = asyncio.create_task(_watch(http, answers))
    try:
        await asyncio.to_thread(answers.submit, requests)
        yield answers
    finally:
        answers.close()
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        record_of(http).add(list(answers.results.values()))


async def _watch(http: HttpRequest, answers: Answers) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    answers.leave()


def _check_end(result: Generation) -> None:
    """Raise RequestError for an answer that has no part of an answer."""
    if result.finish_reason == "closed":
        raise RequestError(503, "the server is closing: ask again later", code="closing")
    if result.finish_reason == "time" and not result.token_ids:
        raise RequestError(504, "the time limit was over before the first token: ask again later", code="timeout")


def now() -> int:
    """The time in seconds since 1970, as protocols have it."""
    return int(time.time())
