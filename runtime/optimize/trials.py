"""Checks the logits of specialized graphs, and times which kernels are the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import RunAhead, Specialized
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, SatchelError
from satchel.runtime.evaluation.certify import check_certificate
from satchel.runtime.execution.engine import Engine, open_engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.speculation import WIDTHS
from satchel.runtime.ort.session import SessionSettings

TIMED_TOKENS, TIMED_RUNS = 512, 5
FEWEST_RUNS, TIMED_SECONDS = 3, 10
TIMED_PROMPT, TIMED_STEPS, TIMED_ROUNDS = 16, 8, 4
NEW_TOKENS = 128
"""Satchel's own kernels are compared by the time for a prompt of `TIMED_TOKENS` and this many new tokens."""

ENOUGH_FASTER = 0.95
"""Forms that need more memory, attention without tiles or decode by groups, must take less than this share of the time.
"""

AHEAD_LENGTHS, AHEAD_RUNS = (5, 40, 75), 3
"""Tokens before a run of several tokens, and how often each is timed."""

CHECKED_TOKENS = 8
TOLERANCE = 1e-3
"""Max difference from the logits of the portable graphs, as a share of the largest one, with the same kernels."""

ROUNDED_TOLERANCE = 0.5
"""The same where weights or activations are rounded differently: it detects a wrong graph; the certificate checks the
accuracy.
"""


def check(portable: Bundle, specialized: Bundle, settings: SessionSettings) -> None:
    """Raise SatchelError unless the logits of the specialized graphs are right."""
    certificate, made = portable.manifest.certificate, specialized.specialized
    if made is None:
        raise ValueError("there are no specialized graphs")
    prefill = TOLERANCE if made.variant("prefill") is None else ROUNDED_TOLERANCE
    # Decode reads the KV cache that prefill wrote.
    decode = TOLERANCE if not made.variants else ROUNDED_TOLERANCE
    compare(portable, specialized, settings, (prefill, decode), lean=settings.lean)
    if decode > TOLERANCE and certificate is not None and portable.manifest.rank is None:
        lines = check_certificate(open_engine(specialized, settings), certificate)
        if lines:
            used = " and ".join(made.variants)
            own = any(portable.manifest.variant(name).kernel_abi is not None for name in made.variants)
            remedy = "with --kernels onnxruntime" if own else "with --layout stored"
            raise SatchelError(
                f"{portable.folder}: {used} is less accurate than the certificate allows ({lines[0]}): "
                f"nothing was changed; specialize it {remedy}"
            )


def compare(
    portable: Bundle, specialized: Bundle, settings: SessionSettings, tolerances: tuple[float, float], *, lean: bool
) -> None:
    """Raise SatchelError unless both bundles give the same logits for a few tokens, in prefill and in decode.

    `tolerances` are those of prefill and decode, as shares of the largest logit. `lean` opens the portable graphs with
    weights as they are stored: sooner, and their kernels round otherwise.
    """
    expected = _logits(portable, replace(settings, lean=lean))
    found = _logits(specialized, settings)
    for wanted, given, tolerance in zip(expected, found, tolerances, strict=False):  # a context of 1 has no decode
        error = float(np.abs(given - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
        if not error <= tolerance:
            raise SatchelError(
                f"{portable.folder}: the specialized graphs differ from the portable ones by {error:.2g} of the "
                "largest logit: nothing was changed; report this, with the processor and the version of ONNX Runtime"
            )


def fastest(
    tiled: Bundle, native: Bundle | None, settings: SessionSettings, say: Callable[[str], object]
) -> Specialized:
    """The fastest of ONNX Runtime's kernels, with either of its attention kernels, and satchel's own kernels.

    Satchel's own are chosen if both phases together take less time with them. `say` is called with the timings.
    """
    made = tiled.specialized
    if made is None:
        raise ValueError("there are no specialized graphs")
    plain = replace(tiled, specialized=replace(made, tiled_attention=False))
    taken = prefill_seconds([tiled, plain, *([] if native is None else [native])], settings)
    is_plain = taken[1] < taken[0] * ENOUGH_FASTER
    kept = plain if is_plain else tiled
    if native is not None:
        prefills = taken[is_plain], taken[2]
        steps = step_seconds([kept, native], settings)
        theirs, own = (prefill + NEW_TOKENS * step for prefill, step in zip(prefills, steps, strict=True))
        name = "ONNX Runtime's" if theirs <= own else "satchel's own"
        theirs_ms, own_ms = (
            f"{1e3 * prefill:.0f} and {1e3 * step:.1f} ms" for prefill, step in zip(prefills, steps, strict=True)
        )
        say(
            f"prefill and a decode step take {theirs_ms} with ONNX Runtime's kernels, and {own_ms} with satchel's "
            f"own: keeping {name}"
        )
        kept = kept if theirs <= own else native
    if kept.specialized is None:
        raise ValueError("there are no specialized graphs")
    return kept.specialized


def runs_ahead(specialized: Bundle, settings: SessionSettings) -> tuple[RunAhead, ...]:
    """Which runs of several tokens of a sequence give the bits of single steps, and how long they take.

    Compared at several lengths; the number of threads does not matter. None where the bundle takes no such runs.
    """
    engine = open_engine(specialized, settings)
    if engine.why_not_ahead(None) is not None:
        return ()
    taken: dict[int, list[float]] = {drafted: [] for drafted in WIDTHS}
    for length in AHEAD_LENGTHS:
        fitting = [drafted for drafted in taken if length + drafted < engine.max_context]
        for drafted, steps in _compared(engine, length, fitting).items():
            if steps is None:
                del taken[drafted]
            else:
                taken[drafted].append(steps)
    return tuple(RunAhead(drafted, round(max(min(steps), 0.01), 3)) for drafted, steps in taken.items() if steps)


def _compared(engine: Engine, length: int, widths: Sequence[int]) -> dict[int, float | None]:
    """By the number of drafted tokens, the time of a run after `length` tokens, in single steps.

    None for one that fails or gives other logits than single steps.
    """
    if not widths:
        return {}
    ids = np.asarray([(13 * i + 1) % engine.vocabulary for i in range(length + max(widths) + 1)], np.int64)
    state, found = engine.new_state(len(ids)), dict[int, float | None]()
    engine.prefill(state, ids[:length])
    fed = ids[length:]
    state.begin_ahead()
    start = time.perf_counter()
    expected = State.decode_ahead(state, fed)
    single = (time.perf_counter() - start) / len(expected)
    state.keep_ahead(length, fed, 0)
    for drafted in widths:
        shares: list[float] = []
        for _ in range(AHEAD_RUNS):
            state.begin_ahead()
            start = time.perf_counter()
            fed = ids[length : length + drafted + 1]
            try:
                logits = state.decode_ahead(fed)
            except BundleError:  # its kernels do not take several tokens of one sequence
                shares = []
                break
            finally:
                state.keep_ahead(length, fed, 0)
            shares.append((time.perf_counter() - start) / single)
            if not np.array_equal(logits, expected[: drafted + 1]):
                shares = []
                break
        found[drafted] = float(np.median(shares)) if shares else None
    return found


def prefill_seconds(bundles: Sequence[Bundle], settings: SessionSettings) -> list[float]:
    """The median seconds of prefill with each bundle; runs are interleaved, and there are fewer if they take long."""
    model = bundles[0].manifest.model
    length = min(TIMED_TOKENS, model.max_context)
    ids = [(7 * i + 1) % model.vocab_size for i in range(length)]
    engines = [open_engine(bundle, settings) for bundle in bundles]
    times: list[list[float]] = [[] for _ in engines]
    begin = time.perf_counter()
    for run in range(TIMED_RUNS):
        if run >= FEWEST_RUNS and time.perf_counter() - begin > TIMED_SECONDS:
            break
        for engine, taken in zip(engines, times, strict=True):
            state = engine.new_state(length)
            start = time.perf_counter()
            engine.prefill(state, ids)
            taken.append(time.perf_counter() - start)
    return [float(np.median(taken)) for taken in times]


def _logits(bundle: Bundle, settings: SessionSettings) -> NDArray[np.float32]:
    engine = open_engine(bundle, settings)
    count = max(min(CHECKED_TOKENS, engine.max_context - 1), 1)
    ids = [(7 * i + 1) % engine.vocabulary for i in range(count)]
    state = engine.new_state(min(count + 1, engine.max_context))
    logits = [engine.prefill(state, ids).copy()]
    if state.cache.capacity > count:
        logits.append(engine.decode(state, ids[0]).copy())
    return np.stack(logits)


def step_seconds(bundles: Sequence[Bundle], settings: SessionSettings) -> list[float]:
    """The median seconds of a decode step with each bundle after a short prompt; steps are interleaved."""
    model = bundles[0].manifest.model
    prompt = min(TIMED_PROMPT, max(model.max_context // 2, 1))
    left = model.max_context - prompt
    rounds, steps = min(TIMED_ROUNDS, left), min(TIMED_STEPS, max(left // TIMED_ROUNDS, 1))
    ids = [(7 * i + 1) % model.vocab_size for i in range(prompt + rounds * steps)]
    engines = [open_engine(bundle, settings) for bundle in bundles]
    states = [engine.new_state(len(ids)) for engine in engines]
    times: list[list[float]] = [[] for _ in engines]
    for engine, state in zip(engines, states, strict=True):
        engine.prefill(state, ids[:prompt])
    for first in range(prompt, len(ids), steps):
        for engine, state, taken in zip(engines, states, times, strict=True):
            for token in ids[first : first + steps]:
                start = time.perf_counter()
                engine.decode(state, token)
                taken.append(time.perf_counter() - start)
    return [float(np.median(taken)) if taken else 0.0 for taken in times]
