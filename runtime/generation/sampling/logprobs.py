"""Log-probabilities of tokens and of the most likely alternatives, as the model gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.sampling.finite import most_likely


@dataclass(frozen=True)
class TokenLogprob:
    """A token, the natural logarithm of its probability, and the most likely tokens at its place with theirs.

    `top` is sorted by probability, ties by lower id; the token itself need not be in it.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_probabilities(logits: NDArray[np.float32], token: int, top_n: int) -> TokenLogprob:
    """The log-probability of `token` under raw logits [vocabulary], and the `top_n` highest ones.

    A log-softmax in float64, before any sampling option. Raises BundleError for logits that are
    not finite, PromptError for a token outside the vocabulary or a negative `top_n`.
    """
    return _at(logits, token, top_n, "the logits")


def prompt_log_probabilities(
    logits: NDArray[np.float32], ids: Sequence[int] | NDArray[np.int64], top_n: int
) -> list[TokenLogprob | None]:
    """The log-probability of each prompt token given those before it, from the score graph's [sequence, vocabulary].

    The first token has none. Raises as `log_probabilities`, and PromptError for logits of another
    number of tokens.
    """
    if len(logits) != len(ids):
        raise PromptError(f"there are logits of {len(logits)} tokens for a prompt of {len(ids)}: score the same prompt")
    after = (_at(logits[i], int(ids[i + 1]), top_n, f"the logits of prompt position {i}") for i in range(len(ids) - 1))
    return [None, *after] if len(ids) else []


def _at(logits: NDArray[np.float32], token: int, top_n: int, name: str) -> TokenLogprob:
    if top_n < 0:
        raise PromptError(f"the {top_n} most likely tokens were asked for: give 0 or more")
    if not 0 <= token < len(logits):
        raise PromptError(f"token id {token} is outside the vocabulary: use ids from 0 to {len(logits) - 1}")
    row = logits.astype(np.float64)
    row -= row[most_likely(logits, name)]
    row -= math.log(np.exp(row).sum())
    return TokenLogprob(token, float(row[token]), _top(row, min(top_n, len(row))))


def _top(row: NDArray[np.float64], count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    # Ties with the last one are candidates too, so that lower ids win.
    candidates = np.flatnonzero(row >= np.partition(row, len(row) - count)[len(row) - count])
    best = candidates[np.argsort(-row[candidates], kind="stable")][:count]
    return tuple((int(token), float(row[token])) for token in best)
