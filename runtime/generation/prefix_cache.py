"""Prefix cache: keys and values of earlier prompts and answers, reused by prompts with a shared prefix."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import CacheSpec
from satchel.runtime.execution.kv_cache import Cache, Kind, KVCache, position_bytes

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Prefix:
    """Token ids [length] int64 and a KV cache of one row with their keys and values. Both are read-only.

    The cache says with which adapter they were computed: those of another one are never reused.
    """

    ids: Ids
    cache: Cache


class PrefixCache:
    """Prefixes up to a memory limit; the least recently used are evicted first. Threads may share one."""

    def __init__(self, spec: CacheSpec, limit: int, border: int | None = None) -> None:
        """`limit` is in bytes; 0 caches nothing. `border` is the model's `rotary_border`.

        A prefix serves only prompts on its own side of the border: `Cache.long` says which that is.
        """
        self._spec = spec
        self._border = border
        self._max_positions = max(0, limit) // position_bytes(spec)
        self._lock = threading.Lock()
        self._prefixes: list[Prefix] = []  # the most recently used one last

    @property
    def max_positions(self) -> int:
        """The number of positions that fit, summed over all prefixes."""
        return self._max_positions

    @property
    def positions(self) -> int:
        """The number of cached positions."""
        with self._lock:
            return sum(len(prefix.ids) for prefix in self._prefixes)

    def longest(self, ids: Ids, adapter: str | None = None) -> tuple[int, Cache | None]:
        """The length of the longest prefix of a prompt `ids` cached with this adapter, and its KV cache; 0 and None if
        there is none.
        """
        return self._longest(ids, (adapter, self.is_long(len(ids))))

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
                common = common_length(prefix.ids, ids) if prefix.cache.kind == kind else 0
                if common and common >= length:
                    length, best = common, prefix
            if best is None:
                return 0, None
            self._prefixes = [prefix for prefix in self._prefixes if prefix is not best] + [best]
            return length, best.cache

    def keep(self, ids: Ids, cache: Cache) -> None:
        """Copy what `cache`, of one row, holds for the first of `ids`, as far as the limit allows."""
        count = min(len(ids), cache.length, self._max_positions)
        if not count:
            return
        ids = ids[:count].copy()
        with self._lock:
            if self._covers(ids, cache.kind):
                return
            self._make_room(ids, cache.kind)  # before the copy, so that both together stay under the limit
        kept = KVCache(self._spec, count, count)
        kept.copy_from(cache, count)
        self.put(Prefix(ids, kept))

    def put(self, prefix: Prefix) -> None:
        """Cache a prefix in place of its own prefixes, and evict others as needed.

        One larger than the limit is not cached, and neither is one that a cached prefix covers, which counts as used.
        """
        with self._lock:
            if len(prefix.ids) <= self._max_positions and not self._covers(prefix.ids, prefix.cache.kind):
                self._make_room(prefix.ids, prefix.cache.kind)
                self._prefixes.append(prefix)

    def _covers(self, ids: Ids, kind: Kind) -> bool:
        """Whether some cached prefix begins with `ids`, which then counts as used. The lock is held."""
        for index in reversed(range(len(self._prefixes))):
            known = self._prefixes[index]
            if known.cache.kind == kind and common_length(known.ids, ids) == len(ids):
                self._prefixes.append(self._prefixes.pop(index))
                return True
        return False

    def _make_room(self, ids: Ids, kind: Kind) -> None:
        """Evict prefixes of `ids`, then others until `ids` fits. The lock is held."""
        others = [old for old in self._prefixes if old.cache.kind != kind or common_length(old.ids, ids) < len(old.ids)]
        while others and sum(len(old.ids) for old in others) > self._max_positions - len(ids):
            others.pop(0)
        self._prefixes = others


def common_length(left: Ids, right: Ids) -> int:
    """Length of the common prefix of two sequences of ids."""
    shorter = min(len(left), len(right))
    differing = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differing[0]) if len(differing) else shorter
