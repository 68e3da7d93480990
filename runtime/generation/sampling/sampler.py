"""Chooses the tokens of one sequence: filters over its history, and a draw of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.generation.sampling.filters import Row, adjusted, adjusts, narrowed
from satchel.runtime.generation.sampling.finite import most_likely
from satchel.runtime.generation.sampling.options import SamplingOptions

Best = tuple[NDArray[np.int64], NDArray[np.float32]]
"""The most likely tokens, most likely first: ids [k] and logits [k]."""


class Sampler:
    """Chooses one token after the other, and remembers them for the penalties.

    Sequences of one seed differ by `row`: each draws from a stream of its own, so a text depends neither on what else
    is in a batch nor on the number of threads. Without a seed the operating system gives one. A sampler belongs to one
    thread at a time.
    """

    def __init__(
        self,
        options: SamplingOptions,
        end_tokens: Collection[int],
        vocabulary: int,
        prompt_ids: Sequence[int] | NDArray[np.int64],
        row: int = 0,
    ) -> None:
        """Begin after the prompt, whose ids lie in the vocabulary. Raises PromptError for wrong options."""
        options.check(vocabulary=vocabulary)
        self.options = options
        # A model can name an end token beyond its logits: it is never chosen, so nothing has to ban it.
        self._end_tokens = np.array([token for token in end_tokens if 0 <= token < vocabulary], np.int64)
        self._adjusts = adjusts(options)
        # How many of the most likely tokens tell the choice; 0 for all.
        self._enough = 1 if options.greedy else options.top_k + 1 if options.top_k else 0
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
        """The next token, from logits [vocabulary], which stay as they are.

        Raises BundleError for logits that are not finite, PromptError when the options leave no token.
        """
        token = check_finite(logits, self.step)
        if self._adjusts or self._random is not None:
            token = self._filtered(logits)
        return self._remember(token)

    def choose_best(self, best: Callable[[int], Best | None]) -> int | None:
        """The next token from the most likely ones alone, the one that `choose` would take; None where it needs all.

        `best` gives at least so many of the most likely tokens, or None. Greedy takes one of them, top-k the k that it
        draws from and the one behind, which tells that none of those left out is as likely as the last. Raises
        BundleError as `choose`.
        """
        if self._adjusts or not self._enough or (found := best(self._enough)) is None:
            return None
        ids, logits = found
        if not np.isfinite(logits[0]):
            return None  # `choose` says what is wrong with all of them
        if self._random is None:
            return self._remember(int(ids[0]))
        count = self._enough - 1
        if not logits[count] < logits[count - 1]:
            return None
        order = np.argsort(ids[:count])  # a draw goes by the order of ids
        return self._remember(int(ids[order[draw(narrowed(logits[order], self.options), self._random.random())]]))

    def fork(self, row: int) -> Self:
        """An independent copy with the history so far that draws as `row` does from its beginning.

        Forks of a sampler without a seed share the seed that it got.
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

    def _filtered(self, logits: NDArray[np.float32]) -> int:
        row: NDArray[np.floating[Any]] = logits
        if self._adjusts:
            ids = self._ids[: self._length]
            row = adjusted(logits, self.options, ids, self._prompt_tokens, self._end_tokens)
        if self._random is None:
            return int(row.argmax())
        return draw(narrowed(row, self.options), self._random.random())

    def _stream(self, row: int) -> np.random.Generator | None:
        if self._entropy is None:
            return None
        # PCG64 by name: the default of numpy may change, and with it what a seed gives.
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self._entropy, spawn_key=(row,))))


def draw(row: Row, uniform: float) -> int:
    """The token where the cumulated probabilities of `row` [vocabulary], in order of id, pass `uniform`.

    `uniform` is at least 0 and at most 1 - 2**-53, as numpy draws it.
    """
    kept = np.flatnonzero(row > -np.inf)
    cumulated = np.cumsum(np.exp(row[kept] - row.max()))
    # The sum is 1 or more and the number at most 1 - 2**-53, so their product is always rounded to less than the sum.
    return int(kept[np.searchsorted(cumulated, uniform * cumulated[-1], side="right")])


def check_finite(logits: NDArray[np.float32], step: int) -> int:
    """The most likely token of logits [vocabulary]; finding it is the check.

    Raises BundleError naming the step (0 is the prompt's) and the token when there is NaN, +inf, or nothing but -inf.
    """
    return most_likely(logits, f"the logits of step {step}")
