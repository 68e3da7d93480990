"""Feeds a prompt: a cached prefix is copied, the rest runs through the prefill graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.prefix_cache import Prefix, PrefixCache, common_length
from satchel.runtime.generation.sequence import ActiveSequence

TAIL = 2  # prompt tokens that always run

Progress = Callable[[int], object]
"""Called with the number of prompt tokens done since its last call."""


def prefill(
    engine: Engine,
    state: State,
    sequence: ActiveSequence,
    prefix_cache: PrefixCache,
    live: Sequence[Prefix] = (),
    progress: Progress = lambda count: None,
) -> None:
    """Feed the prompt to an empty state as `feed` does, and take the first token unless the time limit is over."""
    start = time.perf_counter()
    sequence.begin()

    def is_over() -> bool:
        sequence.check_time()
        return sequence.finish_reason is not None

    sequence.reused_tokens = feed(engine, state, sequence.prompt, prefix_cache, live, progress, is_over)
    if sequence.finish_reason is None:
        sequence.take_from(state)
    sequence.timing.prefill_seconds = time.perf_counter() - start


def feed(
    engine: Engine,
    state: State,
    prompt: NDArray[np.int64],
    prefix_cache: PrefixCache,
    live: Sequence[Prefix] = (),
    progress: Progress = lambda count: None,
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    """Feed a prompt to an empty state, until `is_over`, which is called after each chunk. Returns the tokens reused.

    The longest prefix that `prefix_cache` or `live`, the other rows of a batch, shares with the prompt is copied. The
    last two tokens always run: the logits of the last one are needed, and some kernels round a single token differently
    (see `spans`). The number of tokens that are copied is a multiple of the manifest's `token_multiple`.
    """
    reused, cache = prefix_cache.longest(prompt)
    for prefix in live:
        common = common_length(prefix.ids, prompt)
        if common > reused:
            reused, cache = common, prefix.cache
    reused = min(reused, max(len(prompt) - TAIL, 0))
    reused -= reused % engine.bundle.manifest.token_multiple
    if cache is not None and reused:
        state.cache.copy_from(cache, reused)
        progress(reused)
    rest = prompt[reused:]
    for span in engine.spans(len(rest)):
        state.prefill(rest[span])
        progress(span.stop - span.start)
        if is_over():
            break
    return reused
