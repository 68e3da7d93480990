"""Continuous batching: requests join and leave at any step, and prompts are fed in pieces between the decode steps."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from satchel.runtime.errors import PromptError, QueueFullError
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import Ids
from satchel.runtime.generation.draft_rows import DraftRows
from satchel.runtime.generation.events import Deliver, Event
from satchel.runtime.generation.fair_queue import FairQueue, Job
from satchel.runtime.generation.flights import Flights
from satchel.runtime.generation.joint_speculation import Ahead, decode_together, plan_drafts
from satchel.runtime.generation.pace import Pace
from satchel.runtime.generation.prefill import next_piece
from satchel.runtime.generation.prefix_cache import PrefixCache, common_length
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.rows import Rows
from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.generation.speculation import WIDTHS, decode
from satchel.runtime.util.defaults import STRETCH


class Scheduler:
    """Runs many requests over the rows of one batch. Each gets the answer that it gets alone.

    `submit` and `cancel` may be called from any thread; `step` is for one thread, and `Driver` is such a thread. A step
    feeds pieces of prompts and the last token of every row that has its prompt: in one run of the graph where keys and
    values are in blocks, which also checks drafts. Requests are taken by priority, then from the client that has had
    the least, each in the order of arrival.
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
        kv_cache_mib: int | None = None,
        draft_rows: DraftRows | None = None,
    ) -> None:
        """Allocate `rows` rows of `capacity` positions each.

        `new_sequence` checks a request. At most `queue_limit` requests wait for a row; None means any number. While
        prompts are fed, the time between the tokens of other requests is up to `stretch` times the usual one, as far as
        that can be planned; infinity plans nothing. `force_batch` is as for `Engine.new_batch`. `kv_cache_mib` limits
        the memory of keys and values, those kept for later prompts included: where not all rows fit, requests of low
        priority wait in a temporary file; None is room for all. `draft_rows` are as many of a small model that drafts.
        Raises PromptError as `Engine.new_pool`.
        """
        self._engine, self._prefix_cache, self._new_sequence = engine, prefix_cache, new_sequence
        self._batch: Batch = engine.new_pool(
            rows, capacity, prefix_cache.limit, None if kv_cache_mib is None else kv_cache_mib << 20, force=force_batch
        )
        self._capacity, self._queue_limit = capacity, queue_limit
        self._pace = Pace(stretch, in_pieces=stretch < math.inf and engine.piece_invariant)
        self._rows = Rows(engine, self._batch, prefix_cache)
        self._draft_rows = draft_rows
        self._queue, self._flights = FairQueue(), Flights(engine.stages)
        self._oldest = True
        self._events: list[Event] = []
        self._undelivered: list[tuple[Job, Deliver, Event]] = []
        self._ids = itertools.count()
        self._lock = threading.Lock()  # of what follows
        self._awake = threading.Condition(self._lock)
        self._jobs: dict[int, Job] = {}  # all that have not ended
        self._arrived: list[Job] = []
        self._cancelled: list[int] = []
        self._closed = False

    def submit(self, request: Request, deliver: Deliver | None = None) -> int:
        """Put a request into the queue. Returns its number.

        `deliver` gets its events, in the thread of `step`, some of them in the next step; an error that it raises ends
        the request. Raises PromptError if the request is wrong or can never fit, QueueFullError if the queue is full.
        """
        return self.enqueue(self._new_sequence(request), request, deliver)

    def enqueue(self, sequence: ActiveSequence, request: Request, deliver: Deliver | None = None) -> int:
        """As `submit`, of a request that has been checked."""
        most = min(self._capacity, self._batch.positions)
        if sequence.positions > most:
            raise PromptError(
                f"the request needs {sequence.positions} positions but a row holds {most}: shorten the prompt, or "
                "lower --max-new-tokens"
            )
        if request.timeout is not None:
            sequence.end_within(request.timeout)
        if sequence.drafter is not None and self._draft_rows is not None:
            sequence.drafter.share(self._draft_rows)
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
        return len(self._rows.running)

    @property
    def preemptions(self) -> int:
        """How many times a request had to give its memory to others and waited in a file."""
        return self._rows.preemptions

    @property
    def kv_bytes(self) -> int:
        """The bytes of keys and values: of blocks in use, those of kept prefixes included, or of all rows."""
        return self._batch.nbytes

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return len(self._jobs) - self.running

    def step(self) -> list[Event]:
        """Feed prompts, and one token of each row that has its prompt. Returns what is new; [] if nothing runs.

        With several stages a step begins a run of some rows, and takes the results of the oldest. An error ends the
        requests that it concerns, and no other.
        """
        self._events = []
        self._arrive()
        pieces = self._pieces()
        decoding = self._flights.next_of(self._rows.decoding)
        self._make_room(pieces, decoding)
        self._deliver()
        alone = not pieces and not self._flights
        if alone and len(self._rows.decoding) == 1 and self._has_room_ahead(decoding[0]):
            self._decode_ahead(decoding, [])
        elif alone and (planned := self._planned(decoding)):
            self._decode_ahead(decoding, planned)
        elif pieces or decoding:
            self._run(pieces, decoding)
        if self._flights.is_due(begun=bool(pieces or decoding)):
            self._land()
        if not self._jobs:
            self._deliver()
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
        self._deliver()

    def _arrive(self) -> None:
        """Take in what was submitted and cancelled, and end what is over."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = [self._jobs[id] for id in self._cancelled if id in self._jobs], []
        for job in arrived:
            self._queue.add(job)
        for job in cancelled:
            job.sequence.close()
        for job in dict.fromkeys([*self._rows.running, *self._queue.timed(), *cancelled, *arrived]):
            job.sequence.check_time()
            if job.sequence.finish_reason:
                self._tell(job)

    def _pieces(self) -> list[tuple[Job, Ids]]:
        """The pieces of prompts that this step feeds: as many tokens as the pace allows, at most one of a request."""
        self._pace.begin(len(self._rows.decoding))
        found: list[tuple[Job, Ids]] = []
        flying = self._flights.jobs
        while (job := self._next([*flying, *(each for each, _ in found)])) and (size := self._pace.piece()) != 0:
            self._oldest = not self._oldest
            with failing(job):
                if job.row is None:
                    self._queue.take(job)
                    self._rows.enter(job)
                    self._rows.begin(job)
                if job.remaining:
                    prompt, snapshots = job.sequence.prompt, job.sequence.snapshots
                    piece = next_piece(self._engine, job.fed, prompt, size, snapshots)
                    found.append((job, piece))
                    self._pace.plan(len(piece))
            if job.sequence.finish_reason:
                self._tell(job)
            elif not job.remaining:
                self._rows.to_decoding(job)  # it was interrupted
        return found

    def _next(self, planned: Sequence[Job]) -> Job | None:
        """The request whose prompt is fed next: half of the time the oldest, so that a long one does not starve.

        One that has no row yet lets another go first that is being fed what it needs too; those of `planned` have a
        piece in this step, or are under way.
        """
        feeding = self._rows.feeding
        waiting = None if self._rows.is_full else self._queue.first()
        if waiting is not None and not self._rows.fits(waiting):
            waiting = None
        ready = [job for job in [*feeding, *([waiting] if waiting else [])] if job not in planned]
        job = self._queue.best(ready, oldest=self._oldest)
        if job is not None and job is waiting:
            for other in (each for each in feeding if each.shares_adapter(job)):
                if common_length(other.sequence.prompt, job.sequence.prompt) > other.fed:
                    return None if other in planned else other
        return job

    def _make_room(self, pieces: list[tuple[Job, Ids]], decoding: list[Job]) -> None:
        """Preempt requests until the step has the memory; they wait again, as the first."""
        while not self._rows.has_memory(self._tokens_of(pieces, decoding)):
            preempted = self._rows.preempt()
            if preempted is None:
                return
            self._queue.return_(preempted)
            pieces[:] = [(job, piece) for job, piece in pieces if job.row is not None]
            decoding[:] = [job for job in decoding if job.row is not None]

    def _has_room_ahead(self, job: Job) -> bool:
        """Whether there is memory for the longest draft, if prefixes are let go for it."""
        most = min(1 + WIDTHS[-1], job.sequence.limit - len(job.sequence.token_ids))
        tokens = np.zeros(most if job.sequence.drafter else 1, np.int64)
        return self._rows.has_memory([(self._rows.number(job), tokens)])

    def _planned(self, decoding: Sequence[Job]) -> list[Ahead]:
        """What is drafted for requests that are decoded together, if there is memory for it."""
        rows, planned = [(self._rows.number(job), job.sequence) for job in decoding], list[Ahead]()
        with failing(*decoding):
            planned = plan_drafts(self._batch, rows, self._draft_rows)
        if not self._rows.has_memory([each.feed for each in planned]):
            for each in planned:
                each.draft.clear()
        return planned

    def _run(self, pieces: Sequence[tuple[Job, Ids]], decoding: Sequence[Job]) -> None:
        """Begin to feed pieces and last tokens."""
        for run in self._batch.plan(self._tokens_of(pieces, decoding), len(decoding)):
            concerned = [job for row in run.rows if (job := self._rows[row]) is not None]
            with failing(*concerned):
                run.go()
        ended = [(job, len(piece)) for job, piece in pieces if len(piece) == job.remaining]
        for job, piece in pieces:
            if len(piece) < job.remaining:
                self._fed(job, len(piece))
        self._flights.begin(ended, decoding)

    def _land(self) -> None:
        """Take the tokens that follow what the oldest run was fed, of the requests that have not ended meanwhile."""
        flight = self._flights.land()
        for job, count in flight.ended:
            if job.id in self._jobs:
                self._fed(job, count)
        for job in (decoding := [job for job in flight.decoding if job.id in self._jobs]):
            self._take(job)
        self._decoded(decoding, [1] * len(decoding))

    def _tokens_of(self, pieces: Sequence[tuple[Job, Ids]], decoding: Sequence[Job]) -> list[tuple[int, Ids]]:
        """What each row is fed: first the last tokens of those that are decoded."""
        last = [(self._rows.number(job), np.array(job.sequence.token_ids[-1:], np.int64)) for job in decoding]
        return last + [(self._rows.number(job), piece) for job, piece in pieces]

    def _fed(self, job: Job, count: int) -> None:
        """Note that a piece of a prompt has run; the first token is taken after the last one."""
        if job.sequence.finish_reason is None:
            job.sequence.snapshots.add_due(self._rows.state(job).cache)
            self._queue.charge(job, count)
            job.fed += count
            job.sequence.check_time()
        if job.sequence.finish_reason:
            self._tell(job)
        elif not job.remaining:
            self._start(job)

    def _start(self, job: Job) -> None:
        """Take the first token of a request whose prompt was fed, and of those next that have the same prompt."""
        ready = [job, *self._twins(job)]
        for each in ready:
            self._take(each)
            each.sequence.timing.prefill_seconds = each.lap()
        for each in ready:
            self._tell(each)
            if each.row is not None:
                self._rows.to_decoding(each)

    def _twins(self, job: Job) -> Iterator[Job]:
        """Those next in the queue that have the same prompt, in rows of their own with its keys, values and logits."""
        while not self._rows.is_full and (twin := self._queue.first()) is not None:
            if not twin.shares_adapter(job) or not np.array_equal(twin.sequence.prompt, job.sequence.prompt):
                return
            twin.sequence.begin(job.sequence)
            self._queue.take(twin)
            self._rows.enter(twin).copy_from(self._rows.state(job))
            twin.fed = twin.sequence.reused_tokens = len(twin.sequence.prompt)
            twin.since = job.since
            yield twin

    def _decode_ahead(self, decoding: Sequence[Job], planned: Sequence[Ahead]) -> None:
        """Choose the next token of each request, or several where its draft is right; `planned` is [] for only one."""
        taken = [1] * len(decoding)
        with failing(*decoding):
            if planned:
                taken = decode_together(self._batch, planned)
            else:
                taken = [decode(self._engine, self._rows.state(job), job.sequence) for job in decoding]
        for job, count in zip(decoding, taken, strict=True):
            self._queue.charge(job, count)
        self._decoded(decoding, taken)

    def _decoded(self, decoding: Sequence[Job], taken: Sequence[int]) -> None:
        """Note how long it took to decode so many tokens of each request, and tell of them."""
        laps = [job.lap() for job in decoding]
        for job, lap, count in zip(decoding, laps, taken, strict=True):
            job.sequence.timing.decode_seconds += lap
            job.sequence.timing.decode_steps += count
        if laps:
            self._pace.waited(min(laps))  # one that came back from a file has waited for longer
        for job in decoding:
            self._tell(job)

    def _take(self, job: Job) -> None:
        """Choose the next token of a request."""
        self._queue.charge(job, 1)
        if job.sequence.finish_reason is None:
            with failing(job):
                job.sequence.take_from(self._rows.state(job))

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
            self._undelivered.append((job, job.deliver, event))

    def _deliver(self) -> None:
        """Deliver events, of the step before if it was not the last: who gets them works while the graph runs."""
        for job, deliver, event in self._undelivered:
            with failing(job):
                deliver(event)
        self._undelivered.clear()

    def _leave(self, job: Job) -> None:
        """Let a request go that has ended, and close the gap among the rows that are decoded."""
        if job.row is None:
            self._queue.take(job)
        else:
            if job.sequence.error is None:
                self._prefix_cache.keep(job.sequence.fed, self._rows.state(job).cache)
            self._rows.free(job)
        job.sequence.end_drafts()
        self._queue.leave(job)
        with self._lock:
            del self._jobs[job.id]


@contextmanager
def failing(*jobs: Job) -> Iterator[None]:
    """An error in this context ends these requests, and no other."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - also one of a callback
        for job in jobs:
            job.sequence.fail(error)
