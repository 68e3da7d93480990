"""What a sequence keeps from step to step: keys and values, allocated once at their full capacity, and states."""

from __future__ import annotations

import copy
import mmap
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import CacheSpec
from satchel.runtime.bundle.states import StateSpec
from satchel.runtime.errors import PromptError
from satchel.runtime.ort.binding import bind_input, bind_output

Snapshot = Mapping[str, NDArray[Any]]
"""Copies of all states of one sequence by graph input. Nobody writes to them, so several caches may hold the same."""

Kind = tuple[str | None, bool]
"""An adapter's name, None for the base model, and `Cache.long`."""


class Cache(ABC):
    """Keys and values of one sequence for every layer, its states, and the number of positions in use.

    The buffers are allocated once, for `capacity` positions or more, and never grow. States are those after the last
    position; `snapshots` are copies of them at earlier lengths, to which the sequence can return. `long` tells whether
    the keys are rotated as those of a text beyond the model's `rotary_border`.
    """

    def __init__(self, capacity: int, limit: int, rows: int = 1) -> None:
        """An empty cache; `limit` is the bundle's largest context, for messages."""
        self.capacity = capacity
        self.rows = rows
        self.adapter: str | None = None
        """The adapter that the keys and values are computed with; None for the base model."""
        self._limit = limit
        self._length = 0
        self._running = False  # while a graph may be writing states, and after it failed
        self.snapshots: dict[int, Snapshot] = {}
        self.long = False
        self.behind: tuple[int, ...] = ()
        """Tokens after the last position, which are fed in front of the next one."""

    @property
    @abstractmethod
    def past(self) -> Mapping[str, NDArray[Any]]:
        """The contents of each past input of a graph, by its name: [rows, kv_heads, positions, head_dim]."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The size of all buffers in bytes, each counted once."""

    @property
    def kind(self) -> Kind:
        """What keys and values depend on beside the token ids: those of another kind are never reused."""
        return self.adapter, self.long

    @property
    def states(self) -> Snapshot:
        """The states by graph input, [rows, ...]; none if all layers attend."""
        return {}

    @abstractmethod
    def copy_from(self, other: Cache, count: int, start: int = 0) -> None:
        """Copy the first `count` positions of `other`, a cache of as many rows; the first `start` are here already.

        `count` is one that `other` can return to (`reach`). Raises PromptError if they do not fit.
        """

    def kept(self, count: int) -> Cache | None:
        """A cache that shares the first `count` positions with this one; None if they have to be copied."""
        return None

    def blocks(self, count: int) -> Collection[tuple[int, int]]:
        """The blocks of the first `count` positions, which others may share; none where these have their own memory."""
        return ()

    def swapped_out(self, spec: CacheSpec) -> Cache:
        """A copy of this cache, without states, in a temporary file."""
        return in_file(spec, self)

    def take_snapshot(self) -> None:
        """Keep a copy of the states as they are now, if there are any."""
        if self.states:
            self.snapshots[self._length] = {name: state.copy() for name, state in self.states.items()}

    def reach(self, count: int) -> int:
        """The greatest length up to `count` that this can return to: with states, one of which it has them."""
        if not self.states:
            return min(count, self._length)
        lengths = self.snapshots if self._running else (self._length, *self.snapshots)
        return max((length for length in lengths if length <= count), default=0)

    def states_at(self, count: int) -> Snapshot:
        """The states after the first `count` positions, a length that this can return to."""
        if count == self._length and not self._running:
            return self.states
        return self.snapshots[count] if self.states else {}

    @property
    def length(self) -> int:
        """The number of positions that hold keys and values."""
        return self._length

    def require(self, count: int) -> None:
        """Raise PromptError unless `count` further positions fit."""
        if self._length + count > self.capacity:
            raise PromptError(
                f"the context is full: {self._length} + {count} tokens do not fit {self.capacity} positions: "
                f"raise --max-context (this bundle allows up to {self._limit}) or shorten the prompt"
            )

    def begin(self, count: int) -> None:
        """Raise PromptError unless `count` further positions fit, which a graph then writes until `advance`."""
        self.require(count)
        self._running = True

    def advance(self, count: int) -> None:
        """Count `count` positions that a graph has just written. Raises PromptError beyond the capacity."""
        self.require(count)
        self._length += count
        self._running = False

    def restore(self, states: Snapshot, length: int, behind: Sequence[int]) -> None:
        """Return to `states`, those after `length` positions; `behind` are fed in front of the next token."""
        for name, state in self.states.items():
            state[...] = states[name]
        self._length, self._running, self.behind = length, False, tuple(behind)

    def shorten(self, length: int) -> None:
        """Forget all positions but the first `length`, of a cache without states."""
        self._length, self._running = length, False

    def set_length(self, length: int, kind: Kind) -> None:
        """Count this many positions as in use, of a sequence that another process keeps the count of."""
        self._length, self._running = length, False
        self.adapter, self.long = kind

    def clear(self, adapter: str | None = None) -> None:
        """Empty the cache: the next position to be written is the first, by this adapter, and states are zeros."""
        self._length, self._running, self.snapshots, self.long, self.adapter = 0, False, {}, False, adapter
        self.behind = ()
        for state in self.states.values():
            state[...] = 0


class KVCache(Cache):
    """Keys, values and states in memory of the CPU that a graph reads and writes in place.

    `past` (by graph input) and `present` (by graph output) name the same arrays, [rows, kv_heads, capacity, head_dim],
    so nothing is copied between steps, and so do `states` and `next_states`, [rows, ...]. All lie in one anonymous
    mapping: pages that were never written cost no memory, and the mapping is freed with the cache.
    """

    def __init__(
        self,
        spec: CacheSpec,
        capacity: int,
        limit: int,
        rows: int = 1,
        memory: mmap.mmap | None = None,
        states: Sequence[StateSpec] = (),
    ) -> None:
        """Allocate `capacity` positions for each of `rows` sequences; `limit` is the largest context, for messages.

        `memory` of a cache that is no longer used is reused if it is large enough.
        """
        super().__init__(capacity, limit, rows)
        self._past: dict[str, NDArray[Any]] = {}
        self.present: dict[str, NDArray[Any]] = {}
        self._states: dict[str, NDArray[Any]] = {}
        self.next_states: dict[str, NDArray[Any]] = {}
        dtype = np.dtype(spec.dtype)
        total = rows * (capacity * position_bytes(spec) + sum(state.nbytes for state in states))
        if memory is None or len(memory) < total:
            try:
                memory = mmap.mmap(-1, max(total, 1))
            except (OSError, OverflowError, ValueError):
                raise PromptError(
                    f"there is not enough memory for a KV cache of {capacity} positions: lower --max-context"
                ) from None
        self.memory, offset = memory, 0
        for state in states:  # first: their elements are the larger ones, so that all are aligned
            kept: NDArray[Any] = np.ndarray((rows, *state.shape), np.dtype(state.dtype), memory, offset)
            offset += kept.nbytes
            self._states[state.past] = self.next_states[state.present] = kept
            kept[...] = 0  # what was in the memory before
        for layer in spec.layers:
            for past, present, width in layer.buffers:
                buffer: NDArray[Any] = np.ndarray((rows, layer.kv_heads, capacity, width), dtype, memory, offset)
                offset += buffer.nbytes
                self._past[past] = self.present[present] = buffer

    @property
    def past(self) -> dict[str, NDArray[Any]]:
        """The buffers themselves, by graph input."""
        return self._past

    @property
    def states(self) -> dict[str, NDArray[Any]]:
        """The buffers themselves, by graph input."""
        return self._states

    @property
    def nbytes(self) -> int:
        """The size of all buffers in bytes, each counted once."""
        return sum(buffer.nbytes for buffer in (*self._past.values(), *self._states.values()))

    def bind(self, session: ort.InferenceSession, rows: slice = slice(None)) -> ort.IOBinding:
        """A binding in which each buffer, of some rows, is past and present at once: the graph writes in place."""
        binding = session.io_binding()
        for bind, buffers in (
            (bind_input, self._past | self._states),
            (bind_output, self.present | self.next_states),
        ):
            for name, buffer in buffers.items():
                part = buffer[rows]
                bind(binding, name, part, part.shape)
        return binding

    def row(self, index: int) -> Self:
        """An empty cache of one sequence, with its own length, in the memory of row `index` of this one."""
        row = copy.copy(self)
        row.rows, row._length, row._running, row.snapshots, row.long, row.behind = 1, 0, False, {}, False, ()
        row._past, row._states = (
            {name: buffer[index : index + 1] for name, buffer in buffers.items()}
            for buffers in (self._past, self._states)
        )
        row.present = dict(zip(self.present, row._past.values(), strict=True))
        row.next_states = dict(zip(self.next_states, row._states.values(), strict=True))
        return row

    def copy_from(self, other: Cache, count: int, start: int = 0) -> None:
        """As `Cache.copy_from`."""
        self._length, self.long, self.adapter = 0, other.long, other.adapter
        self.require(count)
        theirs = other.past
        for name, buffer in self._past.items():
            buffer[:, :, start:count] = theirs[name][:, :, start:count]
        for name, state in other.states_at(count).items():
            self._states[name][...] = state
        self.snapshots = {length: copies for length, copies in other.snapshots.items() if length <= count}
        self._length, self._running, self.behind = count, False, ()

    def exchange(self, other: KVCache) -> None:
        """Exchange the contents with another row of this cache; only positions in use are copied."""
        mine, theirs = self._length, other._length
        for left, right in zip(self._past.values(), other._past.values(), strict=True):
            kept = left[:, :, :mine].copy()
            left[:, :, :theirs] = right[:, :, :theirs]
            right[:, :, :mine] = kept
        for left, right in zip(self._states.values(), other._states.values(), strict=True):
            left[...], right[...] = right.copy(), left.copy()
        self._length, other._length = theirs, mine
        self.long, other.long = other.long, self.long
        self._running, other._running = other._running, self._running
        self.snapshots, other.snapshots = other.snapshots, self.snapshots
        self.behind, other.behind = other.behind, self.behind
        self.adapter, other.adapter = other.adapter, self.adapter


def in_file(spec: CacheSpec, cache: Cache) -> KVCache:
    """A copy of a cache without states, in a temporary file that the system removes when nothing refers to it."""
    with tempfile.TemporaryFile() as file:
        file.truncate(max(cache.length * position_bytes(spec), 1))
        memory = mmap.mmap(file.fileno(), 0)
    copied = KVCache(spec, max(cache.length, 1), cache.length, memory=memory)
    copied.copy_from(cache, cache.length)
    return copied


def position_bytes(spec: CacheSpec) -> int:
    """The bytes of the keys and values of one position of one sequence, over all layers."""
    numbers = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in spec.layers)
    return numbers * np.dtype(spec.dtype).itemsize
