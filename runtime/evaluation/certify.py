"""Creates the certificate of a bundle, and checks it on another machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle.certificate import (
    Certificate,
    EvaluatedText,
    GoldenPosition,
    GoldenPrompt,
    Margin,
    PhaseFidelity,
    Window,
)
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.evaluation.fidelity import Reference, evaluate, log_softmax
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import Logits
from satchel.runtime.generation.sampling.greedy import greedy
from satchel.runtime.util.cpu import processor_name
from satchel.runtime.util.defaults import PROVIDER

NEW_TOKENS = 16  # in the continuation of a golden prompt
TOP = 16  # most likely ids recorded for a position
DECIMALS = 4  # of recorded logits
DIGITS, SMALLEST = 5, 9
"""Significant digits, and at most so many decimals, of recorded figures: beyond that is only the order of sums."""

MARGIN = Margin(kl_relative=0.5, kl_absolute=0.005, logit=0.5)
"""Wide enough for the kernels of another machine, too narrow for less accurate arithmetic.

Measured on SmolLM2-135M: float kernels that sum in another order change a KL by 1e-11 and a logit by 1e-4. int8 kernels
that quantize activations, compared with those that do not, on the same weights: the KL of a prompt is 0.0038 instead of
0.0008 with int8 weights, 1.1 times as large with int4 weights, and the root mean square change of a logit is 0.29. A
greedy token differs with a gap above `logit` on both sides only if the gap changes by twice that, almost three times
its usual change.
"""


@dataclass(frozen=True)
class Replay:
    """The results of a golden prompt on this machine: mean KL, greedy continuation, and its gaps as in the prompt."""

    kl: float
    greedy_ids: tuple[int, ...]
    gaps: tuple[float, ...]


def make_certificate(
    engine: Engine,
    reference: Reference,
    text: EvaluatedText | None,
    windows: Sequence[NDArray[np.int64]],
    prompts: Sequence[tuple[int, int, int]],
    *,
    skip: int = Window.SKIP,
    decode_windows: int | None = None,
    decode_rows: int = 1,
    provider: str = PROVIDER,
    margin: Margin = MARGIN,
    progress: Callable[[int], Any] = lambda tokens: None,
    together: int = 1,
    workers: int = 1,
) -> Certificate:
    """Measure a bundle against its reference, and record golden prompts that `check_certificate` replays.

    Args:
        engine: The bundle's engine, on `provider`.
        text: The text that `windows` were cut from; None for random ids.
        prompts: The golden prompts: index of a window, number of its first tokens that are the prompt, and number of
            tokens after those that are the continuation.
        decode_windows: Number of windows that decode is measured on; None for all.
        decode_rows: As in `evaluate`.
        progress: Called with the number of tokens of each finished window.
        together: As in `evaluate`.
        workers: As in `evaluate`; so many prompts, too, are measured at once.

    Raises:
        PromptError: There is no prompt, one exceeds its window, or a window does not fit the bundle.
        SatchelError: The reference has another vocabulary, or its logits are not finite.
        BundleError: The bundle's logits are not finite.
    """
    _check_prompts(prompts, windows)
    fidelity = evaluate(
        engine, windows, reference, skip=skip, decode_windows=decode_windows, decode_rows=decode_rows,
        progress=progress, together=together, workers=workers,
    )  # fmt: skip

    def golden(prompt: tuple[int, int, int]) -> GoldenPrompt:
        index, count, new = prompt
        return _golden_prompt(engine, reference, windows[index], count, new)

    with ThreadPoolExecutor(workers) as pool:
        replayed = tuple(pool.map(golden, prompts))
    return Certificate(
        text=text,
        windows=len(windows),
        decode_windows=len(windows) if decode_windows is None else min(decode_windows, len(windows)),
        window_tokens=max(len(window) for window in windows),
        skip=skip,
        prefill=_rounded_figures(fidelity.prefill),
        decode=_rounded_figures(fidelity.decode),
        onnxruntime=ort.__version__,
        provider=provider,
        processor=processor_name(),
        margin=margin,
        prompts=replayed,
        speed=None,
    )


def check_certificate(engine: Engine, certificate: Certificate) -> list[str]:
    """Replay the golden prompts. Returns a line for each figure outside its margin; an empty list if all match.

    Raises BundleError if a graph fails.
    """
    return mismatches(certificate, [replay(engine, prompt) for prompt in certificate.prompts])


def replay(engine: Engine, prompt: GoldenPrompt) -> Replay:
    """Measure the KL on a golden prompt and its continuation, then continue it greedily. Raises BundleError."""
    return _continue(engine, prompt.ids, prompt.continuation, prompt.positions)


def mismatches(certificate: Certificate, replays: Sequence[Replay]) -> list[str]:
    """A line for each figure of the replays that is outside the certificate's margins."""
    lines = []
    for number, (prompt, found) in enumerate(zip(certificate.prompts, replays, strict=True), start=1):
        lines += _kl_mismatch(f"prompt {number}", prompt.kl, found.kl, certificate.margin)
        lines += _token_mismatch(f"prompt {number}", prompt, found, certificate.margin)
    recorded, mean = mean_kl(certificate.prompts), mean_kl(replays)
    return lines + _kl_mismatch("all prompts", recorded, mean, certificate.margin)


def first_difference(prompt: GoldenPrompt, found: Replay) -> int | None:
    """The first position, from 0, at which the greedy tokens differ from the recorded ones; None if they are equal."""
    pairs = zip(prompt.greedy_ids, found.greedy_ids, strict=True)
    return next((step for step, (recorded, token) in enumerate(pairs) if recorded != token), None)


def gap_at(prompt: GoldenPrompt, found: Replay, step: int) -> float:
    """How far apart the two best logits were at a position: the smaller of the recorded and the found gap."""
    return min(prompt.gaps[step], found.gaps[step])


def mean_kl(prompts: Sequence[GoldenPrompt] | Sequence[Replay]) -> float:
    """The mean of the prompts' KL."""
    return float(np.mean([prompt.kl for prompt in prompts]))


def golden_position(logits: NDArray[np.float32], top: int = TOP) -> GoldenPosition:
    """The `top` most likely ids of logits [vocabulary], at most all but one, and all other ids as one class."""
    count = min(top, len(logits) - 1)
    likely = np.flatnonzero(logits >= np.partition(logits, -count)[-count])  # sorting all takes ten times as long
    best = likely[np.argsort(-logits[likely], kind="stable")][:count]
    return GoldenPosition(
        ids=tuple(int(token) for token in best),
        logits=tuple(round(float(logits[token]), DECIMALS) for token in best),
        rest=round(float(_log_sum_exp(np.delete(logits, best))), DECIMALS),
    )


def golden_kl(position: GoldenPosition, logits: NDArray[np.float32]) -> float:
    """KL(reference || logits) over the position's ids and all other tokens as one class, in nats.

    Merging classes never raises a KL, so this is at most that over the whole vocabulary. Raises BundleError for logits
    that are not finite.
    """
    if not np.isfinite(logits).all():
        raise BundleError("the bundle's logits are not finite: export it again, in another precision")
    ids = list(position.ids)
    others = np.delete(logits, ids)
    theirs = log_softmax(np.array([*position.logits, position.rest]))
    ours = log_softmax(np.array([*logits[ids].astype(np.float64), _log_sum_exp(others)]))
    return max(float((np.exp(theirs) * (theirs - ours)).sum()), 0.0)


def _check_prompts(prompts: Sequence[tuple[int, int, int]], windows: Sequence[NDArray[np.int64]]) -> None:
    if not prompts:
        raise PromptError("a certificate needs at least one golden prompt: give some")
    for index, count, new in prompts:
        if not (0 <= index < len(windows) and count > 0 < new and count + new <= len(windows[index])):
            raise PromptError(f"a golden prompt of {count} + {new} tokens is not in window {index}: give a smaller one")


def _golden_prompt(
    engine: Engine, reference: Reference, window: NDArray[np.int64], count: int, new: int
) -> GoldenPrompt:
    ids, continuation = (tuple(int(token) for token in part) for part in np.split(window[: count + new], [count]))
    positions = tuple(golden_position(row) for row in reference(window)[count - 1 : count + new - 1])
    found = _continue(engine, ids, continuation, positions)
    return GoldenPrompt(
        ids=ids,
        continuation=continuation,
        positions=positions,
        kl=_rounded(found.kl),
        greedy_ids=found.greedy_ids,
        gaps=tuple(_rounded(gap) for gap in found.gaps),
    )


def _continue(
    engine: Engine, ids: Sequence[int], continuation: Sequence[int], positions: Sequence[GoldenPosition]
) -> Replay:
    """Continue a prompt with the recorded text and greedily, in two rows that are decoded together if that is the same.

    The KL is the mean over the last position of the prompt, by prefill, and those of the recorded text, by decode. The
    greedy continuation is as long, and ignores EOS; a gap is the difference of the two best logits.
    """
    batch = engine.new_batch(2, len(ids) + len(continuation) - 1)
    recorded, greedily = batch.add(), batch.add()
    engine.prefill(recorded, ids)
    greedily.copy_from(recorded)
    divergences, gaps, tokens = list[float](), list[float](), list[int]()
    for step, position in enumerate(positions):
        if step:
            batch.decode([continuation[step - 1], tokens[-1]])
        divergences.append(golden_kl(position, recorded.logits))
        tokens.append(greedy(greedily.logits))
        gaps.append(_gap(greedily.logits))
    return Replay(float(np.mean(divergences)), tuple(tokens), tuple(gaps))


def _gap(logits: Logits) -> float:
    if len(logits) < 2:
        return 0.0
    second, best = np.partition(logits, -2)[-2:]
    return float(best) - float(second)


def _rounded(figure: float) -> float:
    return round(float(f"{figure:.{DIGITS}g}"), SMALLEST)


def _rounded_figures(figures: PhaseFidelity) -> PhaseFidelity:
    rounded = {name: _rounded(value) for name, value in vars(figures).items() if isinstance(value, float)}
    return dataclasses.replace(figures, **rounded)  # type: ignore[arg-type]


def _log_sum_exp(logits: NDArray[np.float32]) -> float:
    largest = float(logits.max())
    return largest + float(np.log(np.exp(logits.astype(np.float64) - largest).sum()))


def _kl_mismatch(name: str, recorded: float, found: float, margin: Margin) -> list[str]:
    allowed = recorded * (1 + margin.kl_relative) + margin.kl_absolute
    if found <= allowed:
        return []
    return [f"{name}: KL {found:.5f} where {recorded:.5f} was recorded and {allowed:.5f} is allowed"]


def _token_mismatch(name: str, prompt: GoldenPrompt, found: Replay, margin: Margin) -> list[str]:
    """After the first difference the two continue different texts, so only that one is compared."""
    step = first_difference(prompt, found)
    if step is None or gap_at(prompt, found, step) < margin.logit:
        return []
    return [
        f"{name}: new token {step + 1} is {found.greedy_ids[step]} (by {found.gaps[step]:.2f} logits) "
        f"where {prompt.greedy_ids[step]} (by {prompt.gaps[step]:.2f}) was recorded"
    ]
