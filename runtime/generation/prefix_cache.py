"""Prefix cache: keys, values and states of earlier prompts and answers, reused by prompts with a shared prefix."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import CacheSpec
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.bundle.states import StateSpec
from satchel.runtime.execution.block_pool import BLOCK
from satchel.runtime.execution.kv_cache import Cache, Kind, KVCache, position_bytes

Ids = NDArray[np.int64]

SNAPSHOT_SHARE = 4
"""A sequence that runs may hold snapshots up to this part of the limit."""
SNAPSHOTS = 8
"""Snapshots beside a full context, in a prefix cache of that size."""


@dataclass(frozen=True)
class Prefix:
    """Token ids [length] int64 and a cache of one row with their keys, values and states. Both are read-only.

    The cache says with which adapter they were computed: those of another one are never reused.
    """

    ids: Ids
    cache: Cache

    def common(self, ids: Ids, kind: Kind) -> int:
        """How many of the first of `ids` can be reused by a sequence of this kind."""
        return self.cache.reach(common_length(self.ids, ids)) if self.cache.kind == kind else 0


class PrefixCache:
    """Prefixes up to a memory limit; the least recently used are evicted first. Threads may share one.

    With states, a prefix can be reused up to its end, and up to each length of which its cache has a snapshot.
    """

    def __init__(
        self, spec: CacheSpec, limit: int, border: int | None = None, states: Sequence[StateSpec] = ()
    ) -> None:
        """`limit` is in bytes; 0 caches nothing. `border` is the model's `rotary_border`.

        A prefix serves only prompts on its own side of the border: `Cache.long` says which that is.
        """
        self._spec, self._states = spec, tuple(states)
        self._border = border
        self._limit = max(0, limit)
        self._position_bytes = max(1, position_bytes(spec))
        self._state_bytes = sum(state.nbytes for state in self._states)
        self._lock = threading.Lock()
        self._block_bytes = BLOCK * self._position_bytes
        self._prefixes: list[Prefix] = []  # the most recently used one last
        self._held, self._bytes = _HeldBlocks(), 0  # of all prefixes: blocks that several share count once

    @property
    def limit(self) -> int:
        """The limit in bytes."""
        return self._limit

    def nbytes_of(self, chosen: Callable[[Cache], bool]) -> int:
        """The bytes of those prefixes whose caches are `chosen`."""
        with self._lock:
            some, held = [prefix for prefix in self._prefixes if chosen(prefix.cache)], _HeldBlocks()
            return sum(self._size_of(prefix) - self._block_bytes * held.add(prefix) for prefix in some)

    def evict(self, chosen: Callable[[Cache], bool]) -> bool:
        """Let go of the least recently used prefix whose cache is `chosen`. Returns whether there is one."""
        with self._lock:
            found = next((prefix for prefix in self._prefixes if chosen(prefix.cache)), None)
            if found is not None:
                self._drop(found)
            return found is not None

    @property
    def max_positions(self) -> int:
        """The number of positions of a single prefix that fit."""
        return max(0, self._limit - self._state_bytes) // self._position_bytes

    @property
    def max_snapshots(self) -> int:
        """The number of snapshots that a sequence that runs may hold; 0 without states."""
        return self._limit // SNAPSHOT_SHARE // self._state_bytes if self._state_bytes else 0

    @property
    def positions(self) -> int:
        """The number of cached positions."""
        with self._lock:
            return sum(len(prefix.ids) for prefix in self._prefixes)

    def longest(self, ids: Ids, adapter: str | None = None, most: int | None = None) -> tuple[int, Cache | None]:
        """The length of the longest prefix of a prompt `ids` that can be reused, of those cached with this adapter, up
        to `most` tokens, and its cache; 0 and None if there is none.
        """
        return self._longest(ids[:most], (adapter, self.is_long(len(ids))))

    def longest_saved(self, ids: Ids, adapter: str | None = None) -> tuple[int, Cache | None]:
        """As `longest`, of those whose length alone tells the side of the border that they are on."""
        found = (self._longest(ids, (adapter, long)) for long in (False, True))
        fitting = [(count, cache) for count, cache in found if cache and cache.long == self.is_long(count)]
        return max(fitting, key=lambda each: each[0], default=(0, None))

    def is_long(self, length: int) -> bool:
        """Whether a text of `length` tokens is beyond the border."""
        return self._border is not None and length > self._border

    def _longest(self, ids: Ids, kind: Kind) -> tuple[int, Cache | None]:
        with self._lock:
            length, best = 0, None
            for prefix in self._prefixes:
                common = prefix.common(ids, kind)
                if common and common >= length:
                    length, best = common, prefix
            if best is None:
                return 0, None
            self._prefixes = [prefix for prefix in self._prefixes if prefix is not best] + [best]
            return length, best.cache

    def keep(self, ids: Ids, cache: Cache) -> None:
        """Keep what `cache`, of one row, holds for the first of `ids`, as far as the limit allows.

        Of its snapshots the oldest are left out first.
        """
        count = cache.reach(min(len(ids), cache.length, self.max_positions))
        if len(cache.blocks(count)) * BLOCK > self.max_positions:
            count -= count % BLOCK
        if not count:
            return
        room = self._limit - self._size(cache, count, 0)
        fitting = room // self._state_bytes if self._state_bytes else 0
        lengths = sorted(length for length in cache.snapshots if length < count)
        snapshots = {length: cache.snapshots[length] for length in lengths[max(0, len(lengths) - fitting) :]}
        with self._lock:
            # Before the copy, so that both together stay under the limit.
            if not self._makes_room(ids[:count], cache, self._size(cache, count, len(snapshots))):
                return
            kept = cache.kept(count)
            if kept is None:
                kept = KVCache(self._spec, count, count, states=self._states)
                kept.copy_from(cache, count)
            kept.snapshots = snapshots
            self._add(Prefix(ids[:count].copy(), kept))

    def put(self, prefix: Prefix) -> None:
        """Cache a prefix in place of its own prefixes, and evict others as needed.

        One larger than the limit is not cached, and neither is one that a cached prefix covers, which counts as used.
        """
        size = self._size_of(prefix)
        with self._lock:
            if size <= self._limit and self._makes_room(prefix.ids, prefix.cache, size):
                self._add(prefix)

    def _size(self, cache: Cache, positions: int, snapshots: int) -> int:
        """The bytes of a prefix of a cache: whole blocks where it has blocks, and the states at its end count too."""
        held = len(cache.blocks(positions)) * BLOCK or positions
        return held * self._position_bytes + (1 + snapshots) * self._state_bytes

    def _size_of(self, prefix: Prefix) -> int:
        return self._size(prefix.cache, len(prefix.ids), len(prefix.cache.snapshots))

    def _add(self, prefix: Prefix) -> None:
        """Take a prefix for which there is room. The lock is held."""
        self._prefixes.append(prefix)
        self._bytes += self._size_of(prefix) - self._block_bytes * self._held.add(prefix)

    def _drop(self, prefix: Prefix) -> None:
        """Let go of a prefix. The lock is held."""
        self._prefixes = [other for other in self._prefixes if other is not prefix]
        self._bytes -= self._size_of(prefix) - self._block_bytes * self._held.drop(prefix)

    def _makes_room(self, ids: Ids, cache: Cache, size: int) -> bool:
        """Evict prefixes of `ids`, then the least recently used until the `size` bytes of `cache` for `ids` fit.

        Blocks that several prefixes share count once. Returns False, and evicts nothing, if some cached prefix can be
        reused for all of `ids`, which then counts as used. The lock is held.
        """
        own = list[Prefix]()
        for prefix in reversed(self._prefixes):
            if prefix.cache.kind != cache.kind:
                continue
            common = common_length(prefix.ids, ids)
            if prefix.cache.reach(common) == len(ids):
                self._prefixes = [other for other in self._prefixes if other is not prefix] + [prefix]
                return False
            if common == len(prefix.ids):
                own.append(prefix)
        for prefix in own:
            self._drop(prefix)
        blocks = cache.blocks(len(ids))
        while self._prefixes and (self._bytes + size - self._block_bytes * self._held.count(blocks) > self._limit):
            self._drop(self._prefixes[0])
        return True


class _HeldBlocks:
    """How many prefixes hold each block."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, int]] = Counter()

    def count(self, blocks: Collection[tuple[int, int]]) -> int:
        """How many of the blocks some prefix holds."""
        return sum(block in self._counts for block in blocks)

    def add(self, prefix: Prefix) -> int:
        """Note the blocks of a prefix; returns how many of them others hold."""
        blocks = prefix.cache.blocks(len(prefix.ids))
        shared = self.count(blocks)
        self._counts.update(blocks)
        return shared

    def drop(self, prefix: Prefix) -> int:
        """Note that a prefix no longer holds its blocks; returns how many of them others hold."""
        blocks = prefix.cache.blocks(len(prefix.ids))
        self._counts.subtract(blocks)
        for block in blocks:
            if not self._counts[block]:
                del self._counts[block]
        return self.count(blocks)


def full_context_bytes(bundle: Bundle, context: int) -> int:
    """The size of a prefix cache that holds `context` positions, and some snapshots."""
    return context * max(1, position_bytes(bundle.kv_cache)) + (1 + SNAPSHOTS) * bundle.manifest.state_bytes


def common_length(left: Ids, right: Ids) -> int:
    """Length of the common prefix of two sequences of ids."""
    shorter = min(len(left), len(right))
    differing = left[:shorter] != right[:shorter]
    return int(differing.argmax()) if differing.any() else shorter
