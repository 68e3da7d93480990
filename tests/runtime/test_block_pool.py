"""Sequences in blocks of a pool hold what they would hold in a buffer of their own, whatever they share."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import CacheLayer, CacheSpec
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.batch import PoolFullError
from satchel.runtime.execution.block_pool import BLOCK, BlockPool, PagedCache
from satchel.runtime.execution.kv_cache import KVCache, in_file

SPEC = CacheSpec(
    "shared",
    "float32",
    (
        CacheLayer(2, 3, 5, "past.0.key", "past.0.value", "present.0.key", "present.0.value"),
        CacheLayer(1, 4, 4, "past.1.key", "past.1.value", "present.1.key", "present.1.value"),
    ),
)
CAPACITY = 5 * BLOCK


def write(cache: PagedCache, count: int, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Append random positions as a graph does: through the table. Returns them by input."""
    start = cache.length
    cache.begin(count)
    written = {}
    for name, memory in cache.pool.past.items():
        new = rng.normal(size=(1, memory.shape[1], count, memory.shape[3])).astype(np.float32)
        for i in range(count):
            place = start + i
            memory[cache.table[place // BLOCK], :, place % BLOCK] = new[0, :, i]
        written[name] = new
    cache.advance(count)
    return written


@pytest.mark.parametrize("seed", range(8))
def test_shared_blocks_are_copied_before_they_are_written(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = BlockPool(SPEC, 40)
    caches = [PagedCache(pool, CAPACITY, CAPACITY) for _ in range(5)]
    expected: list[dict[str, NDArray[np.float32]]] = [
        {name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32) for name, each in pool.past.items()}
        for _ in caches
    ]
    empty = expected[0]
    for _ in range(60):
        index, other = rng.integers(len(caches), size=2)
        cache, action = caches[index], rng.integers(4)
        if action == 0 and index != other:
            count = int(rng.integers(caches[other].length + 1))
            cache.copy_from(caches[other], count)
            expected[index] = {name: held[:, :, :count] for name, held in expected[other].items()}
        elif action == 1:
            length = int(rng.integers(cache.length + 1))
            cache.shorten(length)
            expected[index] = {name: held[:, :, :length] for name, held in expected[index].items()}
        elif action == 2 and rng.random() < 0.3:
            cache.clear()
            expected[index] = empty
        elif (room := CAPACITY - cache.length) > 0:
            written = write(cache, int(rng.integers(1, min(room, 90) + 1)), rng)
            expected[index] = {name: np.concatenate([held, written[name]], 2) for name, held in expected[index].items()}
        for each, held in zip(caches, expected, strict=True):
            for name in pool.past:
                np.testing.assert_array_equal(each.past[name], held[name])
    for cache in caches:
        cache.clear()
    assert pool.used == 0


def test_a_shared_beginning_is_there_once() -> None:
    rng = np.random.default_rng(0)
    pool = BlockPool(SPEC, 40)
    first, second = (PagedCache(pool, CAPACITY, CAPACITY) for _ in range(2))
    write(first, 3 * BLOCK + 7, rng)
    second.copy_from(first, 3 * BLOCK + 7)
    assert pool.used == 4
    write(second, 1, rng)
    assert pool.used == 5  # the block in the middle of which they part
    assert second.table[:3] == first.table[:3]


def test_what_nothing_refers_to_is_free() -> None:
    pool = BlockPool(SPEC, 4)
    cache = PagedCache(pool, CAPACITY, CAPACITY)
    write(cache, 2 * BLOCK, np.random.default_rng(0))
    kept = cache.kept(BLOCK + 1)
    del cache
    gc.collect()
    assert (pool.used, kept.length) == (2, BLOCK + 1)
    del kept
    gc.collect()
    assert pool.used == 0


def test_a_full_pool_is_told_and_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    pool = BlockPool(SPEC, 2)
    cache = PagedCache(pool, CAPACITY, CAPACITY)
    written = write(cache, 2 * BLOCK, rng)
    assert (cache.missing(1), cache.missing(2 * BLOCK)) == (1, 2)
    with pytest.raises(PoolFullError):
        cache.begin(1)
    np.testing.assert_array_equal(cache.past["past.0.key"], written["past.0.key"])
    with pytest.raises(PromptError, match=str(CAPACITY)):
        cache.begin(CAPACITY)


def test_copies_from_and_to_other_memory() -> None:
    rng = np.random.default_rng(0)
    cache, other = (PagedCache(BlockPool(SPEC, 8), CAPACITY, CAPACITY) for _ in range(2))
    written = write(cache, BLOCK + 9, rng)
    plain, file = KVCache(SPEC, CAPACITY, CAPACITY), in_file(SPEC, cache)
    plain.copy_from(cache, BLOCK + 3)
    other.copy_from(plain, BLOCK + 2)
    for name, held in written.items():
        np.testing.assert_array_equal(plain.past[name][:, :, : BLOCK + 3], held[:, :, : BLOCK + 3])
        np.testing.assert_array_equal(other.past[name], held[:, :, : BLOCK + 2])
        np.testing.assert_array_equal(file.past[name], held)
    assert (other.length, file.length) == (BLOCK + 2, BLOCK + 9)
