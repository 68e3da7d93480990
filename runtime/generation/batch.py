"""Continuous batching: a row takes the next prompt as soon as its sequence has ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from satchel.runtime.errors import SatchelError
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.prefill import prefill
from satchel.runtime.generation.prefix_cache import Prefix, PrefixCache
from satchel.runtime.generation.sequence import ActiveSequence


def run_batch(
    engine: Engine, rows: Batch, sequences: Iterable[ActiveSequence], prefix_cache: PrefixCache
) -> Iterator[ActiveSequence]:
    """Run sequences, up to `len(rows.states)` at a time, and yield each when it has ended.

    A sequence is taken from the iterable when a row is free for it. A user-correctable error ends one sequence, which
    keeps it as `error`, and no other. Raises BundleError if a step of several rows fails.
    """
    waiting = iter(sequences)
    active: list[ActiveSequence] = []
    while True:
        while not rows.full and (following := next(waiting, None)) is not None:
            _start(engine, rows, following, active, prefix_cache)
            active.append(following)
            yield from _drop_ended(rows, active, prefix_cache)
        if not active:
            return
        _step(rows, active)
        yield from _drop_ended(rows, active, prefix_cache)


def run_samples(
    engine: Engine, rows: Batch, sequences: Sequence[ActiveSequence], prefix_cache: PrefixCache
) -> Iterator[ActiveSequence]:
    """Run sequences of one prompt, which is prefilled once, each in its row. Yields each when it has ended.

    Raises what choosing the first token raises.
    """
    first, *others = sequences
    active = [first]
    for other in others:
        other.begin()  # no later than the first: if its time is over before the prompt is fed, so is theirs
    prefill(engine, rows.add(), first, prefix_cache)
    for row, other in enumerate(others, start=1):
        rows.add()
        rows.copy(0, row)
        other.reused_tokens = rows.states[row].cache.length
        other.check_time()
        if other.finish_reason is None:
            other.take_from(rows.states[row])
        active.append(other)
    yield from _drop_ended(rows, active, prefix_cache)
    while active:
        _step(rows, active)
        yield from _drop_ended(rows, active, prefix_cache)


def _start(
    engine: Engine, rows: Batch, sequence: ActiveSequence, active: Sequence[ActiveSequence], prefix_cache: PrefixCache
) -> None:
    in_use = zip(active, rows.states, strict=False)
    live = [Prefix(beside.fed[: state.cache.length], state.cache) for beside, state in in_use]
    state = rows.add()
    if sequence.finish_reason:
        return
    try:
        prefill(engine, state, sequence, prefix_cache, live)
    except SatchelError as error:
        sequence.fail(error)


def _step(rows: Batch, active: Sequence[ActiveSequence]) -> None:
    """Feed each row its last token, and choose the next one."""
    start = time.perf_counter()
    rows.decode([sequence.token_ids[-1] for sequence in active])
    for sequence, state in zip(active, rows.states, strict=False):
        _take(sequence, state)
    seconds = time.perf_counter() - start
    for sequence in active:
        sequence.timing.decode_seconds += seconds
        sequence.timing.decode_steps += 1


def _take(sequence: ActiveSequence, state: State) -> None:
    try:
        sequence.take_from(state)
    except SatchelError as error:
        sequence.fail(error)


def _drop_ended(rows: Batch, active: list[ActiveSequence], prefix_cache: PrefixCache) -> Iterator[ActiveSequence]:
    """Free the rows of sequences that have ended, and yield those; `active` is in the order of the rows."""
    for row in reversed(range(len(active))):
        sequence = active[row]
        if sequence.finish_reason is None:
            continue
        if sequence.error is None:
            prefix_cache.keep(sequence.fed, rows.states[row].cache)
        rows.drop(row)
        active[row] = active[-1]
        active.pop()
        yield sequence
