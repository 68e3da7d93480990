"""What was seen is kept up to a limit, found again by what it has in common, and never another's numbers."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from satchel.runtime.bundle.manifest import CacheLayer, CacheSpec
from satchel.runtime.execution.block_pool import BLOCK, BlockPool
from satchel.runtime.execution.kv_cache import KVCache, position_bytes
from satchel.runtime.generation.prefix_cache import Prefix, PrefixCache, common_length

SPEC = CacheSpec(
    "shared", "float32", (CacheLayer(2, 4, 2, "pk0", "pv0", "k0", "v0"), CacheLayer(1, 2, 4, "pk1", "pv1", "k1", "v1"))
)
NOTHING = (0, None)


def store_of(positions: int) -> PrefixCache:
    return PrefixCache(SPEC, positions * position_bytes(SPEC))


def array(ids: str) -> np.ndarray:
    """Letters as ids."""
    return np.array([ord(letter) for letter in ids], np.int64)


def cache_of(ids: str, room: int = 2) -> KVCache:
    """A cache whose numbers tell which ids it holds: each position has its id, and what came before as a fraction."""
    cache = KVCache(SPEC, len(ids) + room, 1000)
    for name, buffer in cache.past.items():
        buffer[:] = np.nan
        for i, letter in enumerate(ids):
            buffer[:, :, i] = ord(letter) + (hash_of(ids[:i]) + len(name)) / 1e4
    cache.advance(len(ids))
    return cache


def hash_of(ids: str) -> int:
    return sum((i + 1) * ord(letter) for i, letter in enumerate(ids)) % 997


def holds(cache: KVCache | None, ids: str) -> bool:
    """Whether a cache begins with what `cache_of(ids)` has."""
    expected = cache_of(ids)
    return cache is not None and all(
        np.array_equal(buffer[:, :, : len(ids)], expected.past[name][:, :, : len(ids)])
        for name, buffer in cache.past.items()
    )


def keep(store: PrefixCache, ids: str) -> None:
    store.keep(array(ids), cache_of(ids))


def known(store: PrefixCache, ids: str) -> int:
    """How many of the first ids the store has, without using them: on a copy of its list."""
    return max((common_length(prefix.ids, array(ids)) for prefix in store._prefixes), default=0)


def test_the_longest_beginning_in_common_is_found() -> None:
    store = store_of(100)
    for ids in ("abcd", "abXYZ", "q"):
        keep(store, ids)
    for ids, count, owner in (("abcdef", 4, "abcd"), ("abX", 3, "abXYZ"), ("abX?", 3, "abXYZ"), ("abc", 3, "abcd")):
        found, cache = store.longest(array(ids))
        assert found == count
        assert holds(cache, owner)
    assert store.longest(array("zab")) == NOTHING
    assert store.longest(array("")) == NOTHING
    assert store.positions == 10


def test_a_copy_is_kept_of_what_the_cache_holds_and_no_more() -> None:
    store, cache = store_of(100), cache_of("abc")
    ids = array("abcdef")
    store.keep(ids, cache)
    ids[:] = 0
    for buffer in cache.past.values():
        buffer[:] = 0
    count, kept = store.longest(array("abcdef"))
    assert count == 3
    assert holds(kept, "abc")
    assert kept.capacity == kept.length == 3


def test_of_prefixes_that_begin_alike_the_longest_is_kept_alone() -> None:
    store = store_of(100)
    for ids in ("ab", "abcd", "abX", "abcdef"):
        keep(store, ids)
    assert store.positions == len("abX") + len("abcdef")
    for ids in ("abc", "abcdef"):
        keep(store, ids)
    store.put(Prefix(array("ab"), cache_of("ab")))
    assert store.positions == len("abX") + len("abcdef")
    assert holds(store.longest(array("abcdef"))[1], "abcdef")


def test_those_that_were_not_used_for_longest_go_first() -> None:
    store = store_of(9)
    for ids in ("aaa", "bbb", "ccc"):
        keep(store, ids)
    assert store.longest(array("a"))[0] == 1  # used, so b is the oldest now
    keep(store, "dd")
    assert [known(store, letter * 3) for letter in "abcd"] == [3, 0, 3, 2]
    keep(store, "cc")  # used: c has it
    keep(store, "eeeee")
    assert [known(store, letter * 3) for letter in "abcde"] == [0, 0, 3, 0, 3]
    assert store.positions == 8


def test_of_what_is_larger_than_the_limit_the_beginning_is_kept() -> None:
    assert position_bytes(SPEC) == (2 * (4 + 2) + 1 * (2 + 4)) * 4
    store = PrefixCache(SPEC, 5 * position_bytes(SPEC) - 1)
    keep(store, "xy")
    store.put(Prefix(array("abcde"), cache_of("abcde")))  # too large: the others stay
    assert (known(store, "xy"), known(store, "abcde")) == (2, 0)
    keep(store, "abcdefgh")
    count, cache = store.longest(array("abcdefgh"))
    assert (count, store.positions, store.max_positions) == (4, 4, 4)
    assert holds(cache, "abcd")


@pytest.mark.parametrize("limit", [0, 1, -5])
def test_a_store_of_nothing_keeps_nothing(limit: int) -> None:
    store = PrefixCache(SPEC, limit)
    keep(store, "abc")
    store.put(Prefix(array("a"), cache_of("a")))
    assert (store.max_positions, store.positions) == (0, 0)
    assert store.longest(array("abc")) == NOTHING


def test_a_cache_that_was_found_stays_whole_when_its_prefix_goes() -> None:
    store = store_of(4)
    keep(store, "abc")
    cache = store.longest(array("abc"))[1]
    keep(store, "wxyz")
    assert known(store, "abc") == 0
    assert holds(cache, "abc")


def test_threads_find_only_what_is_theirs_and_stay_under_the_limit() -> None:
    store = store_of(40)

    def work(seed: int) -> bool:
        rng, right = random.Random(seed), True
        for _ in range(150):
            ids = "".join(rng.choices("ab", k=rng.randint(1, 12)))
            if rng.random() < 0.5:
                keep(store, ids)
            count, cache = store.longest(array(ids))
            right &= not count or holds(cache, ids[:count])
            right &= store.positions <= 40
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_texts_on_two_sides_of_a_border_are_kept_beside_each_other() -> None:
    """Keys of a long text are rotated otherwise: they neither serve a short one nor stand for it."""
    store = PrefixCache(SPEC, 20 * position_bytes(SPEC), border=4)
    long = cache_of("abcdef")
    long.long = True
    store.keep(array("abcdef"), long)
    keep(store, "abc")
    assert store.positions == 9
    assert [store.longest(array(ids))[0] for ids in ("abcd", "abcdx", "abcdef")] == [3, 4, 6]
    assert [store.longest_saved(array(ids))[0] for ids in ("abcd", "abcdx", "abcdefg")] == [3, 3, 6]
    longer = cache_of("abcdefg")
    longer.long = True
    store.keep(array("abcdefg"), longer)
    assert store.positions == 10, "the long prefix is replaced, the short one stays"


def test_prefixes_that_share_blocks_stay_under_the_limit_and_are_not_evicted_without_need() -> None:
    rng, held = random.Random(0), 6
    pool = BlockPool(SPEC, 64)
    store = PrefixCache(SPEC, held * pool.block_bytes)
    evicted = shared = 0
    for _ in range(200):
        stem = "ab"[rng.randrange(2)] * BLOCK * rng.randrange(3)
        ids = array(stem + "".join(rng.choices("cdef", k=rng.randrange(1, BLOCK))))
        cache = pool.new_cache(len(ids), 1000)
        length, found = store.longest(ids)
        if found is not None:
            cache.copy_from(found, length)
        cache.begin(len(ids) - length)
        cache.advance(len(ids) - length)
        before = list(store._prefixes)
        store.keep(ids, cache)
        after = store._prefixes
        assert any(common_length(prefix.ids, ids) == len(ids) for prefix in after)
        lost = [old for old in before if all(old is not prefix for prefix in after)]
        lost = [old for old in lost if common_length(old.ids, ids) < len(old.ids)]
        if lost:  # the last one that went would have been too much
            evicted += 1
            assert blocks_of([*after, lost[-1]]) > held
        shared += sum(len(set(prefix.cache.table)) for prefix in after) > blocks_of(after)
        assert blocks_of(after) <= held
        assert store.nbytes_of(lambda cache: True) == store._bytes == blocks_of(after) * pool.block_bytes
        del cache, found, before, lost
        assert pool.used == blocks_of(store._prefixes)
    assert evicted > 50
    assert shared > 50


def blocks_of(prefixes: list[Prefix]) -> int:
    return len({block for prefix in prefixes for block in prefix.cache.table})
