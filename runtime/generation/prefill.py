"""Feeds a prompt: what is known of it is copied, the rest runs through the prefill graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.prefix_cache import Prefix, PrefixCache, common_length
from satchel.runtime.generation.sequence import ActiveSequence

TAIL = 2  # tokens of a prompt that always run
PAIRED_BITS = 4

Progress = Callable[[int], object]
"""Hears how many tokens of a prompt are done since the last call."""


def prefill(
    engine: Engine,
    state: State,
    continuation: ActiveSequence,
    store: PrefixCache,
    live: Sequence[Prefix] = (),
    progress: Progress = lambda count: None,
) -> None:
    """Feed the prompt to an empty state, and take the first token unless the time limit is over before.

    What the prompt has in common with `store` and `live` is copied, as `feed` does.
    """
    start = time.perf_counter()
    continuation.begin()

    def is_over() -> bool:
        continuation.check_time()
        return continuation.finish_reason is not None

    continuation.reused_tokens = feed(engine, state, continuation.prompt, store, live, progress, is_over)
    if continuation.finish_reason is None:
        continuation.take_from(state)
    continuation.timing.prefill_seconds = time.perf_counter() - start


def feed(
    engine: Engine,
    state: State,
    prompt: NDArray[np.int64],
    store: PrefixCache,
    live: Sequence[Prefix] = (),
    progress: Progress = lambda count: None,
    is_over: Callable[[], bool] = lambda: False,
) -> int:
    """Feed a prompt to an empty state, until `is_over`, which is asked after each chunk. Returns the tokens reused.

    As many tokens as some prefix of `store` or of `live`, the rows beside this one, has in common with the prompt are
    copied from there. The last two tokens of a prompt always run: the logits of the last one are wanted, and one token
    alone is rounded otherwise by some kernels (see `chunks`). Over weights in 4 bits an even number of tokens is
    copied, since those products take tokens in pairs.
    """
    reused, cache = store.longest(prompt)
    for prefix in live:
        common = common_length(prefix.ids, prompt)
        if common > reused:
            reused, cache = common, prefix.cache
    reused = min(reused, max(len(prompt) - TAIL, 0))
    if any(layer.bits == PAIRED_BITS for layer in engine.bundle.manifest.layers.values()):
        reused -= reused % 2
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
