"""Measures an engine: one warm-up, then one timed run of prefill and greedy decode on random ids."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from satchel.runtime.engine import Engine
from satchel.runtime.errors import PromptError
from satchel.runtime.memory import peak_rss_mib, pss_mib
from satchel.runtime.token_stream import greedy

LOWEST_ID = 100  # ids below are often special tokens
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Workload:
    """How many prompt tokens, how many decode steps, and the bound below which prompt ids are drawn."""

    prompt_tokens: int
    new_tokens: int
    vocabulary: int


@dataclass(frozen=True)
class Figures:
    """`prefill` and `decode` in tokens per second, `load` in seconds, `rss_mb` (peak) and `pss_mb` (now) in MiB."""

    prefill: float
    decode: float
    load: float
    rss_mb: float
    pss_mb: float


def measure(engine: Engine, workload: Workload, load: float) -> Figures:
    """Time one run after a warm-up; `load` (seconds) is passed on.

    Prefill is timed until the first token is chosen, decode over `new_tokens` steps that each choose the most likely
    token. Prompt ids come from a fixed seed; no end token stops the run. Raises PromptError for a workload that does
    not fit the bundle.
    """
    prompt_tokens, new_tokens = workload.prompt_tokens, workload.new_tokens
    if prompt_tokens < 1 or new_tokens < 1:
        raise PromptError("--prompt-tokens and --new-tokens must be 1 or more")
    if not LOWEST_ID < workload.vocabulary <= engine.vocabulary:
        raise PromptError(
            f"--vocabulary {workload.vocabulary}: must be from {LOWEST_ID + 1} to the bundle's {engine.vocabulary}"
        )
    ids = np.random.default_rng(0).integers(LOWEST_ID, workload.vocabulary, prompt_tokens)
    state = engine.new_state(prompt_tokens + new_tokens)
    warm = engine.new_state(min(WARM_UP_TOKENS, prompt_tokens) + 1)
    engine.decode(warm, greedy(engine.prefill(warm, ids[:WARM_UP_TOKENS])))
    del warm

    start = time.perf_counter()
    token = greedy(engine.prefill(state, ids))
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new_tokens):
        token = greedy(engine.decode(state, token))
    decode = time.perf_counter() - start
    return Figures(prompt_tokens / prefill, new_tokens / decode, load, peak_rss_mib(), pss_mib())
