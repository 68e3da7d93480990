"""One sequence in flight: what the executors for all kinds of graphs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.execution.kv_cache import Cache, Snapshot

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
TopTokens = tuple[Ids, Logits]
"""The most likely tokens that a graph chose, most likely first: ids [k] and logits [k]."""


class State(ABC):
    """A row of a batch: the KV cache and the logits of one sequence.

    A state belongs to one thread at a time, which is that of its batch. States of different batches are independent.

    Where the rotary angles depend on the length of the text, the state remembers its tokens: when the text grows beyond
    the border, they are fed again with the other angles, as in transformers' `generate`.
    """

    def __init__(self, cache: Cache, logits: Logits) -> None:
        """`logits` [vocabulary] is the buffer to read logits into."""
        self.cache = cache
        self._logits = logits
        self._border: int | None = None
        self._fed: Ids = np.empty(0, np.int64)
        self._before: Snapshot = {}  # the states before a run ahead
        self._spans: Callable[[int], Iterator[slice]] = lambda count: iter(())

    def watch(self, border: int, spans: Callable[[int], Iterator[slice]]) -> None:
        """Feed the text again where it grows beyond `border` tokens, in the given spans of a prompt."""
        self._border, self._spans = border, spans
        self._fed = np.empty(self.cache.capacity, np.int64)

    def expect(self, length: int) -> None:
        """Make ready for a text of `length` tokens, those that are here included: all get the angles of that length.

        To be called before the first span of a prompt. Raises what `prefill` raises.
        """
        if self._border is None or self.cache.long or length <= self._border:
            return
        self.cache.require(length - self.cache.length)
        fed = self._fed[: self.cache.length].copy()
        self.cache.clear(self.cache.adapter)
        self.cache.long = True
        for span in self._spans(len(fed)):
            self.prefill(fed[span])

    def resume(self, ids: Ids, cache: Cache) -> None:
        """Begin with `ids`, whose keys and values `cache` has in its first positions."""
        self.cache.copy_from(cache, len(ids))
        self._note(0, ids)

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
        self.cache.behind = other.cache.behind
        self._logits[:] = other.logits
        self._note(0, other._fed[: other.cache.length])

    def prefill(self, tokens: Ids) -> None:
        """Run the prefill graph on tokens of the vocabulary, one of the spans of `Engine.spans`.

        Raises PromptError if they do not fit the context, BundleError if the graph fails.
        """
        start = self.cache.length
        self._prefill(tokens)
        self._note(start, tokens)

    def decode(self, token: int) -> None:
        """Run the decode graph on one token of the vocabulary.

        Raises PromptError if the context is full, BundleError if the graph fails.
        """
        self.expect(self.cache.length + 1)
        self._decode(token)
        self.note(token)

    def begin_ahead(self) -> None:
        """Keep the states as they are, for `keep_ahead`; to be called before `decode_ahead`."""
        self._before = {name: state.copy() for name, state in self.cache.states.items()}

    def decode_ahead(self, tokens: Ids) -> Logits:
        """Feed tokens. Returns the logits of each, [tokens, vocabulary], those of `decode` of one after another."""
        found = np.empty((len(tokens), len(self._logits)), np.float32)
        for row, token in zip(found, tokens.tolist(), strict=True):
            self.decode(token)
            row[:] = self.logits
        return found

    def keep_ahead(self, length: int, tokens: Ids, count: int) -> None:
        """After a run ahead of `tokens` that began at `length`, keep the first `count` of them and forget the others.

        States cannot go back: those before the run are restored, and what is kept is fed again before the next token.
        """
        if not self.cache.states:
            self.cache.shorten(length + count)
        elif self._before and count < len(tokens):
            self.cache.restore(self._before, length, tokens[:count].tolist())
        self._before = {}

    def note(self, token: int) -> None:
        """Remember the token of a step that has just run."""
        if self._border is not None:
            self._fed[self.cache.length - 1] = token

    def _note(self, start: int, tokens: Ids) -> None:
        if self._border is not None:
            self._fed[start : start + len(tokens)] = tokens

    @abstractmethod
    def _prefill(self, tokens: Ids) -> None:
        """As `prefill`, for one kind of graphs."""

    @abstractmethod
    def _decode(self, token: int) -> None:
        """As `decode`, for one kind of graphs."""
