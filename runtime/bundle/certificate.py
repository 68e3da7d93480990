"""The certificate in a manifest: accuracy figures against the reference, and golden prompts to replay.

Data and standard library only, since reading any manifest imports it. `satchel.runtime.evaluation.certify` makes and
checks certificates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from satchel.runtime.bundle.strict_json import StrictJsonError

SATCHEL, ONNXRUNTIME = "satchel", "onnxruntime"
"""Whose kernels a certificate was measured with, by the names that `satchel specialize --kernels` takes."""


class Window:
    """Defaults of the evaluation, with which figures of different runs are comparable: tokens per window, the number of
    windows, and the positions at the start of a window that do not count because they have too little context."""

    LENGTH = 256
    WINDOWS = 16
    SKIP = 32


@dataclass(frozen=True)
class PhaseFidelity:
    """The accuracy of one phase against the reference, over all positions that count.

    `kl_mean`, `kl_median`, `kl_p90`, `kl_p999` (the 99.9th percentile) and `kl_max` are of KL(reference || bundle) in
    nats. `top1` is the share of positions where both have the same most likely token, `flips` the number of the others.
    `perplexity` is the bundle's on the text, `reference_perplexity` the reference's. Only `perplexity` is never None:
    the others need a reference. A certificate stores 5 significant digits and at most 9 decimals; certificates of
    earlier versions lack the last three.
    """

    kl_mean: float | None
    kl_median: float | None
    kl_p90: float | None
    top1: float | None
    perplexity: float
    reference_perplexity: float | None
    kl_p999: float | None = None
    kl_max: float | None = None
    flips: int | None = None


@dataclass(frozen=True)
class EvaluatedText:
    """The evaluated text: its file name, the SHA-256 of the file, and its number of tokens."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class Margin:
    """How far figures on another machine may differ from the recorded ones.

    A KL may exceed the recorded one by `kl_relative` times that plus `kl_absolute` nats. A greedy token may differ if
    its two best logits are less than `logit` apart on either machine.
    """

    kl_relative: float
    kl_absolute: float
    logit: float


@dataclass(frozen=True)
class GoldenPosition:
    """The reference's prediction of one token: its most likely ids in descending order, and their logits.

    `rest` is the log-sum-exp of all other logits: the softmax of (*logits, rest) is the prediction with all other
    tokens as one class. Values are rounded to 4 decimals, which changes a probability by at most 0.005 % of itself.
    """

    ids: tuple[int, ...]
    logits: tuple[float, ...]
    rest: float


@dataclass(frozen=True)
class GoldenPrompt:
    """The ids of a prompt and its continuation, and the results of the reference and of the bundle on them.

    `positions` are the reference's predictions after `ids` and after each token of `continuation` but the last; `kl`
    is the bundle's mean KL over them. `greedy_ids` is the bundle's own greedy continuation, which ignores EOS, and
    `gaps` are the differences of its two best logits.
    """

    ids: tuple[int, ...]
    continuation: tuple[int, ...]
    positions: tuple[GoldenPosition, ...]
    kl: float
    greedy_ids: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Prefill and decode speed in tokens per second on the exporting machine, for a prompt length and new tokens."""

    prompt_tokens: int
    new_tokens: int
    threads: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class Certificate:
    """The accuracy measured at export, the conditions of the measurement, and prompts to verify it on another machine.

    `prefill` and `decode` are over `windows` and `decode_windows` windows of `text` (None: random ids). A window has
    `window_tokens` tokens, of which the first `skip` do not count. `onnxruntime` (a version), `provider` and
    `processor` (a display name) are those of the measurement; `kernels` are those of the linear layers: SATCHEL, or
    ONNXRUNTIME for the portable graphs.
    """

    text: EvaluatedText | None
    windows: int
    decode_windows: int
    window_tokens: int
    skip: int
    prefill: PhaseFidelity
    decode: PhaseFidelity
    onnxruntime: str
    provider: str
    processor: str
    margin: Margin
    prompts: tuple[GoldenPrompt, ...]
    speed: Speed | None
    kernels: str = ONNXRUNTIME


def check_values(certificate: Certificate, vocabulary: int, max_context: int) -> None:
    """Check ids against the vocabulary, lengths of lists against each other, and that numbers are finite.

    Raises StrictJsonError, which names the key.
    """
    _check(len(certificate.prompts) > 0, "prompts", "[]", "a non-empty list")
    known = SATCHEL, ONNXRUNTIME
    _check(certificate.kernels in known, "kernels", certificate.kernels, " or ".join(known))
    for index, prompt in enumerate(certificate.prompts):
        key, steps = f"prompts[{index}]", len(prompt.continuation)
        for name in ("positions", "greedy_ids", "gaps"):
            found = len(getattr(prompt, name))
            _check(found == steps, f"{key}.{name}", found, f"{steps} entries, as many as continuation")
        fits = prompt.ids and steps and len(prompt.ids) + steps - 1 <= max_context
        _check(bool(fits), f"{key}.ids", len(prompt.ids), "ids that fit the context with their continuation")
        _check_ids(key, (*prompt.ids, *prompt.continuation, *prompt.greedy_ids), vocabulary)
        _check_finite(key, (prompt.kl, *prompt.gaps))
        for position in prompt.positions:
            paired = len(position.ids) == len(position.logits) < vocabulary
            _check(paired, f"{key}.positions", len(position.ids), "as many ids as logits, fewer than the vocabulary")
            _check_ids(f"{key}.positions", position.ids, vocabulary)
            _check_finite(f"{key}.positions", (*position.logits, position.rest))
    margin = certificate.margin
    _check_finite("margin", (margin.kl_relative, margin.kl_absolute, margin.logit))


def _check_ids(key: str, ids: tuple[int, ...], vocabulary: int) -> None:
    outside = [token for token in ids if not 0 <= token < vocabulary]
    _check(not outside, key, outside[:1], "token ids below model.vocab_size")


def _check_finite(key: str, values: tuple[float, ...]) -> None:
    infinite = [value for value in values if not math.isfinite(value)]
    _check(not infinite, key, infinite[:1], "finite numbers")


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise StrictJsonError(f"'certificate.{key}' must be {expected}, found {str(value)[:60]!r}")
