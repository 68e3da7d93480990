"""quantize_kv_cache: decode reads and writes codes, prefill attends in float to what they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from support.attention_graphs import BATCH, TOTAL, Cached, Layer
from support.graphs import fired, rotated, tag, the, untouched

from satchel.graphs.ir.contract import GraphPass
from satchel.graphs.passes.cache.quantize_kv_cache import quantize_kv_cache
from satchel.graphs.passes.fuse.fuse_attention import fuse_attention
from satchel.graphs.passes.fuse.pack_qkv import pack_qkv
from satchel.graphs.passes.static.expand_attention import expand_attention
from satchel.graphs.quant.quantized import KVScales

LAYERS = {
    "plain": Layer(width=64, value_width=64),
    "one head for all": Layer(kv_heads=1),
    "window": Layer(window=4),
    "softcap": Layer(softcap=0.7),
    "heads of 80": Layer(width=80, value_width=80, rotary=80),
    "heads of 128": Layer(width=128, value_width=128, rotary=128),
    "rotation of some channels": Layer(width=48, value_width=48, rotary=16),
    "all at once": Layer(width=32, value_width=32, rotary=16, pairs=True, window=4, softcap=0.7, scale=0.9),
}
ALL = LAYERS["all at once"]
FLOAT_PHASES = ("prefill", "score")
CHUNKS = {"in chunks": (5, 9), "one token last": (TOTAL - 1,), "one by one": tuple(range(1, TOTAL))}


def scales(layer: Layer, seed: int = 3) -> KVScales:
    """Scales under which a few numbers of the standard normal distribution are cut off."""
    sizes = (layer.kv_heads, layer.width)
    key, value = (np.random.default_rng(seed + i).uniform(0.02, 0.03, sizes).astype(np.float32) for i in (0, 1))
    return KVScales(key, value)


def quantized(layer: Layer, phase: str) -> GraphPass:
    return quantize_kv_cache({3: scales(layer)}, phase)


def fused(layer: Layer) -> ir.Model:
    return fuse_attention(layer.graph()).model


def rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x [kv_heads, length, width] as int8 codes for scales [kv_heads, width]."""
    return np.clip(np.rint(x * (np.float32(1) / scale)[:, None]), -128, 127).astype(np.int8)


def spoken(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return codes.astype(np.float32) * scale[:, None]


class Codes(Cached):
    """A layer over an int8 cache, whose unwritten rows hold codes that would show in any sum."""

    def __init__(self, model: ir.Model, batch: int = 1, capacity: int = TOTAL) -> None:
        super().__init__(model, batch, capacity)
        self.cache = {name: np.full(array.shape, 99, np.int8) for name, array in self.cache.items()}


def reference(layer: Layer, tokens: dict[str, np.ndarray], starts: Sequence[int], row: int = 0) -> np.ndarray:
    """The layer's output when each chunk sees its own keys and values in float and those before it by their codes."""
    own, model = scales(layer), fused(layer)
    total, parts = next(iter(tokens.values())).shape[1], []
    cached = Cached(model)
    for start, stop in zip((0, *starts), (*starts, total), strict=True):
        parts.append(cached.feed({n: a[row : row + 1, start:stop] for n, a in tokens.items()}, [stop]))
        for name, scale in (("key", own.key), ("value", own.value)):
            buffer = cached.cache[f"past_key_values.3.{name}"]
            buffer[0, :, start:stop] = spoken(rounded(buffer[0, :, start:stop], scale), scale)
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("phase", FLOAT_PHASES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_first_chunk_is_exactly_what_it_was(name: str, phase: str) -> None:
    layer, tokens = LAYERS[name], LAYERS[name].tokens()
    before = fused(layer)
    after = fired(quantized(layer, phase), before, 1).model
    np.testing.assert_array_equal(Codes(after).feed_chunks(tokens), Cached(before).feed_chunks(tokens))


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", LAYERS)
def test_later_chunks_see_the_past_by_its_codes(name: str, chunks: str) -> None:
    layer, tokens = LAYERS[name], LAYERS[name].tokens()
    found = Codes(quantized(layer, "prefill")(fused(layer)).model).feed_chunks(tokens, *CHUNKS[chunks])
    np.testing.assert_allclose(found, reference(layer, tokens, CHUNKS[chunks]), rtol=1e-5, atol=2e-6)
    assert np.abs(found[0] - layer.plain(tokens)).max() > 1e-3, "rounding must show, or nothing was tested"


@pytest.mark.parametrize("name", LAYERS)
def test_decode_sees_everything_by_its_codes(name: str) -> None:
    layer, tokens = LAYERS[name], LAYERS[name].tokens()
    own = scales(layer)
    found = Codes(fired(quantized(layer, "decode"), fused(layer), 1).model).feed_chunks(tokens, *range(1, TOTAL))
    # The same in float over keys and values that are rounded before they go in, after their rotation.
    outside = dataclasses.replace(layer, rotary=0)
    parts = {"q": tokens["q"]}
    for part, scale in (("k", own.key), ("v", own.value)):
        flat = turned(layer, tokens, part) if part == "k" else tokens[part]
        heads = flat.reshape(TOTAL, layer.kv_heads, -1).swapaxes(0, 1)
        parts[part] = spoken(rounded(heads, scale), scale).swapaxes(0, 1).reshape(1, TOTAL, -1)
    parts["q"] = turned(layer, tokens, "q")
    np.testing.assert_allclose(found[0], outside.plain(parts), rtol=1e-4, atol=2e-5)


def turned(layer: Layer, tokens: dict[str, np.ndarray], part: str) -> np.ndarray:
    """Queries or keys [1, TOTAL, heads * width] after the layer's rotation."""
    if not layer.rotary:
        return tokens[part]
    heads, width = layer.sizes()[part]
    spread = tokens[part][0].reshape(TOTAL, heads, width).swapaxes(0, 1)
    moved = rotated(spread, *layer.tables().values(), layer.pairs).astype(np.float32)
    return moved.swapaxes(0, 1).reshape(1, TOTAL, heads * width)


@pytest.mark.parametrize("name", LAYERS)
def test_a_token_gets_the_same_codes_in_every_phase(name: str) -> None:
    layer, tokens = LAYERS[name], LAYERS[name].tokens()
    caches = []
    for phase, starts in (("prefill", ()), ("score", (5, 9)), ("decode", range(1, TOTAL))):
        cached = Codes(quantized(layer, phase)(fused(layer)).model)
        cached.feed_chunks(tokens, *starts)
        caches.append(cached.cache)
    for name_, codes in caches[0].items():
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, caches[1][name_])
        np.testing.assert_array_equal(codes, caches[2][name_])


@pytest.mark.parametrize("last", ["decode", "prefill"])
def test_rows_of_different_lengths_keep_to_their_own_tokens(last: str) -> None:
    layer, lengths = ALL, [3, 7]
    tokens = layer.tokens(BATCH)
    prompt = Codes(quantized(layer, "prefill")(fused(layer)).model, BATCH)
    first = prompt.feed({n: a[:, : max(lengths)] for n, a in tokens.items()}, lengths)
    step = Codes(quantized(layer, last)(fused(layer)).model, BATCH)
    step.cache = prompt.cache
    new = {n: np.stack([a[row, length : length + 1] for row, length in enumerate(lengths)]) for n, a in tokens.items()}
    found = step.feed(new, [length + 1 for length in lengths])
    for row, length in enumerate(lengths):
        alone = Codes(quantized(layer, "prefill")(fused(layer)).model)
        own = {n: a[row : row + 1, :length] for n, a in tokens.items()}
        np.testing.assert_allclose(first[row, :length], alone.feed(own, [length])[0], rtol=1e-5, atol=2e-6)
        after = Codes(quantized(layer, last)(fused(layer)).model)
        after.cache = alone.cache
        wanted = after.feed({n: a[row : row + 1] for n, a in new.items()}, [length + 1])
        np.testing.assert_allclose(found[row], wanted[0], rtol=1e-5, atol=2e-6)
        for name, codes in step.cache.items():
            np.testing.assert_array_equal(codes[row, :, : length + 1], after.cache[name][0, :, : length + 1])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_packed_queries_keys_and_values_stay_packed(phase: str) -> None:
    layer, rng = Layer(), np.random.default_rng(0)
    widths = {name: heads * width for name, (heads, width) in layer.sizes().items()}
    products = " ".join(f"{n} = MatMul(x, w_{n})" for n in widths)
    inputs = ", ".join(f"float[batch,sequence,{w}] {n}" for n, w in widths.items())
    weights = {f"w_{n}": rng.standard_normal((8, w)).astype(np.float32) for n, w in widths.items()}
    model = layer.graph((inputs, "float[batch,sequence,8] x"), ("q_heads =", f"{products} q_heads ="), **weights)
    packed = pack_qkv(fuse_attention(model).model).model
    assert the(packed, "GroupQueryAttention").inputs[1] is None
    after = fired(quantized(layer, phase), packed, 1).model
    x = rng.standard_normal((1, TOTAL, 8)).astype(np.float32)
    starts = range(1, TOTAL) if phase == "decode" else (5,)
    tokens = {n: (x @ weights[f"w_{n}"]).astype(np.float32) for n in widths}
    wanted = Codes(quantized(layer, phase)(fused(layer)).model).feed_chunks(tokens, *starts)
    found = Codes(after).feed_chunks({"x": x}, *starts)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_an_expanded_layer_is_refused() -> None:
    reasons = untouched(quantized(Layer(), "prefill"), expand_attention(Layer().graph()).model)
    assert reasons == ["its cache is written by TensorScatter, not by GroupQueryAttention"] * 2


GOOD = np.full((2, 16), 0.1, np.float32)
SCALES = {
    "none": ({}, "there are no scales for its cache"),
    "of another layer": ({0: KVScales(GOOD, GOOD)}, "there are no scales for its cache"),
    "of another shape": ({3: KVScales(GOOD[:1], GOOD)}, "its key scales are float32 [1, 16], not float32 [2, 16]"),
    "of another type": (
        {3: KVScales(GOOD, GOOD.astype(np.float64))},
        "its value scales are float64 [2, 16], not float32 [2, 16]",
    ),
    "zero": ({3: KVScales(GOOD, 0 * GOOD)}, "one of its value scales is not finite or not above 0"),
    "not finite": ({3: KVScales(np.inf * GOOD, GOOD)}, "one of its key scales is not finite or not above 0"),
}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", SCALES)
def test_scales_that_do_not_fit_are_refused(name: str, phase: str) -> None:
    own, reason = SCALES[name]
    assert untouched(quantize_kv_cache(own, phase), fused(Layer())) == [reason]


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(quantized(Layer(), "decode"), tag(fused(Layer()), "GroupQueryAttention", "smooth_softmax", 1))
    assert "smooth_softmax" in reason


def test_an_unknown_input_is_refused() -> None:
    model = fused(Layer())
    node = the(model, "GroupQueryAttention")
    node.resize_inputs(12)
    node.replace_input_with(11, node.inputs[0])
    assert untouched(quantized(Layer(), "decode"), model) == [
        "GroupQueryAttention has an input that this pass does not know"
    ]


def test_a_cache_of_another_name_is_refused() -> None:
    model = fused(Layer())
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.3.value")
    past.name = "memory"
    (reason,) = untouched(quantized(Layer(), "prefill"), model)
    assert reason == "its cache is called past_key_values.3.key and memory"


def test_numbers_between_two_codes_fall_to_the_same_side_in_every_phase() -> None:
    layer = Layer()
    own, rng = scales(layer), np.random.default_rng(5)
    tokens = layer.tokens()
    for part, scale in (("k", own.key), ("v", own.value)):
        halves = rng.integers(-150, 150, (TOTAL, *scale.shape)) + 0.5
        tokens[part] = (halves * scale.astype(np.float64)).astype(np.float32).reshape(1, TOTAL, -1)
    found = []
    for phase, starts in (("prefill", ()), ("decode", range(1, TOTAL))):
        cached = Codes(quantized(layer, phase)(fused(layer)).model)
        cached.feed_chunks(tokens, *starts)
        found.append(cached.cache["past_key_values.3.key"])
    np.testing.assert_array_equal(*found)
    assert (found[0].min(), found[0].max()) == (-128, 127)
