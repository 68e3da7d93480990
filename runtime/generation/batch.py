"""Many prompts in one go: rows take the next prompt as soon as they are done with one."""

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
    engine: Engine, rows: Batch, continuations: Iterable[ActiveSequence], store: PrefixCache
) -> Iterator[ActiveSequence]:
    """Run continuations to their ends, up to `len(rows.states)` at a time, and give each when it has ended.

    A prompt is taken from the iterable when a row is free for it. An error that the user can mend ends one
    continuation, whose `error` then says so, and no other. Raises BundleError where a step of several rows fails.
    """
    waiting = iter(continuations)
    active: list[ActiveSequence] = []
    while True:
        while not rows.full and (following := next(waiting, None)) is not None:
            _start(engine, rows, following, active, store)
            active.append(following)
            yield from _drop_ended(rows, active, store)
        if not active:
            return
        _step(rows, active)
        yield from _drop_ended(rows, active, store)


def run_samples(
    engine: Engine, rows: Batch, continuations: Sequence[ActiveSequence], store: PrefixCache
) -> Iterator[ActiveSequence]:
    """Run continuations of one and the same prompt, which is prefilled once, to their ends. There is a row for each.

    Raises what the first token's choice raises.
    """
    first, *others = continuations
    active = [first]
    for other in others:
        other.begin()  # no later than the first: where its time is over before its prompt is fed, so is theirs
    prefill(engine, rows.add(), first, store)
    for row, other in enumerate(others, start=1):
        rows.add()
        rows.copy(0, row)
        other.reused_tokens = rows.states[row].cache.length
        other.check_time()
        if other.finish_reason is None:
            other.take_from(rows.states[row])
        active.append(other)
    yield from _drop_ended(rows, active, store)
    while active:
        _step(rows, active)
        yield from _drop_ended(rows, active, store)


def _start(
    engine: Engine, rows: Batch, continuation: ActiveSequence, active: Sequence[ActiveSequence], store: PrefixCache
) -> None:
    in_use = zip(active, rows.states, strict=False)
    live = [Prefix(beside.fed[: state.cache.length], state.cache) for beside, state in in_use]
    state = rows.add()
    if continuation.finish_reason:
        return
    try:
        prefill(engine, state, continuation, store, live)
    except SatchelError as error:
        continuation.fail(error)


def _step(rows: Batch, active: Sequence[ActiveSequence]) -> None:
    """Decode a token for every row; all of them have one to feed."""
    start = time.perf_counter()
    rows.decode([continuation.token_ids[-1] for continuation in active])
    for continuation, state in zip(active, rows.states, strict=False):
        _take(continuation, state)
    seconds = time.perf_counter() - start
    for continuation in active:
        continuation.timing.decode_seconds += seconds
        continuation.timing.decode_steps += 1


def _take(continuation: ActiveSequence, state: State) -> None:
    try:
        continuation.take_from(state)
    except SatchelError as error:
        continuation.fail(error)


def _drop_ended(rows: Batch, active: list[ActiveSequence], store: PrefixCache) -> Iterator[ActiveSequence]:
    """Let the rows of continuations that have ended go, and give those; `active` has the order of the rows."""
    for row in reversed(range(len(active))):
        continuation = active[row]
        if continuation.finish_reason is None:
            continue
        if continuation.error is None:
            store.keep(continuation.fed, rows.states[row].cache)
        rows.drop(row)
        active[row] = active[-1]
        active.pop()
        yield continuation
