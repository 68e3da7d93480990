"""lower_attention_native: GroupQueryAttention becomes satchel's own operator, with the same inputs and meaning."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from support.attention_graphs import BATCH, TOTAL, Cached, Layer
from support.graphs import fired, operators, tag, the, untouched
from support.native_ops import ByReference

from satchel.graphs.ir.values import heads_of
from satchel.graphs.passes.cache.quantize_kv_cache import quantize_kv_cache
from satchel.graphs.passes.fuse.fuse_attention import fuse_attention
from satchel.graphs.passes.native.lower_attention_native import lower_attention_native
from satchel.graphs.quant.quantized import KVScales

LAYERS = {
    "plain": Layer(),
    "window": Layer(window=4),
    "softcap": Layer(softcap=0.7),
    "rotation": Layer(rotary=16),
    "all at once": Layer(width=32, value_width=32, rotary=16, pairs=True, window=4, softcap=0.7, scale=0.9),
}
ALL = LAYERS["all at once"]


def fused(layer: Layer) -> ir.Model:
    return fuse_attention(layer.graph()).model


def in_int8(layer: Layer) -> ir.Model:
    model, draw = fused(layer), np.random.default_rng(0)
    shapes = [heads_of(value) for value in the(model, "GroupQueryAttention").inputs[3:5]]
    scales = KVScales(*(draw.uniform(0.01, 0.03, shape).astype(np.float32) for shape in shapes))
    return quantize_kv_cache({3: scales}, "decode")(model).model


def native(layer: Layer, make: Callable[[Layer], ir.Model] = fused) -> tuple[Cached, Cached]:
    """The layer by ONNX Runtime, and by the reference of satchel's own operator."""
    before = make(layer)
    after = fired(lower_attention_native, before, 1).model
    assert operators(after)["satchel::Attention"] == 1
    old, new = Cached(before, 1), Cached(before, 1)
    new.session = ByReference(after)  # type: ignore[assignment]
    return old, new


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("chunks", [(), (5, 9), (TOTAL - 1,)], ids=["at once", "in chunks", "one token last"])
def test_the_numbers_and_the_cache_are_the_same(name: str, chunks: tuple[int, ...]) -> None:
    layer = LAYERS[name]
    old, new = native(layer)
    wanted, found = (cached.feed_chunks(layer.tokens(), *chunks) for cached in (old, new))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    for buffer, array in old.cache.items():
        np.testing.assert_allclose(new.cache[buffer], array, rtol=1e-4, atol=1e-5)


def test_rows_of_different_lengths_see_their_own_tokens() -> None:
    old, new = Cached(fused(ALL), BATCH), Cached(fused(ALL), BATCH)
    new.session = ByReference(lower_attention_native(fused(ALL)).model)  # type: ignore[assignment]
    tokens = {name: array[:, :1] for name, array in ALL.tokens(BATCH).items()}
    for cache in (old.cache, new.cache):
        for index, name in enumerate(cache):
            cache[name] = np.random.default_rng(index).standard_normal(cache[name].shape).astype(np.float32)
    np.testing.assert_allclose(new.feed(tokens, [7, 3]), old.feed(tokens, [7, 3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_cache_in_int8_has_the_same_numbers(name: str) -> None:
    layer = LAYERS[name]
    old, new = native(layer, in_int8)
    wanted, found = (cached.feed_chunks(layer.tokens(), 5, 9) for cached in (old, new))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    for buffer, array in old.cache.items():
        np.testing.assert_array_equal(new.cache[buffer], array)


def test_int8_with_other_scales_is_refused() -> None:
    def lowered(attribute: str, value: object) -> list[str]:
        return untouched(lower_attention_native, tag(in_int8(LAYERS["plain"]), "GroupQueryAttention", attribute, value))

    reason = "its int8 cache has no scale for each head and channel of both keys and values"
    assert lowered("k_quant_type", "PER_TENSOR") == lowered("kv_cache_bit_width", 4) == [reason]
    model = in_int8(LAYERS["plain"])
    the(model, "GroupQueryAttention").replace_input_with(13, None)
    assert untouched(lower_attention_native, model) == [reason]


def test_a_cache_of_another_type_is_refused() -> None:
    model = fused(LAYERS["plain"])
    for value in the(model, "GroupQueryAttention").inputs[3:5]:
        value.type = ir.TensorType(ir.DataType.FLOAT16)  # type: ignore[union-attr]
    assert untouched(lower_attention_native, model) == ["its cache is neither in float32 nor in int8 with scales"]


def test_a_further_input_is_refused() -> None:
    model = fused(LAYERS["plain"])
    node = the(model, "GroupQueryAttention")
    node.resize_inputs(11)
    node.replace_input_with(10, node.inputs[0])
    assert untouched(lower_attention_native, model) == [
        "GroupQueryAttention has an input that the operator does not have"
    ]


def test_an_attribute_that_is_not_known_is_refused() -> None:
    (reason,) = untouched(
        lower_attention_native, tag(fused(LAYERS["plain"]), "GroupQueryAttention", "smooth_softmax", 1)
    )
    assert "smooth_softmax" in reason


def test_no_scale_is_refused() -> None:
    model = tag(fused(LAYERS["plain"]), "GroupQueryAttention", "scale", 0.0)
    assert untouched(lower_attention_native, model) == ["GroupQueryAttention has no scale of its own"]
