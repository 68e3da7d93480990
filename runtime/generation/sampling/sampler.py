"""Chooses the tokens of one sequence: filters that use its history, and its own random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.generation.sampling.filters import EARLY_END, Row, adjusted, adjusts, narrowed
from satchel.runtime.generation.sampling.finite import most_likely
from satchel.runtime.generation.sampling.options import SamplingOptions

BLOCK = 256  # tokens whose probabilities are added before a token is looked for among them

Best = tuple[NDArray[np.int64], NDArray[np.float32]]
"""The most likely tokens, most likely first: ids [k] and logits [k]."""


class Sampler:
    """Chooses one token after another, and remembers them for the penalties.

    Sequences with the same seed differ by `row`: each has its own random stream, so a text depends neither on what else
    is in a batch nor on the number of threads. Without a seed the operating system provides one. A sampler belongs to
    one thread at a time.
    """

    def __init__(
        self,
        options: SamplingOptions,
        end_tokens: Collection[int],
        vocabulary: int,
        prompt_ids: Sequence[int] | NDArray[np.int64],
        row: int = 0,
        limit: int | None = None,
    ) -> None:
        """Start after the prompt, whose ids are in the vocabulary; `limit` is the maximum number of new tokens.

        Raises PromptError for wrong options.
        """
        options.check(vocabulary=vocabulary)
        self.options = options
        # A model can name an end token beyond its logits, which can never be chosen.
        self._end_tokens = np.array([token for token in end_tokens if 0 <= token < vocabulary], np.int64)
        self._adjusts = adjusts(options)
        self._bans_only_ends = options.greedy and not adjusts(options, EARLY_END)
        # How many of the most likely tokens are enough to choose; 0 for all.
        self._enough = 1 if options.greedy else options.top_k + 1 if options.top_k and not options.top_h else 0
        self._limit = limit
        self._prompt_tokens = self._length = len(prompt_ids)
        self._ids = np.empty(self._length + 64, np.int64)
        self._ids[: self._length] = prompt_ids
        self._entropy = None if options.greedy else np.random.SeedSequence(options.seed).entropy
        self._random = self._stream(row)

    @property
    def step(self) -> int:
        """The number of tokens chosen so far; step 0 is the choice after the prompt."""
        return self._length - self._prompt_tokens

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits [vocabulary], which are not changed.

        Raises BundleError for logits that are not finite, PromptError if the options leave no token.
        """
        token = 0 if self.options.remove_invalid_values else check_finite(logits, self.step)
        if self._random is not None or not self._stands(token):
            token = self._filtered(logits)
        return self._remember(token)

    def choose_best(self, best: Callable[[int], Best | None]) -> int | None:
        """The next token from the most likely ones alone, the same as from `choose`; None if those are not enough.

        `best` returns at least so many of the most likely tokens, or None. Greedy needs one; top-k needs the k that it
        samples from and one more, which shows that there is no tie at the end. Raises BundleError as `choose`.
        """
        if not self._enough or (found := best(self._enough)) is None:
            return None
        ids, logits = found
        if not np.isfinite(logits[0]) or not self._stands(int(ids[0])):
            return None  # `choose` finds out what is wrong, or adjusts all logits
        if self._random is None:
            return self._remember(int(ids[0]))
        count = self._enough - 1
        if not logits[count] < logits[count - 1]:
            return None
        order = np.argsort(ids[:count])  # `draw` depends on the order of ids
        return self._remember(int(ids[order[draw(narrowed(logits[order], self.options), self._random.random())]]))

    def coming(self, count: int) -> list[float]:
        """The next `count` random numbers, which stay the next ones; none if this is greedy."""
        return [] if self._random is None else copy.deepcopy(self._random).random(count).tolist()

    def drawn(self, logits: NDArray[np.float32], uniform: float) -> int:
        """The token that `uniform` draws from any logits, regardless of penalties; nothing is remembered."""
        return draw(narrowed(logits, self.options), uniform)

    def fork(self, row: int) -> Self:
        """An independent copy with the history so far and the random stream of `row`, from its start.

        Forks of a sampler without a seed share the seed that the system provided.
        """
        other = copy.copy(self)
        other._ids = self._ids.copy()
        other._random = other._stream(row)
        return other

    def _remember(self, token: int) -> int:
        if self._length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[self._length] = token
        self._length += 1
        return token

    def _stands(self, token: int) -> bool:
        """Whether the most likely token stays the most likely one when the logits are adjusted."""
        return not self._adjusts or (self._bans_only_ends and token not in self._end_tokens)

    def _filtered(self, logits: NDArray[np.float32]) -> int:
        row: NDArray[np.floating[Any]] = logits
        if self._adjusts:
            ids = self._ids[: self._length]
            row = adjusted(logits, self.options, ids, self._prompt_tokens, self._end_tokens, self._limit)
        if self._random is None:
            return int(row.argmax())
        return draw(narrowed(row, self.options), self._random.random())

    def _stream(self, row: int) -> np.random.Generator | None:
        if self._entropy is None:
            return None
        # PCG64 by name: the default of numpy may change, and with it the result of a seed.
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self._entropy, spawn_key=(row,))))


def draw(row: Row, uniform: float) -> int:
    """The token where the cumulative probabilities of `row` [vocabulary], in order of id, exceed `uniform`.

    `uniform` is at least 0 and at most 1 - 2**-53, as numpy draws it. `row` is overwritten: with a second array of its
    size, memory would go back to the operating system at each token, and be had again.
    """
    if highest := row.max():  # 0 after a temperature
        row -= highest
    weights = np.exp(row, out=row)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))  # only one block's are added one by one
    cumulated = np.cumsum(sums)
    # The sum is at least 1 and the number at most 1 - 2**-53, so their product always rounds to less than the sum.
    target = uniform * cumulated[-1]
    block = int(np.searchsorted(cumulated, target, side="right"))
    if block:
        target -= cumulated[block - 1]
    inner = np.cumsum(weights[block * BLOCK :][:BLOCK])
    # Added in another order, the sum of the block may be a little less: the last token that has a probability then.
    target = min(target, np.nextafter(inner[-1], 0))
    return block * BLOCK + int(np.searchsorted(inner, target, side="right"))


def check_finite(logits: NDArray[np.float32], step: int) -> int:
    """The most likely token of logits [vocabulary].

    Raises BundleError naming the step (0 is the prompt's) and the token for NaN, +inf, or nothing but -inf.
    """
    return most_likely(logits, f"the logits of step {step}")
