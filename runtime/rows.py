"""Sequences of different lengths that are decoded together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from satchel.runtime.binding import bind_cache, bind_input, bind_output
from satchel.runtime.engine import Engine, Logits, State, run_bound
from satchel.runtime.errors import PromptError
from satchel.runtime.manifest import Manifest


class Rows:
    """Up to `rows` sequences in the rows of one KV cache. The first `len(self)` of them are in use.

    A prompt is prefilled alone, into its row; then each step decodes one token for every row in use, in one run of the
    graph where `rows_together` says that this changes no row's numbers, and row by row where not. Rows belong to one
    thread at a time.
    """

    def __init__(self, engine: Engine, rows: int, capacity: int) -> None:
        """Allocate `capacity` positions for each row. Raises PromptError."""
        if rows < 1:
            raise PromptError(f"--batch {rows}: must be 1 or more")
        self._engine = engine
        self._decode = engine.sessions[1]
        self._cache = engine.new_cache(capacity, rows)
        self._logits: Logits = np.zeros((rows, engine.vocabulary), np.float32)
        self._tokens = np.zeros((rows, 1), np.int64)
        self._mask = np.zeros(rows * capacity, np.int64)
        self._bindings: dict[int, ort.IOBinding] = {}
        self._together = rows_together(engine.bundle.manifest)
        self._used = 0
        self.states = [engine.state_over(self._cache.row(i), self._logits[i]) for i in range(rows)]

    def __len__(self) -> int:
        return self._used

    @property
    def full(self) -> bool:
        """Whether every row is in use."""
        return self._used == len(self.states)

    @property
    def nbytes(self) -> int:
        """The size of the cache in bytes, all rows together."""
        return self._cache.nbytes

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
        moved = self.states[source].cache
        self.states[target].cache.copy_from(moved, moved.length, start)
        self._logits[target] = self._logits[source]

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Feed one token to each row in use. Returns their logits, [rows in use, vocabulary] float32.

        That is a buffer which the next step overwrites. Raises PromptError when a row's context is full.
        """
        states = self.states[: self._used]
        if self._together and len(states) > 1:
            self._decode_together(states, tokens)
        else:
            for state, token in zip(states, tokens, strict=True):
                self._engine.decode(state, token)
        return self._logits[: self._used]

    def _decode_together(self, states: Sequence[State], tokens: Sequence[int]) -> None:
        for state in states:
            state.cache.require(1)
        count = len(states)
        self._tokens[:count, 0] = self._engine.check_ids(tokens)
        totals = np.array([state.cache.length + 1 for state in states])
        longest = int(totals.max())
        mask = self._mask[: count * longest].reshape(count, longest)
        np.less(np.arange(longest), totals[:, None], out=mask, casting="unsafe")
        binding = self._bindings.get(count) or self._bind(count)
        bind_input(binding, "attention_mask", mask, mask.shape)
        run_bound(self._decode, binding, f"with {count} sequences")
        for state in states:
            state.cache.advance(1)

    def _bind(self, count: int) -> ort.IOBinding:
        binding = bind_cache(self._decode, self._cache, count)
        bind_input(binding, "input_ids", self._tokens, (count, 1))
        bind_output(binding, "logits", self._logits, (count, 1, self._engine.vocabulary))
        self._bindings[count] = binding
        return binding


def rows_together(manifest: Manifest) -> bool:
    """Whether several sequences can be decoded in one run that gives each what it gives alone.

    Not so where the graph takes a fixed number of rows, and where it rounds activations with one scale for all rows.
    """
    fixed = any(isinstance(tensor.shape[0], int) for tensor in manifest.graphs.decode.inputs)
    shared_scale = any(layer.decode_activations == "tensor" for layer in manifest.layers.values())
    return not fixed and not shared_scale
