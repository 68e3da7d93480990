"""Keeps the keys and values of what a generator has seen, for prompts that begin alike."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import CacheSpec
from satchel.runtime.execution.kv_cache import Cache, KVCache, position_bytes

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Prefix:
    """Token ids [length] and a cache of one row that holds their keys and values. Neither may be changed."""

    ids: Ids
    cache: Cache


class PrefixCache:
    """Prefixes up to a limit of memory; those that were not used for longest go first. Threads may share one."""

    def __init__(self, spec: CacheSpec, limit: int) -> None:
        """`limit` is in bytes; 0 keeps nothing."""
        self._spec = spec
        self._most = max(0, limit) // position_bytes(spec)
        self._lock = threading.Lock()
        self._prefixes: list[Prefix] = []  # the one used last at the end

    @property
    def most(self) -> int:
        """The number of positions that fit, all prefixes together."""
        return self._most

    @property
    def positions(self) -> int:
        """The number of positions that are kept."""
        with self._lock:
            return sum(len(prefix.ids) for prefix in self._prefixes)

    def longest(self, ids: Ids) -> tuple[int, Cache | None]:
        """How many of the first ids some prefix has in common with `ids`, and its cache; 0 and None where none has."""
        with self._lock:
            length, best = 0, None
            for prefix in self._prefixes:
                common = common_length(prefix.ids, ids)
                if common and common >= length:
                    length, best = common, prefix
            if best is None:
                return 0, None
            self._prefixes = [prefix for prefix in self._prefixes if prefix is not best] + [best]
            return length, best.cache

    def keep(self, ids: Ids, cache: Cache) -> None:
        """Take a copy of what `cache`, of one row, holds for the first of `ids`, as much of it as the limit allows."""
        count = min(len(ids), cache.length, self._most)
        if not count:
            return
        ids = ids[:count].copy()
        with self._lock:
            if self._covers(ids):
                return
            self._make_room(ids)  # before the copy, so that both together stay under the limit
        kept = KVCache(self._spec, count, count)
        kept.copy_from(cache, count)
        self.put(Prefix(ids, kept))

    def put(self, prefix: Prefix) -> None:
        """Keep a prefix, in place of those that it begins with, and let others go as far as its size demands.

        One that is larger than the limit is not kept, and neither is one that another begins with: that one counts as
        used.
        """
        with self._lock:
            if len(prefix.ids) <= self._most and not self._covers(prefix.ids):
                self._make_room(prefix.ids)
                self._prefixes.append(prefix)

    def _covers(self, ids: Ids) -> bool:
        """Whether some prefix begins with ids; it counts as used then. The lock is held."""
        for index in reversed(range(len(self._prefixes))):
            if common_length(self._prefixes[index].ids, ids) == len(ids):
                self._prefixes.append(self._prefixes.pop(index))
                return True
        return False

    def _make_room(self, ids: Ids) -> None:
        """Drop prefixes that ids begin with, and then others until ids fit. The lock is held."""
        others = [old for old in self._prefixes if common_length(old.ids, ids) < len(old.ids)]
        while others and sum(len(old.ids) for old in others) > self._most - len(ids):
            others.pop(0)
        self._prefixes = others


def common_length(left: Ids, right: Ids) -> int:
    """How many ids two sequences have in common before the first that differs."""
    shorter = min(len(left), len(right))
    differing = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differing[0]) if len(differing) else shorter
