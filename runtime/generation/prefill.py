"""Feeds a prompt: a cached prefix is copied, the rest runs through the prefill graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.prefix_cache import Prefix, PrefixCache
from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.generation.snapshots import NO_SNAPSHOTS, Snapshots

TAIL = 2  # prompt tokens that always run

Progress = Callable[[int], object]
"""Called with the number of prompt tokens done since its last call."""


def prefill(
    engine: Engine,
    state: State,
    sequence: ActiveSequence,
    prefix_cache: PrefixCache,
    progress: Progress = lambda count: None,
) -> None:
    """Feed the prompt to an empty state as `feed` does, and take the first token unless the time limit is over."""
    start = time.perf_counter()
    sequence.begin()

    def is_over() -> bool:
        sequence.check_time()
        return sequence.finish_reason is not None

    sequence.reused_tokens = feed(engine, state, sequence.prompt, prefix_cache, progress, is_over, sequence.snapshots)
    if sequence.finish_reason is None:
        sequence.take_from(state)
    sequence.timing.prefill_seconds = time.perf_counter() - start


def feed(
    engine: Engine,
    state: State,
    prompt: NDArray[np.int64],
    prefix_cache: PrefixCache,
    progress: Progress = lambda count: None,
    is_over: Callable[[], bool] = lambda: False,
    snapshots: Snapshots = NO_SNAPSHOTS,
) -> int:
    """Feed a prompt to an empty state, until `is_over`, which is called after each chunk. Returns the tokens reused.

    The longest prefix that `prefix_cache` shares with the prompt is copied.
    """
    reused = copy_prefix(engine, state, prompt, prefix_cache, snapshots=snapshots)
    if reused:
        progress(reused)
    while state.cache.length < len(prompt):
        progress(feed_piece(engine, state, prompt, snapshots=snapshots))
        if is_over():
            break
    return reused


def copy_prefix(
    engine: Engine,
    state: State,
    prompt: NDArray[np.int64],
    prefix_cache: PrefixCache,
    live: Sequence[Prefix] = (),
    snapshots: Snapshots = NO_SNAPSHOTS,
) -> int:
    """Copy the longest prefix that `prefix_cache` or `live`, the rows beside, shares with a prompt. Returns its length.

    Only those count that have the rotary angles of the prompt's length, which the state then has too.
    The last two tokens always run: the logits of the last one are needed, and some kernels round a single token
    differently (see `spans`). The number of tokens that are copied is a multiple of the manifest's `token_multiple`;
    with states it is a length that they are known of, and `feed_piece` makes up for the rest.
    """
    state.expect(len(prompt))
    most = max(len(prompt) - TAIL, 0)
    reused, cache = prefix_cache.longest(prompt, state.cache.adapter, most)
    for prefix in live:
        common = prefix.common(prompt[:most], state.cache.kind)
        if common > reused:
            reused, cache = common, prefix.cache
    if not state.cache.states:
        reused -= reused % engine.bundle.manifest.token_multiple
    if cache is None or not reused:
        return 0
    state.resume(prompt[:reused], cache)
    snapshots.add(state.cache)
    return reused


def feed_piece(engine: Engine, state: State, prompt: NDArray[np.int64], snapshots: Snapshots = NO_SNAPSHOTS) -> int:
    """Feed the next span of a prompt. Returns its length."""
    piece = next_piece(engine, state.cache.length, prompt, None, snapshots)
    state.prefill(piece)
    snapshots.add_due(state.cache)
    return len(piece)


def next_piece(
    engine: Engine, start: int, prompt: NDArray[np.int64], size: int | None, snapshots: Snapshots = NO_SNAPSHOTS
) -> NDArray[np.int64]:
    """The span of a prompt that is fed after its first `start` tokens, of up to `size`; None: of what suits the graphs.

    It ends where a snapshot is due, and at a multiple of `token_multiple` if it does not begin at one.
    """
    over = -start % engine.bundle.manifest.token_multiple
    rest = prompt[start : start + over] if over else prompt[start : snapshots.end(start, len(prompt))]
    return rest[next(iter(engine.spans(len(rest), size)))]
