"""Sequences of different lengths that are decoded together, and the check that this changes none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from satchel.runtime.errors import PromptError
from satchel.runtime.execution.kv_cache import Cache
from satchel.runtime.execution.state import Ids, Logits, State

if TYPE_CHECKING:
    from satchel.runtime.execution.engine import Engine

TRIED_ROWS, TRIED_STEPS, TRIED_TOKENS = 3, 3, 8
TRIED_PROMPT = 56
SMALL_PIECE = 4
"""Tokens of the smallest piece that a prompt is fed in; an even number, since some kernels take tokens in pairs."""
TOLERANCE = 1e-4
"""Of the largest logit: above what sums in another order differ by, far below what other int8 activations do."""


class PoolFullError(Exception):
    """All memory that rows share is in use."""


class Evicts(Protocol):
    """What keeps caches of earlier sequences."""

    def nbytes_of(self, chosen: Callable[[Cache], bool]) -> int:
        """The bytes of those that are `chosen`."""


Feed = tuple[int, Ids]
"""A row, and the tokens that it is fed."""


@dataclass(frozen=True)
class Run:
    """One run of a graph: the rows that it concerns, and what runs it."""

    rows: tuple[int, ...]
    go: Callable[[], None]


class Batch:
    """Rows for several sequences. One sequence is a batch of one row.

    Each prompt is prefilled by itself, into the state of its row; `decode` then feeds one token to each of the first
    rows: here one row after another, in `CpuBatch` in one run. A batch belongs to one thread at a time.
    """

    def __init__(self, engine: Engine, states: Sequence[State], logits: Logits) -> None:
        """`states` are the rows, whose logits lie in `logits` [rows, vocabulary]."""
        self.states = list(states)
        self._engine = engine
        self._logits = logits
        self._used = 0

    def __len__(self) -> int:
        """The number of rows that `add` took into use."""
        return self._used

    @property
    def nbytes(self) -> int:
        """The size of all KV caches in bytes."""
        return sum(state.cache.nbytes for state in self.states)

    @property
    def logits(self) -> Logits:
        """Those of the rows in use, [rows in use, vocabulary] float32: a buffer that the next step overwrites."""
        for state in self.states[: self._used]:
            _ = state.logits  # a device copies them into the buffer now
        return self._logits[: self._used]

    def add(self, adapter: str | None = None) -> State:
        """Clear the next free row and take it into use, ready for a prompt with this adapter; None is the base model.

        Raises PromptError if there is no free row, or no such adapter.
        """
        self._engine.adapters.check(adapter)
        if self._used == len(self.states):
            raise PromptError(f"all {self._used} rows are in use: drop one first")
        state = self.states[self._used]
        state.cache.clear(adapter)
        self._used += 1
        return state

    def drop(self, row: int) -> None:
        """Free a row. The last one in use takes its place and its number."""
        last = self._used - 1
        if row != last:
            self.copy(last, row)
        self._used = last

    def exchange(self, row: int, other: int) -> None:
        """Exchange what two rows hold, to bring those that are decoded to the front; `logits` may not follow."""
        self.states[row], self.states[other] = self.states[other], self.states[row]

    def copy(self, source: int, target: int, start: int = 0) -> None:
        """Copy row `source` to row `target`; the first `start` positions are the same already."""
        self.states[target].copy_from(self.states[source], start)

    def decode(self, tokens: Sequence[int] | Ids, first: int = 0) -> None:
        """Feed one token to each of `len(tokens)` rows from `first` on; the states, and `logits`, have what follows.

        Raises PromptError if a token is outside the vocabulary or a row's context is full.
        """
        self._decode(self._engine.check_ids(tokens), first)

    @property
    def positions(self) -> int:
        """The largest number of positions that one row can have."""
        return self.states[0].cache.capacity

    def plan(self, feeds: Sequence[Feed], decoded: int) -> list[Run]:
        """The runs that feed rows tokens; the first `decoded` of `feeds` are one token of each of neighboring rows."""
        last, pieces = feeds[:decoded], feeds[decoded:]
        runs = [Run((row,), partial(self.states[row].prefill, piece)) for row, piece in pieces]
        if last:
            tokens = [int(ids[0]) for _, ids in last]
            runs.append(Run(tuple(row for row, _ in last), partial(self.decode, tokens, last[0][0])))
        return runs

    def run(self, feeds: Sequence[Feed]) -> None:
        """Feed tokens to rows without an adapter: here one row after another, in one run where rows share memory."""
        for row, tokens in feeds:
            state = self.states[row]
            state.expect(state.cache.length + len(tokens))
            for span in self._engine.spans(len(tokens)) if len(tokens) > 1 else ():
                state.prefill(tokens[span])
            if len(tokens) == 1:
                state.decode(int(tokens[0]))

    @property
    def widest_ahead(self) -> int:
        """The largest number of drafted tokens of a row that `decode_ahead` checks; 0 where it takes none."""
        return 0

    def decode_ahead(self, feeds: Sequence[Feed]) -> list[Logits]:
        """Feed rows without an adapter any number of tokens in one run, each of which gets the logits of `decode`.

        Returns those of each row, [tokens, vocabulary] float32, which the next step overwrites.
        """
        raise NotImplementedError("see widest_ahead")

    def is_short_of(self, feeds: Sequence[Feed]) -> bool:
        """Whether there is not enough memory for a step with these; never where all rows have theirs."""
        return False

    def holds(self, positions: int, prefix_cache: Evicts) -> bool:
        """Whether a further row of so many positions has its memory, if prefixes are let go."""
        return True

    def owns(self, cache: Cache) -> bool:
        """Whether a cache that is let go frees memory for the rows of this batch."""
        return False

    def _decode(self, tokens: Ids, first: int) -> None:
        for state, token in zip(self.states[first:], tokens.tolist(), strict=False):
            state.decode(token)


def rows_agree(engine: Engine, adapter: str | None = None) -> bool:
    """Compare a few steps of rows decoded in one run, all with this adapter, with the same steps of each row alone.

    They differ if the graph rounds the activations of all rows with one scale, or if a kernel sums in another order for
    several rows: where activations are rounded to int8, the last bit makes a visible difference. Which kernels do so
    depends on the processor, so only trying tells.
    """
    length = min(TRIED_TOKENS, engine.max_context - TRIED_STEPS)
    if length < 1:
        return False
    ids = [(7 * i + 1) % engine.vocabulary for i in range(length + TRIED_ROWS + TRIED_STEPS)]
    batch = engine.new_batch(TRIED_ROWS, length + TRIED_STEPS, force=True)
    alone = [engine.new_state(length + TRIED_STEPS, adapter) for _ in range(TRIED_ROWS)]
    for row, state in enumerate(alone):
        prompt = ids[row : row + max(length - row, 1)]  # of different lengths
        engine.prefill(batch.add(adapter), prompt)
        engine.prefill(state, prompt)
    for step in range(TRIED_STEPS):
        tokens = ids[length + step : length + step + TRIED_ROWS]
        batch.decode(tokens)
        for logits, state, token in zip(batch.logits, alone, tokens, strict=True):
            expected = engine.decode(state, token)
            if not np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max():
                return False
    return True


def pieces_agree(engine: Engine) -> bool:
    """Compare the logits of a prompt that is fed in small pieces with those of the same prompt fed as usual.

    They differ if the graph rounds the activations of all tokens of a run with one scale.
    """
    ids = [(11 * i + 1) % engine.vocabulary for i in range(min(TRIED_PROMPT, engine.max_context))]
    expected = engine.prefill(engine.new_state(len(ids)), ids)
    found = engine.prefill(engine.new_state(len(ids)), ids, SMALL_PIECE)
    return bool(np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max())
