"""The KV cache: its size, its length, and that unused capacity costs no memory."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny_bundle import cache_layers

from satchel.runtime.bundle.manifest import CacheLayer, CacheSpec
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.kv_cache import KVCache, position_bytes
from satchel.runtime.util.memory import pss_mib

SPEC = CacheSpec(mode="shared", dtype="float32", layers=cache_layers())


def test_keys_and_values_may_differ_in_width_and_be_of_another_dtype() -> None:
    layer = CacheLayer(3, 8, 4, "pk", "pv", "k", "v")
    spec = CacheSpec("shared", "int8", (layer,))
    cache = KVCache(spec, capacity=5, limit=5)
    assert cache.past["pk"].shape == (1, 3, 5, 8)
    assert cache.past["pv"].shape == (1, 3, 5, 4)
    assert cache.present["v"].dtype == np.int8
    assert (cache.length, cache.nbytes, position_bytes(spec)) == (0, 5 * 3 * (8 + 4), 3 * (8 + 4))


def test_the_length_never_passes_the_capacity() -> None:
    cache = KVCache(SPEC, capacity=4, limit=64)
    cache.advance(3)
    with pytest.raises(PromptError, match=r"3 \+ 2 tokens do not fit 4 positions: raise --max-context"):
        cache.advance(2)
    assert cache.length == 3
    cache.advance(1)
    assert cache.length == cache.capacity == 4


def test_capacity_that_is_not_used_costs_no_memory() -> None:
    before = pss_mib()
    cache = KVCache(SPEC, capacity=1 << 19, limit=1 << 19)
    assert cache.nbytes >= 256 << 20
    assert pss_mib() - before < 16


def test_a_cache_beyond_the_memory_says_what_to_lower() -> None:
    with pytest.raises(PromptError, match=r"not enough memory for a KV cache of .* positions: lower --max-context"):
        KVCache(SPEC, capacity=1 << 50, limit=1 << 50)


def test_a_copy_holds_what_was_copied_and_leaves_the_rest() -> None:
    source, target = KVCache(SPEC, 7, 64), KVCache(SPEC, 5, 64)
    for buffer in source.past.values():
        buffer[:] = np.arange(7)[:, None]
    source.advance(6)
    target.copy_from(source, 4, start=1)
    assert target.length == 4
    assert all(buffer[0, 1, :, 3].tolist() == [0, 1, 2, 3, 0] for buffer in target.past.values())
