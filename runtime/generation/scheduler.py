"""Continuous batching: requests join and leave at any step, and prompts are fed in pieces between the decode steps."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from satchel.runtime.errors import PromptError, QueueFullError
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.fair_queue import FairQueue, Job
from satchel.runtime.generation.pace import Pace
from satchel.runtime.generation.prefill import copy_prefix, feed_piece
from satchel.runtime.generation.prefix_cache import Prefix, PrefixCache, common_length
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sampling.logprobs import TokenLogprob
from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.generation.speculation import decode
from satchel.runtime.util.defaults import STRETCH


@dataclass(frozen=True)
class Event:
    """News of one request: the tokens that were chosen, and its end.

    Attributes:
        id: The number of the request.
        text: The new text that may be shown; often empty. The texts joined are that of the result.
        token_ids: The new tokens.
        logprobs: Those of the new tokens, if the request asks for them.
        outcome: In the last event of a request, its result, or the error that ended it; else None.
    """

    id: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    outcome: Generation | Exception | None = None


Deliver = Callable[[Event], object]


class Scheduler:
    """Runs many requests over the rows of one batch. Each gets the answer that it gets alone.

    `submit` and `cancel` may be called from any thread; `step` is for one thread, and `Driver` is such a thread. A step
    feeds pieces of prompts, then one token of every row that has its prompt. Requests are taken by priority, then from
    the client that has had the least, each in the order of arrival.
    """

    def __init__(
        self,
        engine: Engine,
        prefix_cache: PrefixCache,
        new_sequence: Callable[[Request], ActiveSequence],
        *,
        rows: int,
        capacity: int,
        queue_limit: int | None = None,
        stretch: float = STRETCH,
        force_batch: bool = False,
    ) -> None:
        """Allocate `rows` rows of `capacity` positions each.

        `new_sequence` checks a request. At most `queue_limit` requests wait for a row; None means any number. While
        prompts are fed, the time between the tokens of other requests is up to `stretch` times the usual one, as far as
        that can be planned; infinity feeds each prompt at once. `force_batch` is as for `Engine.new_batch`. Raises
        PromptError as that.
        """
        self._engine, self._prefix_cache, self._new_sequence = engine, prefix_cache, new_sequence
        self._batch: Batch = engine.new_batch(rows, capacity, force=force_batch)
        self._capacity, self._queue_limit = capacity, queue_limit
        self._pace = Pace(stretch, in_pieces=stretch < math.inf and engine.piece_invariant)
        self._rows: list[Job | None] = [None] * rows
        self._decoding = 0  # so many of the first rows are decoded; rows behind them are free or get their prompt
        self._queue = FairQueue()
        self._oldest = True
        self._events: list[Event] = []
        self._ids = itertools.count()
        self._lock = threading.Lock()  # of what follows
        self._awake = threading.Condition(self._lock)
        self._jobs: dict[int, Job] = {}  # all that have not ended
        self._arrived: list[Job] = []
        self._cancelled: list[int] = []
        self._closed = False

    def submit(self, request: Request, deliver: Deliver | None = None) -> int:
        """Put a request into the queue. Returns its number.

        `deliver` gets its events, in the thread of `step`; an error that it raises ends the request. Raises PromptError
        if the request is wrong or can never fit, QueueFullError if the queue is full.
        """
        return self.enqueue(self._new_sequence(request), request, deliver)

    def enqueue(self, sequence: ActiveSequence, request: Request, deliver: Deliver | None = None) -> int:
        """As `submit`, of a request that has been checked."""
        if sequence.positions > self._capacity:
            raise PromptError(
                f"the request needs {sequence.positions} positions but a row holds {self._capacity}: shorten the "
                "prompt, or lower --max-new-tokens"
            )
        if request.timeout is not None:
            sequence.end_within(request.timeout)
        with self._lock:
            if self._closed:
                raise QueueFullError("no further requests are taken: this is closing")
            if self._queue_limit is not None and len(self._jobs) >= len(self._rows) + self._queue_limit:
                raise QueueFullError(f"{self._queue_limit} requests wait already, as many as may: ask again later")
            timed = request.timeout is not None
            job = Job(next(self._ids), sequence, request.priority, request.client, timed, deliver)
            self._jobs[job.id] = job
            self._arrived.append(job)
            self._awake.notify_all()
        return job.id

    def cancel(self, id: int) -> bool:
        """End a request at the next step, which frees its row. Returns False if it has ended already."""
        with self._lock:
            if id not in self._jobs:
                return False
            self._cancelled.append(id)
            self._awake.notify_all()
            return True

    def close(self, *, cancel: bool = False) -> None:
        """Take no further requests; `cancel` also cancels all."""
        with self._lock:
            self._closed = True
            if cancel:
                self._cancelled.extend(self._jobs)
            self._awake.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a request to run, or for `close`, up to `timeout` seconds. Returns whether there is a request."""
        with self._lock:
            self._awake.wait_for(lambda: self._jobs or self._closed, timeout)
            return bool(self._jobs)

    @property
    def running(self) -> int:
        """The number of rows in use."""
        return sum(job is not None for job in self._rows)

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return len(self._jobs) - self.running

    def step(self) -> list[Event]:
        """Feed prompts, then one token of each row that has its prompt. Returns what is new; [] if nothing runs.

        An error ends the requests that it concerns, and no other.
        """
        self._events = []
        self._arrive()
        self._feed()
        self._decode()
        return self._events

    def run(self) -> Iterator[Event]:
        """Step until no request is left, and yield the events."""
        while self._jobs:
            yield from self.step()

    def fail_all(self, error: Exception) -> None:
        """End all requests with an error."""
        self._arrive()
        for job in list(self._jobs.values()):
            job.sequence.fail(error)
            self._tell(job)

    def _arrive(self) -> None:
        """Take in what was submitted and cancelled, and end what is over."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = [self._jobs[id] for id in self._cancelled if id in self._jobs], []
        for job in arrived:
            self._queue.add(job)
        for job in cancelled:
            job.sequence.close()
        running = [job for job in self._rows if job is not None]
        for job in dict.fromkeys([*running, *self._queue.timed(), *cancelled, *arrived]):
            job.sequence.check_time()
            if job.sequence.finish_reason:
                self._tell(job)

    def _feed(self) -> None:
        """Feed pieces of prompts: as many as the pace allows."""
        self._pace.begin(alone=not self._decoding)
        while (job := self._next()) is not None and (size := self._pace.piece()) != 0:
            self._oldest = not self._oldest
            with failing(job):
                if job.row is None:
                    self._copy_prefix(job, self._enter(job))
                self._feed_piece(job, size)
            if job.sequence.finish_reason:
                self._tell(job)
            elif not job.remaining:
                self._start(job)

    def _next(self) -> Job | None:
        """The request whose prompt is fed next: half of the time the oldest, so that a long one does not starve.

        One that has no row yet lets another go first that is being fed what it needs too.
        """
        feeding = [job for job in self._rows[self._decoding :] if job is not None]
        waiting = self._queue.first() if None in self._rows else None
        job = self._queue.best([*feeding, waiting] if waiting else feeding, oldest=self._oldest)
        if job is not None and job is waiting:
            for other in (each for each in feeding if _share_adapter(each, job)):
                if common_length(other.sequence.prompt, job.sequence.prompt) > other.fed:
                    return other
        return job

    def _enter(self, job: Job) -> State:
        """Give a request that waits a free row."""
        self._queue.take(job)
        job.row = self._rows.index(None)
        self._rows[job.row] = job
        state = self._batch.states[job.row]
        state.cache.clear(job.sequence.options.adapter)
        job.since = time.perf_counter()
        return state

    def _copy_prefix(self, job: Job, state: State) -> None:
        """Copy what another row or the prefix cache has of a prompt."""
        sequence = job.sequence
        sequence.begin()
        live = [
            Prefix(beside.sequence.fed[: cache.length], cache)
            for row, beside in enumerate(self._rows)
            if beside not in (None, job) and (cache := self._batch.states[row].cache).length
        ]
        job.fed = sequence.reused_tokens = copy_prefix(
            self._engine, state, sequence.prompt, self._prefix_cache, live, sequence.snapshots
        )

    def _feed_piece(self, job: Job, size: int | None) -> None:
        start = time.perf_counter()
        count = feed_piece(self._engine, self._state(job), job.sequence.prompt, size, job.sequence.snapshots)
        self._pace.fed(count, time.perf_counter() - start)
        self._queue.charge(job, count)
        job.fed += count
        job.sequence.check_time()

    def _start(self, job: Job) -> None:
        """Take the first token of a request whose prompt was fed, and of those next that have the same prompt."""
        ready = [job, *self._twins(job)]
        for each in ready:
            self._take(each)
            each.sequence.timing.prefill_seconds = each.lap()
        for each in ready:
            self._tell(each)
            if each.row is not None:
                self._exchange(each.row, self._decoding)
                self._decoding += 1

    def _twins(self, job: Job) -> Iterator[Job]:
        """Those next in the queue that have the same prompt, in rows of their own with its keys, values and logits."""
        while None in self._rows and (twin := self._queue.first()) is not None:
            if not _share_adapter(twin, job) or not np.array_equal(twin.sequence.prompt, job.sequence.prompt):
                return
            twin.sequence.begin(job.sequence)
            self._enter(twin).copy_from(self._state(job))
            twin.fed = twin.sequence.reused_tokens = len(twin.sequence.prompt)
            twin.since = job.since
            yield twin

    def _decode(self) -> None:
        """Feed each row that has its prompt its last token, and choose the next ones."""
        jobs = [job for job in self._rows[: self._decoding] if job is not None]
        if not jobs:
            return
        start, taken = time.perf_counter(), 1
        if len(jobs) == 1:
            with failing(*jobs):
                taken = decode(self._engine, self._state(jobs[0]), jobs[0].sequence)
                self._queue.charge(jobs[0], taken)
        else:  # a drafted token would cost as much as that of another request
            with failing(*jobs):
                self._batch.decode([job.sequence.token_ids[-1] for job in jobs])
            for job in jobs:
                self._take(job)
        self._pace.decoded(time.perf_counter() - start)
        for job in jobs:
            job.sequence.timing.decode_seconds += job.lap()
            job.sequence.timing.decode_steps += taken
            self._tell(job)

    def _take(self, job: Job) -> None:
        """Choose the next token of a request."""
        self._queue.charge(job, 1)
        if job.sequence.finish_reason is None:
            with failing(job):
                job.sequence.take_from(self._state(job))

    def _tell(self, job: Job) -> None:
        """Add the event of what is new of a request, and free the place of one that has ended."""
        sequence, outcome = job.sequence, None
        if sequence.finish_reason:
            outcome = sequence.error or Generation.of(sequence, self._batch.nbytes // len(self._rows))
            self._leave(job)
        text, told = "".join(sequence.pieces[job.shown :]), slice(job.told, None)
        job.shown, job.told = len(sequence.pieces), len(sequence.token_ids)
        event = Event(job.id, text, tuple(sequence.token_ids[told]), tuple(sequence.logprobs[told]), outcome)
        self._events.append(event)
        if job.deliver is not None:
            with failing(job):
                job.deliver(event)

    def _leave(self, job: Job) -> None:
        """Let a request go that has ended, and close the gap among the rows that are decoded."""
        if job.row is None:
            self._queue.take(job)
        else:
            row, cache = job.row, self._state(job).cache
            if job.sequence.error is None:
                self._prefix_cache.keep(job.sequence.fed, cache)
            cache.clear()
            job.row = self._rows[row] = None
            if row < self._decoding:
                self._decoding -= 1
                self._exchange(row, self._decoding)
        job.sequence.end_drafts()
        self._queue.leave(job)
        with self._lock:
            del self._jobs[job.id]

    def _exchange(self, row: int, other: int) -> None:
        """Exchange two rows; either may be free."""
        if row == other:
            return
        self._batch.exchange(row, other)
        self._rows[row], self._rows[other] = self._rows[other], self._rows[row]
        for place in (row, other):
            if (job := self._rows[place]) is not None:
                job.row = place

    def _state(self, job: Job) -> State:
        """The state of the row that a request has."""
        if job.row is None:
            raise ValueError(f"request {job.id} has no row")
        return self._batch.states[job.row]


def _share_adapter(job: Job, other: Job) -> bool:
    """Whether the keys and values of one are those of the other for the same tokens."""
    return job.sequence.options.adapter == other.sequence.options.adapter


@contextmanager
def failing(*jobs: Job) -> Iterator[None]:
    """An error in this context ends these requests, and no other."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - also one of a callback
        for job in jobs:
            job.sequence.fail(error)
