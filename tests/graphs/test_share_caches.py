"""share_caches: layers that attend to the same keys and values have one cache, in all forms of attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.attention_graphs import BATCH, Cached, Layer
from support.graphs import fired, operators, the, untouched

from satchel.graphs.ir.contract import GraphPass
from satchel.graphs.passes.fuse.fuse_attention import fuse_attention
from satchel.graphs.passes.fuse.share_caches import share_caches
from satchel.graphs.passes.native.lower_attention_native import lower_attention_native
from satchel.graphs.passes.static.expand_attention import expand_attention

WINDOW = 4
KINDS = {
    "fused": (fuse_attention, Layer()),
    "fused, rotation within": (fuse_attention, Layer(rotary=16)),
    "expanded": (expand_attention, Layer(width=7, value_width=5)),
}


def two_layers(layer: Layer, *changes: tuple[str, str]) -> ir.Model:
    """Layer 3, and layer 5 with the same keys and values in a window; the output is their sum."""
    form, width = "turned" if layer.rotary else "moved", layer.value_width
    attention = f"satchel.Attention<layer = 5, scale = 0.31, window = {WINDOW}, softcap = 0.0>"
    return layer.graph(
        ("] mixed>", f"] mixed, float[batch,sequence,6,{width}] second>"),
        ("y = Reshape(mixed", f"second = {attention}(q_{form}, k_{form}, v_moved) y = Reshape(sum"),
        ("y = Reshape(sum", "sum = Add(mixed, second) y = Reshape(sum"),
        *changes,
    )  # fmt: skip


def plain(layer: Layer, tokens: dict[str, np.ndarray], row: int, length: int) -> np.ndarray:
    windowed = Layer(**{**vars(layer), "window": WINDOW})
    return layer.plain(tokens, row, length) + windowed.plain(tokens, row, length)


def lowered(lower: GraphPass, layer: Layer) -> ir.Model:
    return lower(fired(share_caches, two_layers(layer), 1).model).model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts", [(), (5, 9), tuple(range(1, 13))])
def test_two_layers_have_one_cache_and_mean_the_same(kind: str, starts: tuple[int, ...]) -> None:
    lower, layer = KINDS[kind]
    cached, tokens = Cached(lowered(lower, layer)), layer.tokens()
    assert list(cached.cache) == ["past_key_values.3.key", "past_key_values.3.value"]
    found = cached.feed_chunks(tokens, *starts)[0]
    np.testing.assert_allclose(found, plain(layer, tokens, 0, 13), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_keep_to_their_own_tokens(kind: str) -> None:
    lower, layer = KINDS[kind]
    cached, tokens, lengths = Cached(lowered(lower, layer), BATCH), layer.tokens(BATCH), [3, 7]
    prompt = cached.feed({n: a[:, : max(lengths)] for n, a in tokens.items()}, lengths)
    new = {n: np.stack([a[row, length : length + 1] for row, length in enumerate(lengths)]) for n, a in tokens.items()}
    step = cached.feed(new, [length + 1 for length in lengths])
    for row, length in enumerate(lengths):
        wanted = plain(layer, tokens, row, length + 1)
        np.testing.assert_allclose(prompt[row, :length], wanted[:length], rtol=1e-5, atol=4e-6)
        np.testing.assert_allclose(step[row, 0], wanted[-1], rtol=1e-5, atol=4e-6)


def test_the_second_layer_names_all_outputs() -> None:
    """ONNX Runtime 1.30 crashes where the operator has no names for its present."""
    model = lowered(fuse_attention, Layer())
    assert [[bool(v.name) for v in n.outputs] for n in model.graph if n.op_type == "GroupQueryAttention"] == [
        [True] * 3
    ] * 2


def test_layers_that_share_only_their_values_have_caches_of_their_own() -> None:
    other = ("second = satchel.Attention", "k_other = Relu(k_moved) second = satchel.Attention")
    model = two_layers(Layer(), other)
    second = [node for node in model.graph if node.op_type == "Attention"][1]
    second.replace_input_with(1, the(model, "Relu").outputs[0])
    assert untouched(share_caches, model) == []


def test_satchels_operator_leaves_the_second_layer_as_it_is() -> None:
    result = lower_attention_native(lowered(fuse_attention, Layer()))
    assert operators(result.model)["com.microsoft::GroupQueryAttention"] == 1
    assert operators(result.model)["satchel::Attention"] == 1
    assert [refusal.reason for refusal in result.refusals] == ["it reads the cache of another layer"]
