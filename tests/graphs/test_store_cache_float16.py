"""store_cache_float16: satchel's own attention reads and writes keys and values in half precision."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support.attention_graphs import Cached, Layer
from support.graphs import fired, the, untouched
from support.native_ops import ByReference

from satchel.graphs.ir.values import Builder
from satchel.graphs.passes.fuse.fuse_attention import fuse_attention
from satchel.graphs.passes.native.lower_attention_native import lower_attention_native
from satchel.graphs.passes.native.store_cache_float16 import store_cache_float16

LAYER = Layer(width=32, value_width=32, rotary=16, window=4)


def native() -> ir.Model:
    return lower_attention_native(fuse_attention(LAYER.graph()).model).model


def cached(model: ir.Model, dtype: type[np.floating]) -> Cached:
    """Chunks of tokens by the reference of satchel's own operator, over a cache of this type."""
    made = Cached(fuse_attention(LAYER.graph()).model)
    made.session = ByReference(model)  # type: ignore[assignment]
    made.cache = {name: array.astype(dtype) for name, array in made.cache.items()}
    return made


def test_the_cache_has_the_nearest_halves_and_the_numbers_follow_from_them() -> None:
    before = native()
    after = fired(store_cache_float16, before, 1).model
    old, new = cached(before, np.float32), cached(after, np.float16)
    wanted, found = (each.feed_chunks(LAYER.tokens(), 5, 9) for each in (old, new))
    size = np.abs(wanted).max()
    assert 0 < np.abs(found - wanted).max() < 2e-3 * size
    for name, array in old.cache.items():
        assert new.cache[name].dtype == np.float16
        np.testing.assert_allclose(new.cache[name], array, rtol=2.0**-11, atol=1e-6)


def test_a_cache_that_another_operator_reads_stays_in_float32_and_so_do_all() -> None:
    model = native()
    node = the(model, "Attention")
    past = node.inputs[3]
    assert past is not None
    seen = Builder(model, node).value("Identity", [past], "seen")
    model.graph.outputs.append(seen)
    assert untouched(store_cache_float16, model) == ["it takes past_key_values.3.key in float32"]


def test_a_graph_of_other_attention_is_left_as_it_is() -> None:
    assert untouched(store_cache_float16, fuse_attention(LAYER.graph()).model) == []
