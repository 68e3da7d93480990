"""What all kinds of graphs have in common: a state, which steps take further, and what makes states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.execution.kv_cache import Cache

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]

CacheKind = TypeVar("CacheKind", bound=Cache)


class Best(NamedTuple):
    """The most likely tokens as a graph chose them, most likely first: `ids` [k] int64, `logits` [k] float32."""

    ids: Ids
    logits: Logits


class State(ABC):
    """One sequence in the making: its KV cache, its buffers, and bindings to each graph that are kept across steps.

    A state belongs to one thread at a time; different states are independent.
    """

    def __init__(self, cache: Cache, logits: Logits) -> None:
        """`logits` [vocabulary] is the buffer to read logits into."""
        self._cache = cache
        self._logits = logits

    @property
    def cache(self) -> Cache:
        """The keys and values of what was fed."""
        return self._cache

    @property
    def logits(self) -> Logits:
        """Those of the last token fed, [vocabulary] float32: a buffer that the next step overwrites."""
        return self._logits

    def best(self, count: int) -> Best | None:
        """At least the `count` most likely tokens of the last step, where the graph itself chose as many; else None."""
        return None

    def hold(self, other: State, start: int = 0) -> None:
        """Hold what `other` holds, of which the first `start` positions are the same already, and its logits."""
        self._cache.copy_from(other.cache, other.cache.length, start)
        self._logits[:] = other.logits

    @abstractmethod
    def feed(self, tokens: Ids) -> None:
        """Run the prefill graph on a span of tokens that fits, as `Graphs.spans` gives them."""

    @abstractmethod
    def step(self, token: int) -> None:
        """Run the decode graph on one token. Raises PromptError where the context is full."""


class Graphs(ABC, Generic[CacheKind]):
    """The open graphs of a bundle. Threads may share them, each with states of its own."""

    @property
    @abstractmethod
    def sessions(self) -> tuple[ort.InferenceSession, ...]:
        """Those that run prefill and decode."""

    @abstractmethod
    def sessions_for(self, count: int | None) -> tuple[ort.InferenceSession, ...]:
        """Those that a span of `count` tokens of a prompt runs, in order; None: those of decode."""

    @property
    def rows_need_turns(self) -> bool:
        """Whether the decode graph cannot run several sequences at once."""
        return True

    @abstractmethod
    def new_cache(self, capacity: int, rows: int = 1) -> CacheKind:
        """An empty cache; of one sequence where rows need turns. Raises PromptError where there is no memory for it."""

    @abstractmethod
    def release(self, cache: Cache) -> None:
        """Take back the memory of a cache that nobody uses any more."""

    @abstractmethod
    def state(self, cache: CacheKind, logits: Logits) -> State:
        """A state over a cache that this made, and a buffer for logits, [vocabulary] float32."""

    @abstractmethod
    def spans(self, count: int, chunk: int | None) -> Iterator[slice]:
        """Spans that cover `count` tokens, each for one `State.feed`: of up to `chunk`, or as it suits the graphs."""

    @abstractmethod
    def score(self, tokens: Ids, chunk: int | None, logits: Logits) -> None:
        """Write the logits of every token, [tokens, vocabulary], by the score graph, which is opened on first use."""
