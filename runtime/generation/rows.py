"""The rows of a batch: which request has which, and how memory is made for what they are fed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from satchel.runtime.execution.batch import Batch, Feed, PoolFullError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.fair_queue import Job
from satchel.runtime.generation.prefill import copy_prefix
from satchel.runtime.generation.prefix_cache import Prefix, PrefixCache

Filled = TypeVar("Filled")


class Rows:
    """Requests in the rows of a batch: first those that are decoded, behind them those whose prompt is being fed.

    Where rows share memory and it is short, prefixes are let go for it, the least recently used first, and then a
    request can be preempted: what it has is kept in a temporary file until it has a row again.
    """

    def __init__(self, engine: Engine, batch: Batch, prefix_cache: PrefixCache) -> None:
        self.batch = batch
        self.preemptions = 0
        """How many times a request had to give its memory to others and waited in a file."""
        self._engine, self._prefix_cache = engine, prefix_cache
        self._jobs: list[Job | None] = [None] * len(batch.states)
        self._decoding = 0  # so many of the first rows are decoded

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, row: int) -> Job | None:
        return self._jobs[row]

    @property
    def running(self) -> list[Job]:
        """The requests that have a row."""
        return [job for job in self._jobs if job is not None]

    @property
    def decoding(self) -> list[Job]:
        """Those that are decoded, in the order of their rows."""
        return [job for job in self._jobs[: self._decoding] if job is not None]

    @property
    def feeding(self) -> list[Job]:
        """Those whose prompt is being fed."""
        return [job for job in self._jobs[self._decoding :] if job is not None]

    @property
    def is_full(self) -> bool:
        """Whether no row is free."""
        return None not in self._jobs

    def number(self, job: Job) -> int:
        """The row that a request has."""
        if job.row is None:
            raise ValueError(f"request {job.id} has no row")
        return job.row

    def state(self, job: Job) -> State:
        """The state of the row that a request has."""
        return self.batch.states[self.number(job)]

    def enter(self, job: Job) -> State:
        """Give a request a free row, which is empty."""
        job.row = self._jobs.index(None)
        self._jobs[job.row] = job
        state = self.state(job)
        state.cache.clear(job.sequence.options.adapter)
        job.since = time.perf_counter()
        return state

    def begin(self, job: Job) -> None:
        """Fill the row of a request with what another row or the prefix cache has of its prompt, or what it had."""
        state, sequence = self.state(job), job.sequence
        if job.swapped is not None:
            kept = job.swapped
            self._fill(lambda: state.cache.copy_from(kept, kept.length))
            job.fed, job.swapped = min(job.swapped.length, len(sequence.prompt)), None
            return
        sequence.begin()
        live = [
            Prefix(beside.sequence.fed[: cache.length], cache)
            for beside in self.running
            if beside is not job and (cache := self.state(beside).cache).length
        ]
        job.fed = sequence.reused_tokens = self._fill(
            lambda: copy_prefix(self._engine, state, sequence.prompt, self._prefix_cache, live, sequence.snapshots)
        )

    def to_decoding(self, job: Job) -> None:
        """A request whose prompt was fed is decoded from the next step on."""
        self._exchange(self.number(job), self._decoding)
        self._decoding += 1

    def free(self, job: Job) -> None:
        """Free the row of a request, and close the gap among those that are decoded."""
        row = self.number(job)
        self.state(job).cache.clear()
        job.row = self._jobs[row] = None
        if row < self._decoding:
            self._decoding -= 1
            self._exchange(row, self._decoding)

    def fits(self, job: Job) -> bool:
        """Whether there is memory for the prompt of a request that waits, or nothing runs that could free more."""
        return not self.running or self.batch.holds(job.sequence.positions, self._prefix_cache)

    def has_memory(self, feeds: Sequence[Feed]) -> bool:
        """Whether there is memory for a step with these, if prefixes are let go for it, as is done here."""
        while self.batch.is_short_of(feeds):
            if not self._prefix_cache.evict(self.batch.owns):
                return False
        return True

    def preempt(self) -> Job | None:
        """Keep in a temporary file what the latest request of the lowest priority has, and free its row.

        Returns that request; None if it is the only one, which no other can make room for.
        """
        running = self.running
        if len(running) == 1:
            return None
        job = max(running, key=lambda job: (-job.priority, job.id))
        job.swapped = self.state(job).cache.swapped_out(self._engine.bundle.kv_cache)
        if job.sequence.drafter is not None:
            job.sequence.drafter.rest()
        self.free(job)
        self.preemptions += 1
        return job

    def _fill(self, fill: Callable[[], Filled]) -> Filled:
        """Fill a row, and let go of prefixes as long as there is no memory for that."""
        while True:
            try:
                return fill()
            except PoolFullError:
                if not self._prefix_cache.evict(self.batch.owns):
                    raise

    def _exchange(self, row: int, other: int) -> None:
        """Exchange two rows; either may be free."""
        if row == other:
            return
        self.batch.exchange(row, other)
        self._jobs[row], self._jobs[other] = self._jobs[other], self._jobs[row]
        for place in (row, other):
            if (job := self._jobs[place]) is not None:
                job.row = place
