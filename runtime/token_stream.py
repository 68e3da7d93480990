"""The token layer of generation: from prompt ids to new ids, one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from satchel.runtime.engine import Engine, Logits, State, TokenIds
from satchel.runtime.errors import PromptError

Choose = Callable[[Logits], int]


def greedy(logits: Logits) -> int:
    """The most likely token of logits [vocabulary]; the lowest id among equals."""
    return int(logits.argmax())


class TokenStream:
    """The new token ids of one prompt: an iterator, and a context manager that frees the KV cache.

    The last new token is never fed, so k new tokens after p prompt tokens need p + k - 1 positions: a prompt that fills
    the context exactly still gets one token. An end token ends the stream and is no part of it. `finish_reason` is None
    until the end, then "stop" (an end token), "length" (`max_new_tokens` or the context) or "closed" (closed before).
    `prefill_seconds` runs until the first token is chosen. A stream belongs to one thread at a time.
    """

    def __init__(
        self, engine: Engine, prompt: TokenIds, max_new_tokens: int, max_context: int, choose: Choose = greedy
    ) -> None:
        """Check the request and allocate its KV cache. Raises PromptError."""
        self._prompt = engine.check_ids(prompt)
        self.prompt_tokens = len(self._prompt)
        if max_new_tokens < 0:
            raise PromptError(f"--max-new-tokens {max_new_tokens}: must be 0 or more")
        if self.prompt_tokens > max_context:
            raise PromptError(
                f"the prompt has {self.prompt_tokens} tokens but the context holds {max_context}: shorten the prompt "
                f"or raise --max-context (this bundle allows up to {engine.max_context})"
            )
        self._limit = min(max_new_tokens, max_context - self.prompt_tokens + 1)
        self._engine = engine
        self._choose = choose
        self._end_tokens = frozenset(engine.bundle.manifest.model.eos_token_ids)
        self._state: State | None = engine.new_state(self.prompt_tokens + max(self._limit - 1, 0))
        self.kv_bytes = self._state.cache.nbytes
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.decode_steps = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        if self._state is None:
            raise StopIteration
        if len(self.token_ids) == self._limit:
            self._finish("length")
            raise StopIteration
        try:
            token = self._step(self._state)
        except BaseException:  # the cache may hold the token or not: nothing right can follow
            self._finish("closed")
            raise
        if token in self._end_tokens:
            self._finish("stop")
            raise StopIteration
        self.token_ids.append(token)
        return token

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream and free its KV cache. Closing twice, or after the end, does nothing."""
        if self._state is not None:
            self._finish("closed")

    def _step(self, state: State) -> int:
        start = time.perf_counter()
        if not self.token_ids:
            token = int(self._choose(self._engine.prefill(state, self._prompt)))
            self.prefill_seconds = time.perf_counter() - start
        else:
            token = int(self._choose(self._engine.decode(state, self.token_ids[-1])))
            self.decode_seconds += time.perf_counter() - start
            self.decode_steps += 1
        if not 0 <= token < self._engine.vocabulary:
            raise PromptError(f"token id {token} was chosen, outside the vocabulary of {self._engine.vocabulary} ids")
        return token

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._state = None
