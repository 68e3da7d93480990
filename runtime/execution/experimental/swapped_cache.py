"""A double-buffered KV cache, in the memory of any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import CacheSpec
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.experimental.device_memory import Buffer, Memory
from satchel.runtime.execution.kv_cache import Cache

Buffers = dict[str, Buffer]


class SwappedCache(Cache):
    """Keys and values of one sequence for graphs that read all of past and write all of present.

    There are two sets of buffers, which swap roles at each step. Both have `size` positions, whatever `capacity` is
    allowed. `side` is the set, 0 or 1, that holds the current contents; `version` changes when a buffer moved in
    memory and bindings to it must be made again.
    """

    def __init__(self, spec: CacheSpec, memory: Memory, size: int, capacity: int, limit: int) -> None:
        """Allocate both sets; `limit` is the bundle's largest context, for messages. Raises PromptError."""
        super().__init__(capacity, limit)
        self.size = size
        self.side = 0
        self.version = 0
        self._memory = memory
        self._names: dict[str, str] = {}
        self._sets: tuple[Buffers, Buffers] = ({}, {})
        try:
            for layer in spec.layers:
                for past, present, width in layer.buffers:
                    self._names[past] = present
                    for buffers in self._sets:
                        buffers[past] = memory.buffer((1, layer.kv_heads, size, width), spec.dtype)
        except MemoryError:
            raise PromptError(
                f"there is not enough memory for two KV caches of {size} positions: export with a smaller --max-context"
            ) from None

    @property
    def past(self) -> Mapping[str, NDArray[Any]]:
        """The current contents, by past input: on the CPU the buffers themselves, from a device copies."""
        return {name: buffer.read() for name, buffer in self._sets[self.side].items()}

    @property
    def nbytes(self) -> int:
        """The size of both sets in bytes."""
        return sum(buffer.nbytes for buffers in self._sets for buffer in buffers.values())

    def inputs(self) -> Buffers:
        """The buffers with the current contents, by past input."""
        return self._sets[self.side]

    def outputs(self) -> Buffers:
        """The buffers that the next step writes, by present output."""
        return {self._names[past]: buffer for past, buffer in self._sets[1 - self.side].items()}

    def swap(self, count: int) -> None:
        """Count `count` positions that a step has just written into the other set, and make that the current one."""
        self.advance(count)
        self.side = 1 - self.side

    def reopen(self, capacity: int) -> None:
        """Empty the cache and set its capacity."""
        self.capacity = capacity
        self.clear()

    def copy_from(self, other: Cache, count: int, start: int = 0) -> None:
        """As `Cache.copy_from`; whole buffers are copied to a device."""
        self._length, self.long = 0, other.long
        self.require(count)
        theirs = other.past
        for name, buffer in self._sets[self.side].items():
            values = buffer.read()
            if not values.flags.writeable:
                values = np.array(values)
            values[:, :, start:count] = theirs[name][:, :, start:count]
            buffer.write(values)
        if not self._memory.keeps_addresses:
            self.version += 1
        self._length = count
