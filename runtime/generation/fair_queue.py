"""Who is next: requests by priority, and clients in equal shares."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from satchel.runtime.execution.kv_cache import Cache
from satchel.runtime.generation.sequence import ActiveSequence


@dataclass(eq=False)
class Job:
    """A request in the scheduler.

    `row` is None until it has one, `fed` the number of prompt tokens in it, `shown` and `told` the pieces of text and
    the tokens that events have told, and `since` the time of its last token. `swapped` has the keys and values of one
    that had to give its row to others.
    """

    id: int
    sequence: ActiveSequence
    priority: int
    client: str
    timed: bool
    deliver: Callable[..., object] | None
    row: int | None = None
    fed: int = 0
    swapped: Cache | None = None
    shown: int = 0
    told: int = 0
    since: float = 0.0

    @property
    def remaining(self) -> int:
        """The number of prompt tokens that were not fed yet."""
        return len(self.sequence.prompt) - self.fed

    def shares_adapter(self, other: Job) -> bool:
        """Whether keys and values of the same tokens are those of another request."""
        return self.sequence.options.adapter == other.sequence.options.adapter

    def lap(self) -> float:
        """The seconds since the last token, or since the beginning; the next ones count from now."""
        since, self.since = self.since, time.perf_counter()
        return self.since - since


class FairQueue:
    """Requests that wait for a row, and what each client has had.

    Of one priority, the client that has had the fewest tokens is next; one that comes back starts with the least that
    any other has had, so nothing is saved up. That is the virtual token counter of 2401.00588, with equal weights for
    prompt and new tokens.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[int, str], OrderedDict[int, Job]] = {}
        self._timed: dict[int, Job] = {}
        self._tokens: dict[str, int] = {}
        self._present: Counter[str] = Counter()

    def add(self, job: Job) -> None:
        """Let a request wait."""
        if job.client not in self._tokens:
            self._tokens[job.client] = min(self._tokens.values(), default=0)
        self._present[job.client] += 1
        self._queues.setdefault((job.priority, job.client), OrderedDict())[job.id] = job
        if job.timed:
            self._timed[job.id] = job

    def take(self, job: Job) -> None:
        """A request waits no longer."""
        key = job.priority, job.client
        del self._queues[key][job.id]
        if not self._queues[key]:
            del self._queues[key]
        self._timed.pop(job.id, None)

    def return_(self, job: Job) -> None:
        """Let a request wait again that had a row, as the first of its client."""
        queue = self._queues.setdefault((job.priority, job.client), OrderedDict())
        queue[job.id] = job
        queue.move_to_end(job.id, last=False)
        if job.timed:
            self._timed[job.id] = job

    def leave(self, job: Job) -> None:
        """A request that does not wait has ended: forget its client with the last one."""
        self._present[job.client] -= 1
        if not self._present[job.client]:
            del self._present[job.client], self._tokens[job.client]

    def charge(self, job: Job, tokens: int) -> None:
        """Count tokens that the client of a request has had."""
        self._tokens[job.client] += tokens

    def first(self) -> Job | None:
        """The request that gets the next row."""
        return self.best((next(iter(queue.values())) for queue in self._queues.values()), oldest=True)

    def best(self, jobs: Iterable[Job], *, oldest: bool) -> Job | None:
        """The request that is next, of several: at last, the oldest or the one with the shortest rest of a prompt."""

        def key(job: Job) -> tuple[int, int, int, int]:
            return -job.priority, self._tokens[job.client], 0 if oldest else job.remaining, job.id

        return min(jobs, key=key, default=None)

    def timed(self) -> list[Job]:
        """Those waiting that have a limit of time."""
        return list(self._timed.values())
