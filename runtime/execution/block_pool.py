"""Keys and values in blocks of a pool, which sequences with a shared beginning share.

A sequence has a table of blocks, each of `BLOCK` positions of all layers. A block that several sequences refer to is
copied before one of them writes into it. (Kwon et al., Efficient Memory Management for Large Language Model Serving
with PagedAttention, 2023.)
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import CacheSpec
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.batch import PoolFullError
from satchel.runtime.execution.kv_cache import Cache, position_bytes

BLOCK = 64
"""Positions of a block."""


class BlockPool:
    """Memory for keys and values, in blocks with a count of references. Threads may share one.

    Blocks that were never used cost no memory.
    """

    def __init__(self, spec: CacheSpec, blocks: int) -> None:
        """Allocate `blocks` blocks. Raises PromptError if there is not enough memory."""
        self.block_bytes = BLOCK * position_bytes(spec)
        self.past: dict[str, NDArray[Any]] = {}
        self.present: dict[str, NDArray[Any]] = {}
        try:
            self._memory = mmap.mmap(-1, max(blocks * self.block_bytes, 1))
        except (OSError, OverflowError, ValueError):
            raise PromptError(
                f"there is not enough memory for {blocks * self.block_bytes >> 20:,} MiB of KV cache: "
                "lower --max-context or the number of rows"
            ) from None
        self._stacks: list[NDArray[Any]] = []  # buffers of one shape that lie side by side
        buffers = [
            (past, present, (blocks, layer.kv_heads, BLOCK, width))
            for layer in spec.layers
            for past, present, width in layer.buffers
        ]
        dtype, offset = np.dtype(spec.dtype), 0
        for shape, group in groupby(buffers, key=lambda buffer: buffer[2]):
            alike = list(group)
            stack: NDArray[Any] = np.ndarray((len(alike), *shape), dtype, self._memory, offset)
            offset += stack.nbytes
            self._stacks.append(stack)
            for buffer, (past, present, _) in zip(stack, alike, strict=True):
                self.past[past] = self.present[present] = buffer
        self.blocks = blocks
        self._free = list(range(blocks))[::-1]
        self._references = np.zeros(blocks, np.int64)
        self.user: weakref.ref[object] | None = None
        """The batch whose rows take blocks of this pool; one at a time."""
        self._lock = threading.RLock()  # also taken where a sequence is collected in the middle of an allocation

    @property
    def is_taken(self) -> bool:
        """Whether a batch has this pool."""
        return self.user is not None and self.user() is not None

    @property
    def used(self) -> int:
        """The number of blocks that something refers to."""
        return self.blocks - len(self._free)

    @property
    def nbytes(self) -> int:
        """The bytes of the blocks in use, each counted once."""
        return self.used * self.block_bytes

    def allocate(self) -> int:
        """A block that nothing else refers to; what is in it is of no meaning. Raises PoolFullError."""
        with self._lock:
            if not self._free:
                raise PoolFullError
            block = self._free.pop()
            self._references[block] = 1
            return block

    def share(self, blocks: Iterable[int]) -> None:
        """Refer to blocks once more."""
        with self._lock:
            for block in blocks:
                self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Refer to blocks once less; those that nothing refers to are free."""
        with self._lock:
            for block in blocks:
                self._references[block] -= 1
                if not self._references[block]:
                    self._free.append(block)

    def is_shared(self, block: int) -> bool:
        """Whether several sequences refer to a block."""
        return bool(self._references[block] > 1)

    def new_cache(self, capacity: int, limit: int) -> PagedCache:
        """An empty cache of one sequence in blocks of this pool; the arguments are those of `PagedCache`."""
        return PagedCache(self, capacity, limit)

    def gathered(self, name: str, blocks: list[int], length: int) -> NDArray[Any]:
        """The first `length` positions in blocks, by graph input: a copy, [1, kv_heads, length, width]."""
        found = self.past[name][blocks].swapaxes(0, 1)
        return found.reshape(1, found.shape[0], -1, found.shape[3])[:, :, :length]

    def write(self, blocks: list[int], past: Mapping[str, NDArray[Any]], count: int) -> None:
        """Put `count` positions, by graph input as `gathered` gives them, into blocks."""
        for name, mine in self.past.items():
            theirs = past[name]
            for place, block in enumerate(blocks):
                part = theirs[0, :, place * BLOCK : min(count, (place + 1) * BLOCK)]
                mine[block, :, : part.shape[1]] = part

    def copy_of(self, block: int, positions: int) -> int:
        """A block of its own with the first `positions` of another. Raises PoolFullError."""
        copied = self.allocate()
        self.copy_positions(block, copied, positions)
        return copied

    def copy_positions(self, block: int, target: int, positions: int) -> None:
        """Copy the first `positions` of a block to another."""
        for stack in self._stacks:
            stack[:, target, :, :positions] = stack[:, block, :, :positions]


class PagedCache(Cache):
    """Keys and values of one sequence, in blocks of a pool."""

    def __init__(self, pool: BlockPool, capacity: int, limit: int) -> None:
        """An empty cache of up to `capacity` positions, which takes blocks as it grows; `limit` is for messages."""
        super().__init__(capacity, limit)
        self.pool = pool
        self.table: list[int] = []
        self._end = weakref.finalize(self, _release, pool, self.table)

    @property
    def past(self) -> Mapping[str, NDArray[Any]]:
        """Copies, one after another position, [1, kv_heads, positions, head_dim]."""
        return _Gathered(self._gathered, self.pool.past)

    @property
    def nbytes(self) -> int:
        """The size of the blocks, also of those that others share."""
        return len(self.table) * self.pool.block_bytes

    def missing(self, count: int) -> int:
        """How many blocks `count` further positions need that this does not have."""
        further = -(-(self._length + count) // BLOCK) - len(self.table)
        return max(further, 0) + int(self._writes_shared())

    def begin(self, count: int) -> None:
        """As `Cache.begin`. Raises PoolFullError too, and has changed nothing then that matters."""
        self.require(count)
        if self._writes_shared():
            place = self._length // BLOCK
            last = self.table[place]
            self.table[place] = self.pool.copy_of(last, self._length % BLOCK)
            self.pool.release([last])
        while len(self.table) * BLOCK < self._length + count:
            self.table.append(self.pool.allocate())
        self._running = True

    def shorten(self, length: int) -> None:
        """As `Cache.shorten`; blocks behind it are free."""
        super().shorten(length)
        keep = -(-length // BLOCK)
        self.pool.release(self.table[keep:])
        del self.table[keep:]

    def clear(self, adapter: str | None = None) -> None:
        """As `Cache.clear`."""
        super().clear(adapter)
        self.pool.release(self.table)
        self.table.clear()

    def copy_from(self, other: Cache, count: int, start: int = 0) -> None:
        """As `Cache.copy_from`; blocks of the same pool are shared."""
        self.require(count - self._length)
        if isinstance(other, PagedCache) and other.pool is self.pool:
            blocks = other.table[: -(-count // BLOCK)]
            self.pool.share(blocks)
            self.clear(other.adapter)
            self.table += blocks
        else:
            self.clear(other.adapter)
            self.begin(count)
            self._write(other, count)
        self.long, self._length, self._running = other.long, count, False

    def kept(self, count: int) -> PagedCache:
        """A cache that shares the first `count` positions."""
        kept = self.pool.new_cache(count, self._limit)
        kept.copy_from(self, count)
        return kept

    def blocks(self, count: int) -> set[tuple[int, int]]:
        """As `Cache.blocks`: each is a pool and a number."""
        return {(id(self.pool), block) for block in self.table[: -(-count // BLOCK)]}

    def _writes_shared(self) -> bool:
        """Whether the next position is in a block that others refer to as well."""
        return bool(self._length % BLOCK and self.pool.is_shared(self.table[self._length // BLOCK]))

    def _write(self, other: Cache, count: int) -> None:
        """Put the first `count` positions of another cache into the blocks."""
        self.pool.write(self.table, other.past, count)

    def _gathered(self, name: str) -> NDArray[Any]:
        return self.pool.gathered(name, self.table, self._length)


class _Gathered(Mapping[str, NDArray[Any]]):
    """Arrays that are put together where they are asked for."""

    def __init__(self, gather: Callable[[str], NDArray[Any]], names: Iterable[str]) -> None:
        self._gather, self._names = gather, tuple(names)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._gather(name)

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _release(pool: BlockPool, table: list[int]) -> None:
    pool.release(table)
    table.clear()
