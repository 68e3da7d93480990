"""Sampling filters on one row of logits: pure functions, in the order in which they apply.

`adjusted` runs first, for greedy decoding too: repetition penalty, presence and frequency penalty, no repeated n-gram,
no early end, bias. `narrowed` prepares the draw: temperature, top-k, top-p, min-p, typical-p. The order is that of
transformers, since each step sees what the previous one left: top-p counts its mass among the tokens of top-k, after
the temperature. The one exception is the bias, which transformers adds first: here it comes last of the adjustments, so
that no penalty scales it.

Each function takes logits [vocabulary] of any float type and returns a new float64 array, in which -inf marks a token
that cannot be chosen. None changes its input. Narrowing keeps at least one token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.sampling.options import SamplingOptions
from satchel.runtime.generation.sampling.table import BY_FIELD

Row = NDArray[np.float64]
Logits = NDArray[np.floating[Any]]
Ids = NDArray[np.int64]

HIGHEST = float(np.finfo(np.float64).max)

_ADJUSTING = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "min_new_tokens",
    "logit_bias",
)  # fmt: skip


def adjusts(options: SamplingOptions) -> bool:
    """Whether `adjusted` has any effect with these options."""
    return any(options.differs(field) for field in _ADJUSTING)


def adjusted(logits: Logits, options: SamplingOptions, ids: Ids, prompt_tokens: int, end_tokens: Ids) -> Row:
    """Logits after the penalties, bans and bias of `options`.

    `ids` are those of the prompt, `prompt_tokens` of them, and of the new text. Raises PromptError if no token is left
    to choose from.
    """
    row = logits.astype(np.float64)
    generated = ids[prompt_tokens:]
    if options.repetition_penalty != 1:
        row = repetition_penalty(row, ids, options.repetition_penalty)
    if options.presence_penalty or options.frequency_penalty:
        row = count_penalties(row, generated, options.presence_penalty, options.frequency_penalty)
    if options.no_repeat_ngram_size:
        row = no_repeat_ngram(row, ids, options.no_repeat_ngram_size)
    if len(generated) < options.min_new_tokens:
        row = ban(row, end_tokens)
    if options.logit_bias:
        row = logit_bias(row, options.logit_bias)
    if row.max() == -np.inf:
        flags = " and ".join(BY_FIELD[field].flag for field in _ADJUSTING if options.differs(field))
        raise PromptError(f"no token is left to choose from at step {len(generated)}: loosen {flags}")
    return row


def narrowed(logits: Logits, options: SamplingOptions) -> Row:
    """Logits to sample from: after the temperature, which must not be 0, and the filters."""
    row = temperature(logits, options.temperature)
    if options.top_k:
        row = top_k(row, options.top_k)
    if options.top_p < 1:
        row = top_p(row, options.top_p)
    if options.min_p:
        row = min_p(row, options.min_p)
    if options.typical_p < 1:
        row = typical_p(row, options.typical_p)
    return row


def repetition_penalty(logits: Logits, ids: Ids, penalty: float) -> Row:
    """Divide logits above 0 of tokens in `ids` by `penalty`, multiply the others by it; once per token.

    Keskar et al., CTRL, 2019, arXiv:1909.05858, with the sign taken into account as in transformers.
    """
    row = logits.astype(np.float64)
    seen = row[ids]
    with np.errstate(over="ignore"):
        row[ids] = np.minimum(np.where(seen < 0, seen * penalty, seen / penalty), HIGHEST)
    return row


def count_penalties(logits: Logits, generated: Ids, presence: float, frequency: float) -> Row:
    """Subtract `presence` from the logit of each token in the new text, and `frequency` for each occurrence.

    As defined by the API of OpenAI: the prompt does not count.
    """
    row = logits.astype(np.float64)
    tokens, counts = np.unique(generated, return_counts=True)
    row[tokens] -= presence + frequency * counts
    return row


def no_repeat_ngram(logits: Logits, ids: Ids, size: int) -> Row:
    """Ban every token that would repeat an n-gram of `size` tokens in `ids`, as transformers does."""
    row = logits.astype(np.float64)
    starts = np.arange(max(len(ids) - size + 1, 0))
    # From the last token of the n-gram's prefix, which few places share, to the first.
    for offset in range(size - 2, -1, -1):
        if not len(starts):
            break
        starts = starts[ids[starts + offset] == ids[len(ids) - size + 1 + offset]]
    row[ids[starts + size - 1]] = -np.inf
    return row


def ban(logits: Logits, ids: Ids) -> Row:
    """Ban the tokens `ids`: end tokens, before the minimum number of new tokens."""
    row = logits.astype(np.float64)
    row[ids] = -np.inf
    return row


def logit_bias(logits: Logits, bias: Mapping[int, float]) -> Row:
    """Add to the logit of each token its bias; -inf bans it."""
    row = logits.astype(np.float64)
    ids = np.fromiter(bias, np.int64, len(bias))
    with np.errstate(over="ignore"):
        row[ids] = np.minimum(row[ids] + np.fromiter(bias.values(), np.float64, len(bias)), HIGHEST)
    return row


def temperature(logits: Logits, value: float) -> Row:
    """Logits divided by a temperature above 0, and shifted so that the highest is 0, which avoids overflow."""
    row = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        row -= row.max()
        row /= value
    return row


def top_k(logits: Logits, count: int) -> Row:
    """Keep the `count` highest logits, and ties with the lowest of them, as transformers does."""
    row = logits.astype(np.float64)
    if count >= len(row):
        return row
    return np.where(row < np.partition(row, len(row) - count)[len(row) - count], -np.inf, row)


def top_p(logits: Logits, mass: float) -> Row:
    """Keep the fewest tokens, most likely first, with a total probability of at least `mass`; ties by lower id.

    Nucleus sampling: Holtzman et al., 2019, arXiv:1904.09751.
    """
    row = logits.astype(np.float64)
    kept = np.flatnonzero(row > -np.inf)
    weights = np.exp(row[kept] - row.max())
    total = weights.sum()
    # Tokens below this weight have less than 1 - mass in total, so only the others can be in the nucleus.
    # The most likely token has weight 1 and is always among them, however the mean is rounded.
    least = min((1 - mass) * total / len(kept), 1)
    falling = np.sort(weights[weights >= least])[::-1]
    count = min(int(np.searchsorted(np.cumsum(falling), mass * total)) + 1, len(falling))
    lowest = falling[count - 1]
    ties = np.flatnonzero(weights == lowest)[: count - np.count_nonzero(falling > lowest)]
    return _only(row, np.concatenate([kept[weights > lowest], kept[ties]]))


def min_p(logits: Logits, share: float) -> Row:
    """Keep the tokens at least `share` times as likely as the most likely one.

    Nguyen et al., 2024, arXiv:2407.01082.
    """
    row = logits.astype(np.float64)
    return np.where(row < row.max() + math.log(share), -np.inf, row) if share > 0 else row


def typical_p(logits: Logits, mass: float) -> Row:
    """Keep the fewest tokens, those with information closest to the entropy first, with at least `mass` in total.

    Ties with the last of them are kept too. Meister et al., 2022, arXiv:2202.00666.
    """
    row = logits.astype(np.float64)
    kept = np.flatnonzero(row > -np.inf)
    shifted = row[kept] - row.max()
    weights = np.exp(shifted)
    total = weights.sum()
    probabilities = weights / total
    information = math.log(total) - shifted
    distance = np.abs(information - probabilities @ information)
    return _only(row, kept[distance <= _distance_of(distance, probabilities, mass)])


def _distance_of(distance: Row, probabilities: Row, mass: float) -> float:
    """The smallest distance within which the probability is at least `mass`; sorts as little as possible."""
    count = 256
    while count < len(distance):
        bound = np.partition(distance, count)[count]
        near = np.flatnonzero(distance <= bound)
        if probabilities[near].sum() >= mass:
            break
        count *= 8
    else:
        near = np.arange(len(distance))
    order = near[np.argsort(distance[near])]
    place = int(np.searchsorted(np.cumsum(probabilities[order]), mass))
    return float(distance[order[min(place, len(order) - 1)]])


def _only(row: Row, ids: NDArray[np.int64]) -> Row:
    result = np.full_like(row, -np.inf)
    result[ids] = row[ids]
    return result
