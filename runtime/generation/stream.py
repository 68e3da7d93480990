"""The text of one prompt in pieces, as they come."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.prefill import Progress, prefill
from satchel.runtime.generation.prefix_cache import PrefixCache
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sequence import ActiveSequence


class TokenStream:
    """The generated text in pieces: an iterator of non-empty strings, and a context manager that frees the KV cache.

    Leaving it early is safe. It belongs to one thread at a time. Without a tokenizer there are no pieces.
    """

    def __init__(
        self, engine: Engine, continuation: ActiveSequence, store: PrefixCache, progress: Progress = lambda count: None
    ) -> None:
        """Allocate the KV cache; `progress` hears of prefill. Raises PromptError."""
        self._engine = engine
        self._continuation = continuation
        self._store = store
        self._progress = progress
        self._state: State | None = engine.new_state(continuation.positions)
        self._kv_bytes = self._state.cache.nbytes
        self._shown = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while self._shown == len(self._continuation.pieces):
            if self._state is None or self._continuation.finish_reason:
                self.close()
                if self._shown == len(self._continuation.pieces):
                    raise StopIteration
                break
            try:
                self._step(self._state)
            except BaseException as error:
                if isinstance(error, Exception):  # what the cache holds may be wrong; an interrupt leaves it right
                    self._state = None
                self.close()
                raise
        piece = "".join(self._continuation.pieces[self._shown :])
        self._shown = len(self._continuation.pieces)
        return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream, keep what it knows for prompts that begin alike, and free its KV cache."""
        state, self._state = self._state, None
        self._continuation.close()
        if state is not None:
            self._store.keep(self._continuation.fed, state.cache)
            self._engine.release(state.cache)

    def result(self) -> Generation:
        """Run what is left of the stream, if anything, and sum it up."""
        for _ in self:
            pass
        return Generation.of(self._continuation, self._kv_bytes)

    def _step(self, state: State) -> None:
        continuation = self._continuation
        if not state.cache.length:
            prefill(self._engine, state, continuation, self._store, progress=self._progress)
            return
        start = time.perf_counter()
        state.decode(continuation.token_ids[-1])
        continuation.take_from(state)
        continuation.timing.decode_seconds += time.perf_counter() - start
        continuation.timing.decode_steps += 1
