"""Measures an engine: a warm-up, then timed runs of prefill and greedy decode on random ids."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.batch import Batch
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.sampling.greedy import greedy
from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.generation.speculation import Speculation, decode
from satchel.runtime.util.memory import peak_rss_mib, pss_mib

LOWEST_ID = 100  # ids below are often special tokens
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Workload:
    """Prompt tokens and decode steps of each of `batch` sequences; prompt ids are drawn below `vocabulary`.

    All have `adapter`; None is the base model.
    """

    prompt_tokens: int
    new_tokens: int
    vocabulary: int
    batch: int = 1
    adapter: str | None = None


@dataclass(frozen=True)
class Run:
    """One timed run: `prefill` and `decode` in tokens per second over all sequences, `ttft` in seconds.

    `ttft`, the time to first token, ends when every sequence has chosen its first token. Of the tokens `drafted`, those
    `accepted` were right.
    """

    prefill: float
    ttft: float
    decode: float
    drafted: float = 0.0
    accepted: float = 0.0


@dataclass(frozen=True)
class Figures:
    """`prefill` and `decode` in tokens per second, `load` and `ttft` in seconds, memory in MiB.

    `rss_mb` is the peak resident set size of the process, `pss_mb` its current proportional set size; None where the
    system does not report it.
    """

    prefill: float
    decode: float
    load: float
    rss_mb: float | None
    pss_mb: float | None
    ttft: float


@dataclass(frozen=True)
class Summary:
    """The median run, figure by figure, and the lowest and highest of each figure."""

    median: Run
    lowest: Run
    highest: Run


def check_workload(workload: Workload, manifest: Manifest) -> None:
    """Raise PromptError for a workload that does not fit the bundle. Opens and runs nothing."""
    model = manifest.model
    if workload.prompt_tokens < 1 or workload.new_tokens < 1:
        raise PromptError("--prompt-tokens and --new-tokens must be 1 or more")
    if not LOWEST_ID < workload.vocabulary <= model.vocab_size:
        raise PromptError(
            f"--vocabulary {workload.vocabulary}: must be from {LOWEST_ID + 1} to the bundle's {model.vocab_size}"
        )
    positions = workload.prompt_tokens + workload.new_tokens
    if positions > model.max_context:
        raise PromptError(
            f"{workload.prompt_tokens} prompt tokens and {workload.new_tokens} new ones: a context of {positions} "
            f"positions is not possible: this bundle allows 1 to {model.max_context}: ask for fewer tokens"
        )
    if workload.batch < 1:
        raise PromptError(f"--batch {workload.batch}: must be 1 or more")


def measure(engine: Engine, workload: Workload, load: float) -> Figures:
    """Time one run after a warm-up. `load`, in seconds, is passed on. Raises PromptError as `check_workload`."""
    check_workload(workload, engine.bundle.manifest)
    warm_up(engine, workload)
    run = timed_run(engine, workload)
    return Figures(run.prefill, run.decode, load, peak_rss_mib(), pss_mib(), run.ttft)


def warm_up(engine: Engine, workload: Workload) -> None:
    """Run a few prompt tokens and one decode step, untimed. The workload must have been checked."""
    tokens = min(WARM_UP_TOKENS, workload.prompt_tokens)
    warm = _Sequences(engine, workload, tokens + 1)
    warm.decode(warm.choose(warm.prefill(_prompt_ids(workload)[..., :tokens])))


def timed_run(engine: Engine, workload: Workload, speculation: Speculation | None = None) -> Run:
    """Time one run on a fresh KV cache. The workload must have been checked.

    Prefill is timed until the first token is chosen, decode over `new_tokens` steps that each choose the most likely
    token. Prompt ids come from a fixed seed; EOS is ignored. `speculation` drafts tokens of a single sequence.
    """
    ids = _prompt_ids(workload)
    if speculation is not None:
        return _speculative_run(engine, ids, workload, speculation)
    sequences = _Sequences(engine, workload, workload.prompt_tokens + workload.new_tokens)
    prefill, decode, choose = sequences.prefill, sequences.decode, sequences.choose
    start = time.perf_counter()
    token = choose(prefill(ids))
    ttft = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(workload.new_tokens):
        token = choose(decode(token))
    decoding = time.perf_counter() - start
    return Run(ids.size / ttft, ttft, workload.batch * workload.new_tokens / decoding)


def _speculative_run(engine: Engine, ids: NDArray[np.int64], workload: Workload, speculation: Speculation) -> Run:
    count = workload.new_tokens + 1  # the first one comes from prefill
    options = GenerationOptions(max_new_tokens=count, adapter=workload.adapter)
    sequence = ActiveSequence(ids, options, count, greedy, (), None)
    state = engine.new_state(sequence.positions, workload.adapter)
    sequence.drafter = speculation.drafter(sequence, None)
    start = time.perf_counter()
    sequence.take(engine.prefill(state, ids))
    ttft = time.perf_counter() - start
    start = time.perf_counter()
    while sequence.finish_reason is None:
        decode(engine, state, sequence)
    decoding = time.perf_counter() - start
    sequence.end_drafts()
    timing = sequence.timing
    return Run(ids.size / ttft, ttft, workload.new_tokens / decoding, timing.drafted, timing.accepted)


def summarize(runs: Sequence[Run]) -> Summary:
    """The median, the lowest and the highest of each figure of at least one run."""

    def each(choose: Callable[[Sequence[float]], Any]) -> Run:
        names = [field.name for field in dataclasses.fields(Run)]
        return Run(**{name: float(choose([getattr(run, name) for run in runs])) for name in names})

    return Summary(each(np.median), each(min), each(max))


class _Sequences:
    """`prefill`, `decode` and `choose` of one or several sequences over fresh caches, as in generation."""

    def __init__(self, engine: Engine, workload: Workload, capacity: int) -> None:
        self.prefill: Callable[[NDArray[np.int64]], NDArray[np.float32]]
        self.decode: Callable[[Any], NDArray[np.float32]]
        self.choose: Callable[[NDArray[np.float32]], Any]
        if workload.batch == 1:
            state = engine.new_state(capacity, workload.adapter)
            self.prefill, self.decode = partial(engine.prefill, state), partial(engine.decode, state)
            self.choose = greedy
        else:
            rows = engine.new_batch(workload.batch, capacity)
            self.prefill = partial(_prefill_rows, engine, rows, workload.adapter)
            self.decode = partial(_decode_rows, rows)
            self.choose = _greedy_rows


def _prefill_rows(engine: Engine, rows: Batch, adapter: str | None, prompts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Prefill prompts [rows, count] one after another. Returns the logits of their last tokens, [rows, vocabulary]."""
    return np.stack([engine.prefill(rows.add(adapter), prompt) for prompt in prompts])


def _decode_rows(rows: Batch, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Feed a token to each row; their logits, [rows, vocabulary]."""
    rows.decode(tokens)
    return rows.logits


def _greedy_rows(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The most likely token of each row of logits [rows, vocabulary]."""
    tokens: NDArray[np.int64] = logits.argmax(axis=-1)
    return tokens


def _prompt_ids(workload: Workload) -> NDArray[np.int64]:
    """Random ids from a fixed seed: [prompt_tokens], or [batch, prompt_tokens] for several sequences.

    Not numpy's generator: it loads libraries that the runner does not need, which would count as memory.
    """
    draw, count = random.Random(0).randrange, workload.batch * workload.prompt_tokens
    ids = np.asarray([draw(LOWEST_ID, workload.vocabulary) for _ in range(count)], np.int64)
    return ids if workload.batch == 1 else ids.reshape(workload.batch, workload.prompt_tokens)
