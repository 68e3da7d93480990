"""The step layer: runs the graphs of a bundle over explicit state. It knows token ids and logits, not text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.dynamic import DynamicGraphs
from satchel.runtime.execution.experimental.captured import CapturedGraphs
from satchel.runtime.execution.experimental.static import StaticGraphs
from satchel.runtime.execution.kv_cache import Cache
from satchel.runtime.execution.state import Graphs, Logits, State
from satchel.runtime.ort.providers import ProviderChoice
from satchel.runtime.ort.session import SessionSettings
from satchel.runtime.util.defaults import PROVIDER

TokenIds = Sequence[int] | NDArray[np.int64]


class Engine:
    """The graphs of one bundle, opened. Threads may share it, each with states of its own."""

    def __init__(self, bundle: Bundle, settings: SessionSettings) -> None:
        """Open the graphs of prefill and decode, in one session where the manifest says so.

        Raises BundleError and ProviderError.
        """
        self.bundle = bundle
        self.vocabulary = bundle.manifest.model.vocab_size
        self.max_context = bundle.manifest.model.max_context
        self._graphs = _open(bundle, settings)
        self._found: dict[str, bool] = {}
        self._found_lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: Bundle,
        provider: str | ProviderChoice = PROVIDER,
        threads: int | None = None,
        *,
        verbose: bool = False,
    ) -> Engine:
        """Open an engine.

        `provider` is the name of an execution provider, or a choice with options; `threads` None means one per physical
        core, `verbose` shows ONNX Runtime's own log.
        """
        choice = ProviderChoice(provider) if isinstance(provider, str) else provider
        return cls(bundle, SessionSettings(choice, threads, verbose))

    @property
    def sessions(self) -> tuple[ort.InferenceSession, ...]:
        """Those that run prefill and decode: of dynamic graphs two, the same one twice where both phases share it."""
        return self._graphs.sessions

    @property
    def rows_need_turns(self) -> bool:
        """Whether the decode graph cannot run several sequences at once."""
        return self._graphs.rows_need_turns

    def new_state(self, capacity: int) -> State:
        """A state with room for `capacity` positions. Raises PromptError above the bundle's largest context."""
        return self.state_over(self.new_cache(capacity), np.zeros(self.vocabulary, np.float32))

    def new_cache(self, capacity: int, rows: int = 1) -> Cache:
        """A KV cache of `capacity` positions for each of `rows` sequences. Raises PromptError as `new_state` does."""
        self._check_capacity(capacity)
        cache: Cache = self._graphs.new_cache(capacity, rows)
        return cache

    def release(self, cache: Cache) -> None:
        """Take back the memory of a cache that nobody uses any more, for the next one."""
        self._graphs.release(cache)

    def state_over(self, cache: Cache, logits: Logits) -> State:
        """A state over a cache of one row and a buffer for logits, [vocabulary] float32."""
        return self._graphs.state(cache, logits)

    def spans(self, count: int, chunk: int | None = None) -> Iterator[slice]:
        """Spans that cover `count` tokens of a prompt, each for one run of a prefill graph; see `prefill`."""
        return self._graphs.spans(count, chunk)

    def prefill(self, state: State, ids: TokenIds, chunk: int | None = None) -> Logits:
        """Feed `ids` after what the state already holds, up to `chunk` at a time; None for what suits the graphs.

        Returns the logits of the last id, [vocabulary] float32: a buffer of the state that its next step overwrites.
        Raises PromptError when there is no id, one is outside the vocabulary, or they do not fit.
        """
        self.feed(state, ids, chunk)
        return state.logits

    def feed(self, state: State, ids: TokenIds, chunk: int | None = None) -> None:
        """As `prefill`, for who may not want the logits: `state` has them, or the best tokens, when asked."""
        tokens = self.check_ids(ids)
        _check_chunk(chunk)
        state.cache.require(len(tokens))
        for span in self._graphs.spans(len(tokens), chunk):
            state.feed(tokens[span])

    def decode(self, state: State, token: int) -> Logits:
        """Feed one token. Returns its logits, [vocabulary] float32: the same buffer as `prefill` returns.

        Raises PromptError when the token is outside the vocabulary or the context is full.
        """
        self.step(state, token)
        return state.logits

    def step(self, state: State, token: int) -> None:
        """As `decode`, for who may not want the logits: `state` has them, or the best tokens, when asked."""
        if not 0 <= token < self.vocabulary:
            raise PromptError(f"token id {token} is outside the vocabulary: use ids from 0 to {self.vocabulary - 1}")
        state.step(token)

    def score(self, ids: TokenIds, chunk: int | None = None) -> Logits:
        """The logits of every position of `ids`, [sequence, vocabulary] float32, through the score graph.

        That graph is opened on first use. Raises PromptError as `prefill` does.
        """
        tokens = self.check_ids(ids)
        _check_chunk(chunk)
        self._check_capacity(len(tokens))
        logits: Logits = np.empty((len(tokens), self.vocabulary), np.float32)
        self._graphs.score(tokens, chunk, logits)
        return logits

    def once(self, name: str, find: Callable[[], bool]) -> bool:
        """What `find` says, called the first time that this name is asked for."""
        with self._found_lock:
            if name not in self._found:
                self._found[name] = find()
            return self._found[name]

    def sessions_for(self, count: int | None) -> tuple[ort.InferenceSession, ...]:
        """Those that a span of `count` tokens of a prompt runs, in order; None: those of decode."""
        return self._graphs.sessions_for(count)

    def end_profiling(self) -> dict[ort.InferenceSession, Path]:
        """Write the profiles that `SessionSettings.profile` asked for, and record no more; the file of each session."""
        return {session: Path(session.end_profiling()) for session in dict.fromkeys(self.sessions)}

    def check_ids(self, ids: TokenIds) -> NDArray[np.int64]:
        """The ids as contiguous int64.

        Raises PromptError when there is none, they are no whole numbers in a row, or one is outside the vocabulary.
        """
        tokens = np.asarray(ids)
        if not tokens.size:
            raise PromptError("the prompt has no tokens: give at least one token to continue from")
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and not all(type(token) is int for token in ids)):
            raise PromptError("token ids must be whole numbers, one after the other: give a list of them")
        outside = [int(token) for token in tokens if not 0 <= token < self.vocabulary]
        if outside:
            raise PromptError(
                f"token id {outside[0]} is outside the vocabulary: use ids from 0 to {self.vocabulary - 1}"
            )
        return np.ascontiguousarray(tokens, np.int64)

    def _check_capacity(self, capacity: int) -> None:
        if not 1 <= capacity <= self.max_context:
            raise PromptError(
                f"a context of {capacity} positions is not possible: this bundle allows 1 to {self.max_context}: "
                "ask for fewer tokens"
            )


def _open(bundle: Bundle, settings: SessionSettings) -> Graphs[Any]:
    settings.provider.check()
    if bundle.manifest.static is not None:
        return StaticGraphs(bundle, settings)
    return DynamicGraphs(bundle, settings) if settings.provider.name == "cpu" else CapturedGraphs(bundle, settings)


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise PromptError(f"a chunk of {chunk} tokens is not possible: give at least 1")
