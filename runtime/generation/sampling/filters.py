"""Sampling filters on one row of logits: pure functions, in the order in which they apply.

`adjusted` runs first, for greedy decoding too: penalties, banned and forced tokens, no early end, bias. `narrowed`
prepares the draw: temperature, top-h, top-k, top-p, min-p, typical-p, epsilon and eta cutoff. The order is that of
transformers, since each step sees what the previous one left: top-p counts its mass among the tokens of top-k, after
the temperature. The one exception is `logit_bias`, which comes last of the adjustments, so that no penalty scales it;
transformers has it as `sequence_bias` of single tokens, which comes first here too.

Each function takes logits [vocabulary] of any float type and returns a new float64 array, in which -inf marks a token
that cannot be chosen. None changes its input. Narrowing keeps at least one token.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
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
FLOAT32_MAX = float(np.finfo(np.float32).max)
TOP_H_TOKENS = 100

_ADJUSTING = (
    "sequence_bias", "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "logit_bias", "renormalize_logits",
)  # fmt: skip


EARLY_END = ("min_length", "min_new_tokens")
"""The adjustments that ban end tokens and leave all other logits as they are."""


def adjusts(options: SamplingOptions, besides: Collection[str] = ()) -> bool:
    """Whether `adjusted` has any effect with these options, those of `besides` left out."""
    return any(options.differs(field) for field in _ADJUSTING if field not in besides)


def adjusted(
    logits: Logits, options: SamplingOptions, ids: Ids, prompt_tokens: int, end_tokens: Ids, limit: int | None = None
) -> Row:
    """Logits after the penalties, bans and bias of `options`.

    `ids` are those of the prompt, `prompt_tokens` of them, and of the new text, which has `limit` tokens at most.
    Raises PromptError if no token is left to choose from.
    """
    row = _penalized(logits.astype(np.float64), options, ids, prompt_tokens, end_tokens)
    new = len(ids) - prompt_tokens
    if len(ids) == 1 and options.forced_bos_token_id is not None:
        row = forced(row, (options.forced_bos_token_id,))
    if options.forced_eos_token_id is not None and limit is not None and new == limit - 1:
        row = forced(row, options.forced_eos_token_id)
    if options.remove_invalid_values:
        row = np.nan_to_num(row, nan=0.0, posinf=FLOAT32_MAX, neginf=-FLOAT32_MAX)
    if options.exponential_decay_length_penalty is not None:
        start, factor = options.exponential_decay_length_penalty
        if new > start:
            row = decay(row, end_tokens, factor, new - start)
    if options.suppress_tokens:
        row = ban(row, np.asarray(options.suppress_tokens, np.int64))
    # A forced first token is followed by the one that counts as the first.
    first = 1 if prompt_tokens == 1 and options.forced_bos_token_id is not None else 0
    if options.begin_suppress_tokens and new == first:
        row = ban(row, np.asarray(options.begin_suppress_tokens, np.int64))
    if options.logit_bias:
        row = logit_bias(row, options.logit_bias)
    if row.max() == -np.inf:
        flags = " and ".join(BY_FIELD[field].flag for field in _ADJUSTING if options.differs(field))
        raise PromptError(f"no token is left to choose from at step {new}: loosen {flags}")
    return log_softmax(row) if options.renormalize_logits else row


def _penalized(row: Row, options: SamplingOptions, ids: Ids, prompt_tokens: int, end_tokens: Ids) -> Row:
    """The first of the adjustments, up to the bans of early ends."""
    generated = ids[prompt_tokens:]
    if options.sequence_bias:
        row = sequence_bias(row, ids, options.sequence_bias)
    if options.repetition_penalty != 1:
        row = repetition_penalty(row, ids, options.repetition_penalty)
    if options.presence_penalty or options.frequency_penalty:
        row = count_penalties(row, generated, options.presence_penalty, options.frequency_penalty)
    if options.no_repeat_ngram_size:
        row = no_repeat_ngram(row, ids, options.no_repeat_ngram_size)
    if options.bad_words_ids:
        # As in transformers, an end token alone does not count as a bad word.
        words = [word for word in options.bad_words_ids if len(word) > 1 or word[0] not in end_tokens]
        row = sequence_bias(row, ids, [(word, -np.inf) for word in words])
    if len(ids) < options.min_length or len(generated) < options.min_new_tokens:
        row = ban(row, end_tokens)
    return row


def narrowed(logits: Logits, options: SamplingOptions) -> Row:
    """Logits to sample from: after the temperature, which must not be 0, and the filters."""
    row = temperature(logits, options.temperature)
    if options.top_h:
        row = top_h(row, options.top_h)
    if options.top_k:
        row = top_k(row, options.top_k)
    if options.top_p < 1:
        row = top_p(row, options.top_p)
    if options.min_p:
        row = min_p(row, options.min_p)
    if options.typical_p < 1:
        row = typical_p(row, options.typical_p)
    if options.epsilon_cutoff:
        row = epsilon_cutoff(row, options.epsilon_cutoff)
    if options.eta_cutoff:
        row = eta_cutoff(row, options.eta_cutoff)
    return row


def sequence_bias(logits: Logits, ids: Ids, biases: Iterable[tuple[tuple[int, ...], float]]) -> Row:
    """Add each bias to the last token of its sequence, where the others of the sequence are the last of `ids`.

    As transformers does, a sequence of several tokens counts only once the text is as long.
    """
    row = logits.astype(np.float64)
    for sequence, bias in biases:
        before = sequence[:-1]
        if len(sequence) == 1 or (len(sequence) <= len(ids) and tuple(ids[len(ids) - len(before) :]) == before):
            row[sequence[-1]] += bias
    return row


def forced(logits: Logits, tokens: Sequence[int]) -> Row:
    """0 for these tokens, and -inf for all others."""
    row = np.full(len(logits), -np.inf)
    row[list(tokens)] = 0.0
    return row


def decay(logits: Logits, end_tokens: Ids, factor: float, steps: int) -> Row:
    """Raise the logit x of each end token by |x| * (factor**steps - 1), as transformers does."""
    row = logits.astype(np.float64)
    ends = row[end_tokens]
    with np.errstate(over="ignore"):
        grown = ends + np.abs(ends) * (np.float64(factor) ** steps - 1)
    row[end_tokens] = np.where(np.isnan(grown), ends, np.minimum(grown, HIGHEST))
    return row


def log_softmax(logits: Logits) -> Row:
    """The logarithms of the probabilities."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= math.log(np.exp(row).sum())
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


def top_h(logits: Logits, share: float) -> Row:
    """Keep the most likely tokens while their part of the entropy of the 100 most likely is at most `share`.

    Baghaei Potraghloo et al., 2025, arXiv:2509.02510, with the cap of transformers.
    """
    row = logits.astype(np.float64)
    order = np.argsort(-row, kind="stable")[:TOP_H_TOKENS]
    order = order[row[order] > -np.inf]
    logs = log_softmax(row[order])
    terms = -np.exp(logs) * logs
    kept = np.cumsum(terms) <= terms.sum() * share
    kept[0] = True
    return _only(row, order[kept])


def epsilon_cutoff(logits: Logits, least: float) -> Row:
    """Keep the tokens with a probability of at least `least`, and the most likely one.

    Hewitt et al., 2022, arXiv:2210.15191.
    """
    row = logits.astype(np.float64)
    return np.where((np.exp(log_softmax(row)) < least) & (row < row.max()), -np.inf, row)


def eta_cutoff(logits: Logits, epsilon: float) -> Row:
    """As `epsilon_cutoff`, with min(epsilon, sqrt(epsilon) * exp(-entropy)) as the bound. Same source."""
    logs = log_softmax(logits)
    finite = logs[logs > -np.inf]
    entropy = -float(np.exp(finite) @ finite)
    return epsilon_cutoff(logits, min(epsilon, math.sqrt(epsilon) * math.exp(-entropy)))


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
