"""Streams the text of one prompt."""

from __future__ import annotations

import time
from typing import Self

from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.prefill import Progress, prefill
from satchel.runtime.generation.prefix_cache import PrefixCache
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.generation.speculation import decode


class TokenStream:
    """The generated text in pieces: an iterator of non-empty strings, and a context manager that frees the KV cache.

    Leaving it early is safe. It belongs to one thread at a time. Without a tokenizer there are no pieces.
    """

    def __init__(
        self,
        engine: Engine,
        sequence: ActiveSequence,
        prefix_cache: PrefixCache,
        progress: Progress = lambda count: None,
    ) -> None:
        """Allocate the KV cache; `progress` gets the prompt tokens done. Raises PromptError."""
        self._engine = engine
        self._sequence = sequence
        self._prefix_cache = prefix_cache
        self._progress = progress
        self._state: State | None = engine.new_state(sequence.positions, sequence.options.adapter)
        self._kv_bytes = self._state.cache.nbytes
        self._shown = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while self._shown == len(self._sequence.pieces):
            if self._state is None or self._sequence.finish_reason:
                self.close()
                if self._shown == len(self._sequence.pieces):
                    raise StopIteration
                break
            try:
                self._step(self._state)
            except BaseException as error:
                if isinstance(error, Exception):  # the cache may be wrong; an interrupt leaves it right
                    self._state = None
                self.close()
                raise
        piece = "".join(self._sequence.pieces[self._shown :])
        self._shown = len(self._sequence.pieces)
        return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the stream, put its tokens into the prefix cache, and free its KV cache."""
        state, self._state = self._state, None
        self._sequence.close()
        self._sequence.end_drafts()
        if state is not None:
            self._prefix_cache.keep(self._sequence.fed, state.cache)
            self._engine.release(state.cache)

    def result(self) -> Generation:
        """Run the rest of the stream, if any, and return the result."""
        for _ in self:
            pass
        return Generation.of(self._sequence, self._kv_bytes)

    def _step(self, state: State) -> None:
        sequence = self._sequence
        if not state.cache.length:
            prefill(self._engine, state, sequence, self._prefix_cache, progress=self._progress)
            return
        start = time.perf_counter()
        sequence.timing.decode_steps += decode(self._engine, state, sequence)
        sequence.timing.decode_seconds += time.perf_counter() - start
