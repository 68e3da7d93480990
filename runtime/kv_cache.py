"""The KV cache of one sequence: buffers allocated once at their full capacity, and the one owner of their length."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import PromptError
from satchel.runtime.manifest import CacheSpec


class KVCache:
    """Keys and values of one sequence for every layer, in memory that a graph writes in place.

    `past` (by graph input) and `present` (by graph output) name the same arrays, [1, kv_heads, capacity, head_dim], so
    nothing is copied between steps. Pages that were never written cost no memory.
    """

    def __init__(self, spec: CacheSpec, capacity: int, limit: int) -> None:
        """Allocate room for `capacity` positions; `limit` is the most that the bundle allows, for messages."""
        self.capacity = capacity
        self._limit = limit
        self._length = 0
        self.past: dict[str, NDArray[Any]] = {}
        self.present: dict[str, NDArray[Any]] = {}
        try:
            for layer in spec.layers:
                key = np.zeros((1, layer.kv_heads, capacity, layer.key_dim), spec.dtype)
                value = np.zeros((1, layer.kv_heads, capacity, layer.value_dim), spec.dtype)
                self.past |= {layer.past_key: key, layer.past_value: value}
                self.present |= {layer.present_key: key, layer.present_value: value}
        except MemoryError:
            raise PromptError(
                f"there is not enough memory for a KV cache of {capacity} positions: lower --max-context"
            ) from None

    @property
    def length(self) -> int:
        """The number of positions that hold keys and values."""
        return self._length

    @property
    def nbytes(self) -> int:
        """The size of all buffers in bytes, each counted once."""
        return sum(buffer.nbytes for buffer in self.past.values())

    def require(self, count: int) -> None:
        """Raise PromptError unless `count` further positions fit."""
        if self._length + count > self.capacity:
            raise PromptError(
                f"the context is full: {self._length} + {count} tokens do not fit {self.capacity} positions: "
                f"raise --max-context (this bundle allows up to {self._limit}) or shorten the prompt"
            )

    def advance(self, count: int) -> None:
        """Count `count` positions that a graph has just written. Raises PromptError beyond the capacity."""
        self.require(count)
        self._length += count
