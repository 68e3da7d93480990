"""Sequences of different lengths that are decoded together, where that changes none of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from satchel.runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, LOGITS
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.kv_cache import KVCache
from satchel.runtime.execution.state import Logits, State
from satchel.runtime.ort.binding import bind_cache, bind_input, bind_output, run_bound

TRIED_ROWS, TRIED_STEPS, TRIED_TOKENS = 3, 3, 8
TOLERANCE = 1e-4
"""Of the largest logit: above what sums in another order differ by, far below what other codes of activations do."""


class Rows:
    """Up to `rows` sequences in the rows of one KV cache. The first `len(self)` of them are in use.

    A prompt is prefilled alone, into its row; then each step decodes one token for every row in use: in one run of the
    graph, or row by row. Rows belong to one thread at a time.
    """

    def __init__(self, engine: Engine, rows: int, capacity: int, *, together: bool | None = None) -> None:
        """Allocate `capacity` positions for each row.

        `together` decodes all rows in one run, faster, even where a row's numbers then differ from those it has alone;
        None does so only where they do not (`rows_agree`). Raises PromptError.
        """
        if rows < 1:
            raise PromptError(f"--batch {rows}: must be 1 or more")
        if together and engine.rows_need_turns:
            raise PromptError("the decode graph of this bundle takes a fixed number of rows: they cannot run together")
        self._engine = engine
        self._decode = engine.sessions[-1]
        self._logits: Logits = np.zeros((rows, engine.vocabulary), np.float32)
        self._tokens = np.zeros((rows, 1), np.int64)
        self._mask = np.zeros(rows * capacity, np.int64)
        self._bindings: dict[int, ort.IOBinding] = {}
        self._together = together
        self._used = 0
        # Rows of one cache where they can run together, and else a cache for each.
        cache = None if engine.rows_need_turns else engine.new_cache(capacity, rows)
        self._cache = cache if isinstance(cache, KVCache) else None
        caches = [self._cache.row(i) if self._cache else engine.new_cache(capacity) for i in range(rows)]
        self.states = [engine.state_over(cache, row) for cache, row in zip(caches, self._logits, strict=True)]

    def __len__(self) -> int:
        return self._used

    @property
    def full(self) -> bool:
        """Whether every row is in use."""
        return self._used == len(self.states)

    @property
    def nbytes(self) -> int:
        """The size of the cache in bytes, all rows together."""
        return sum(state.cache.nbytes for state in self.states)

    def add(self) -> State:
        """Take the next row, emptied, into use; its state can be prefilled. Raises PromptError when all are in use."""
        if self.full:
            raise PromptError(f"all {self._used} rows are in use: drop one first")
        state = self.states[self._used]
        state.cache.clear()
        self._used += 1
        return state

    def drop(self, row: int) -> None:
        """Let a row go. The last one in use takes its place, and its number."""
        last = self._used - 1
        if row != last:
            self.copy(last, row)
        self._used = last

    def copy(self, source: int, target: int, start: int = 0) -> None:
        """Let row `target` hold what `source` holds, of which the first `start` positions are the same already."""
        self.states[target].hold(self.states[source], start)

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Feed one token to each row in use. Returns their logits, [rows in use, vocabulary] float32.

        That is a buffer which the next step overwrites. Raises PromptError when a row's context is full.
        """
        for state in self.step(tokens):
            _ = state.logits  # into its row of the buffer
        return self._logits[: self._used]

    def step(self, tokens: Sequence[int]) -> Sequence[State]:
        """As `decode`, for who may not want the logits: the states of the rows in use have them, when asked."""
        states = self.states[: self._used]
        if len(states) > 1 and self._cache is not None and self._runs_together():
            self._decode_together(self._cache, states, tokens)
        else:
            for state, token in zip(states, tokens, strict=True):
                self._engine.step(state, token)
        return states

    def _runs_together(self) -> bool:
        if self._together is None:
            self._together = rows_agree(self._engine)
        return self._together

    def _decode_together(self, cache: KVCache, states: Sequence[State], tokens: Sequence[int]) -> None:
        for state in states:
            state.cache.require(1)
        count = len(states)
        self._tokens[:count, 0] = self._engine.check_ids(tokens)
        totals = np.array([state.cache.length + 1 for state in states])
        longest = int(totals.max())
        mask = self._mask[: count * longest].reshape(count, longest)
        np.less(np.arange(longest), totals[:, None], out=mask, casting="unsafe")
        binding = self._bindings.get(count) or self._bind(cache, count)
        bind_input(binding, ATTENTION_MASK, mask, mask.shape)
        run_bound(self._decode, binding, f"with {count} sequences")
        for state in states:
            state.cache.advance(1)

    def _bind(self, cache: KVCache, count: int) -> ort.IOBinding:
        binding = bind_cache(self._decode, cache, count)
        bind_input(binding, INPUT_IDS, self._tokens, (count, 1))
        bind_output(binding, LOGITS, self._logits, (count, 1, self._engine.vocabulary))
        self._bindings[count] = binding
        return binding


def rows_agree(engine: Engine) -> bool:
    """Whether rows that are decoded in one run get the numbers that each gets alone; tried once for an engine.

    Not so where the graph takes a fixed number of rows, where it rounds the activations of all rows with one scale, and
    where a kernel adds up in another order for several rows: by rounding activations to int8, a model makes a visible
    difference out of the last bit. Which kernels do that depends on the processor, so a few steps tell.
    """
    return not engine.rows_need_turns and engine.once("rows agree", lambda: _agree(engine))


def _agree(engine: Engine) -> bool:
    """Compare a few steps of rows together with the same steps of each alone."""
    length = min(TRIED_TOKENS, engine.max_context - TRIED_STEPS)
    if length < 1:
        return False
    ids = [(7 * i + 1) % engine.vocabulary for i in range(length + TRIED_ROWS + TRIED_STEPS)]
    rows = Rows(engine, TRIED_ROWS, length + TRIED_STEPS, together=True)
    alone = [engine.new_state(length + TRIED_STEPS) for _ in range(TRIED_ROWS)]
    for row, state in enumerate(alone):
        prompt = ids[row : row + max(length - row, 1)]  # of different lengths
        engine.prefill(rows.add(), prompt)
        engine.prefill(state, prompt)
    for step in range(TRIED_STEPS):
        tokens = ids[length + step : length + step + TRIED_ROWS]
        found = rows.decode(tokens)
        for logits, state, token in zip(found, alone, tokens, strict=True):
            expected = engine.decode(state, token)
            if not np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max():
                return False
    return True
