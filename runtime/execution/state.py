"""One sequence in flight: what the executors for all kinds of graphs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.execution.kv_cache import Cache

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
TopTokens = tuple[Ids, Logits]
"""The most likely tokens that a graph chose, most likely first: ids [k] and logits [k]."""


class State(ABC):
    """A row of a batch: the KV cache and the logits of one sequence.

    A state belongs to one thread at a time, which is that of its batch. States of different batches are independent.
    """

    def __init__(self, cache: Cache, logits: Logits) -> None:
        """`logits` [vocabulary] is the buffer to read logits into."""
        self.cache = cache
        self._logits = logits

    @property
    def logits(self) -> Logits:
        """Those of the last token, [vocabulary] float32: a buffer that the next step overwrites."""
        return self._logits

    def best(self, count: int) -> TopTokens | None:
        """At least the `count` most likely tokens of the last step, if the graph itself chose as many; else None."""
        return None

    def copy_from(self, other: State, start: int = 0) -> None:
        """Copy the sequence of `other` and its logits; the first `start` positions are the same already."""
        self.cache.copy_from(other.cache, other.cache.length, start)
        self._logits[:] = other.logits

    @abstractmethod
    def prefill(self, tokens: Ids) -> None:
        """Run the prefill graph on tokens of the vocabulary, one of the spans of `Engine.spans`.

        Raises PromptError if they do not fit the context, BundleError if the graph fails.
        """

    @abstractmethod
    def decode(self, token: int) -> None:
        """Run the decode graph on one token of the vocabulary.

        Raises PromptError if the context is full, BundleError if the graph fails.
        """
