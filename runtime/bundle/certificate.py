"""What a bundle's manifest certifies of its answers: figures against the reference, and golden prompts to replay.

Data only, and standard library only, since every reader of a manifest loads it; `runtime/evaluation/certify.py` makes
and checks certificates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from satchel.runtime.bundle.strict_json import StrictJsonError


class Window:
    """The measure's defaults, which make figures of different runs comparable: tokens of a window, windows, and how
    many positions at a window's start do not count, for want of context."""

    LENGTH = 256
    WINDOWS = 16
    SKIP = 32


@dataclass(frozen=True)
class PhaseFidelity:
    """How far one phase's predictions are from the reference's, over all positions that count.

    `kl_mean`, `kl_median` and `kl_p90` are of KL(reference || bundle) in nats, `top1` is the share of positions where
    both find the same token most likely; all None without a reference. `perplexity` is that of the text's own next
    tokens, and `reference_perplexity` the reference's. A certificate has them in 5 significant digits, of at most 9
    decimals.
    """

    kl_mean: float | None
    kl_median: float | None
    kl_p90: float | None
    top1: float | None
    perplexity: float
    reference_perplexity: float | None


@dataclass(frozen=True)
class EvaluatedText:
    """The text that figures were taken on: its file name, the SHA-256 of the file, and the tokens in it."""

    name: str
    sha256: str
    tokens: int


@dataclass(frozen=True)
class Margin:
    """How far the figures of another machine may be from the recorded ones.

    A KL may be `kl_relative` times the recorded one and `kl_absolute` nats above it. A greedy token may be another
    where the two best logits are less than `logit` apart, on either machine.
    """

    kl_relative: float
    kl_absolute: float
    logit: float


@dataclass(frozen=True)
class GoldenPosition:
    """The reference's prediction of one token: its most likely ids, falling, and their logits.

    `rest` is the log-sum-exp of all other logits, so that the softmax of (*logits, rest) is the prediction with all
    other tokens as one class. Rounded to 4 decimals, which moves a probability by 0.005 % of itself at most.
    """

    ids: tuple[int, ...]
    logits: tuple[float, ...]
    rest: float


@dataclass(frozen=True)
class GoldenPrompt:
    """The beginning of a text, how it goes on, and what the bundle made of both where it was certified.

    `positions` are the reference's predictions after `ids` and after each token of `continuation` but the last; `kl`
    is the bundle's mean KL over them. `greedy_ids` is the bundle's own greedy continuation, which no end token stops,
    and `gaps` how far apart its two best logits were.
    """

    ids: tuple[int, ...]
    continuation: tuple[int, ...]
    positions: tuple[GoldenPosition, ...]
    kl: float
    greedy_ids: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Tokens per second of both phases where the bundle was made, for a prompt and a number of new tokens."""

    prompt_tokens: int
    new_tokens: int
    threads: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class Certificate:
    """What was measured when the bundle was made, on what, and what must be found again.

    `prefill` and `decode` are over `windows` and `decode_windows` windows of `text` (None: random ids) of
    `window_tokens` tokens, of which the first `skip` do not count. `onnxruntime` (a version), `provider` and
    `processor` (a name to read) are those of the machine that measured.
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


def check_values(certificate: Certificate, vocabulary: int, max_context: int) -> None:
    """Check what a certificate's types do not say: ids of the vocabulary, lists that belong together, finite numbers.

    Raises StrictJsonError naming the key.
    """
    _check(len(certificate.prompts) > 0, "prompts", "[]", "a list that is not empty")
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
