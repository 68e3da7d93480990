"""Ragged runs of a native graph: sequences whose keys and values are in scattered blocks of a pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.contract import ATTENTION_MASK, BLOCK_TABLE, INPUT_IDS, LOGITS, ROW_OFFSETS
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.binding import bind_input, bind_output, run_bound


class Pool:
    """The blocks of all layers, dealt out in random order. A sequence is a number, its length the tokens so far."""

    def __init__(self, engine: Engine, blocks: int, block: int, seed: int = 0) -> None:
        spec = engine.bundle.kv_cache
        self.session, self.vocabulary, self.block = engine.sessions[0], engine.vocabulary, block
        self.free = np.random.default_rng(seed).permutation(blocks).tolist()
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.caches: list[tuple[str, str, NDArray[Any]]] = []
        for layer in spec.layers:
            for past, present, width in layer.buffers:
                memory = np.full((blocks, layer.kv_heads, block, width), np.nan, spec.dtype)
                self.caches.append((past, present, memory))

    def step(self, pieces: Mapping[int, NDArray[np.int64]], **inputs: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed new tokens of several sequences. Returns the logits of the last of each, [sequences, vocabulary]."""
        for row, tokens in pieces.items():
            self.lengths[row] = self.lengths.get(row, 0) + len(tokens)
            table = self.tables.setdefault(row, [])
            while len(table) * self.block < self.lengths[row]:
                table.append(self.free.pop())
        width = max(len(self.tables[row]) for row in pieces) + 1
        table = np.array([self.tables[row] + [-1] * (width - len(self.tables[row])) for row in pieces], np.int32)
        feeds = {
            INPUT_IDS: np.concatenate(list(pieces.values()))[None],
            ATTENTION_MASK: np.array([[self.lengths[row]] for row in pieces], np.int64),
            ROW_OFFSETS: np.cumsum([0, *map(len, pieces.values())], dtype=np.int32),
            BLOCK_TABLE: table,
            **inputs,
        }
        logits = np.empty((len(pieces), 1, self.vocabulary), np.float32)
        binding = self.session.io_binding()
        for name, array in feeds.items():
            bind_input(binding, name, array, array.shape)
        for past, present, memory in self.caches:
            bind_input(binding, past, memory, memory.shape)
            bind_output(binding, present, memory, memory.shape)
        bind_output(binding, LOGITS, logits, logits.shape)
        run_bound(self.session, binding, "in a ragged run")
        return logits[:, 0]
