"""pack_qkv: queries, keys and values come from one product, and reach the attention in one tensor where they can."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, the, untouched

from satchel.graphs.passes.fuse.pack_qkv import pack_qkv

HIDDEN, SIZES = 7, {"q": 32, "k": 16, "v": 16}
PATH = "layers__0__attn__"
WEIGHTS = {f"{PATH}{n}_proj__weight__T": normal(i, HIDDEN, w) / 4 for i, (n, w) in enumerate(SIZES.items())}
BIASES = {f"{PATH}{n}_proj__bias": normal(i + 5, w) for i, (n, w) in enumerate(SIZES.items())}
FEEDS = {
    "x": normal(11, 2, 3, HIDDEN),
    "other": normal(12, 2, 3, HIDDEN),
    "past_k": np.zeros((2, 1, 5, 16), np.float32),
    "past_v": np.zeros((2, 1, 5, 16), np.float32),
    "last": np.asarray([2, 2], np.int32),
    "total": np.asarray(3, np.int32),
}
HEAD = """(float[batch,sequence,7] x, float[batch,sequence,7] other, float[batch,1,capacity,16] past_k,
    float[batch,1,capacity,16] past_v, int32[batch] last, int32 total) => (float[batch,sequence,32] y)
    <int64[4] heads = {0, 0, -1, 16}, int64[3] flat_q = {0, 0, 32}, int64[3] flat_k = {0, 0, 16}>"""


def products(n: str = "") -> str:
    """The three products; `n` is put behind the names of their results."""
    return " ".join(f'{part}{n} = MatMul(x, "layers.0.attn.{part}_proj.weight.T")' for part in SIZES)


def attention(n: str = "") -> str:
    """The attention over q, k and v; `n` is put behind these names and those of its results."""
    return f"""a{n}, pk{n}, pv{n} = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1, scale = 0.3>(
        q{n}, k{n}, v{n}, past_k, past_v, last, total)"""


PRODUCTS = products()
BIASED = " ".join(
    f'{n}p = MatMul(x, "layers.0.attn.{n}_proj.weight.T") {n} = Add({n}p, "layers.0.attn.{n}_proj.bias")' for n in SIZES
)


def layer(nodes: str = PRODUCTS, *changes: tuple[str, str], **weights: np.ndarray) -> ir.Model:
    """x -> `nodes` -> q, k, v -> GroupQueryAttention -> Neg -> y, with pieces of the text replaced."""
    text = f"{HEAD} {{ {nodes} {attention()} y = Neg(a) }}"
    return build(text, *changes, **(WEIGHTS | weights))


def check(model: ir.Model, count: int) -> ir.Model:
    return fired(pack_qkv, model, count, feeds=FEEDS).model


def test_three_products_become_one_that_feeds_the_attention_directly() -> None:
    after = check(layer(), 2)
    assert operators(after) == {"MatMul": 1, "com.microsoft::GroupQueryAttention": 1, "Neg": 1}
    assert the(after, "MatMul").name == "layers.0.attn.qkv_proj"
    assert list(after.graph.initializers)[-1] == "layers.0.attn.qkv_proj.weight.T"
    assert the(after, "GroupQueryAttention").inputs[1:3] == (None, None)
    assert [str(d) for d in the(after, "MatMul").outputs[0].shape or ()] == ["batch", "sequence", "64"]


def test_biases_are_packed_too() -> None:
    after = check(layer(BIASED, **BIASES), 2)
    assert operators(after) == {"MatMul": 1, "Add": 1, "com.microsoft::GroupQueryAttention": 1, "Neg": 1}
    value = after.graph.initializers["layers.0.attn.qkv_proj.bias"].const_value
    assert value is not None
    np.testing.assert_array_equal(value.numpy(), np.concatenate(list(BIASES.values())))


NORMED = (
    PRODUCTS.replace("q = ", "q0 = ").replace("k = ", "k0 = ")
    + """
    q1 = Reshape(q0, heads) q2 = RMSNormalization(q1, scale) q = Reshape(q2, flat_q)
    k1 = Reshape(k0, heads) k2 = RMSNormalization(k1, scale) k = Reshape(k2, flat_k)"""
)


def test_norms_of_the_heads_stay_between_a_split_and_the_attention() -> None:
    after = check(layer(NORMED, scale=normal(9, 16)), 1)
    assert operators(after)["MatMul"] == 1
    assert operators(after)["Split"] == 1
    assert the(after, "GroupQueryAttention").inputs[1] is not None


PACKED = "p = MatMul(x, whole) "
SPLIT = "q, k, v = Split<axis = {axis}>(p, sizes)"
SLICES = """
    q = Slice(p, zero, at_32, axis)
    k = Slice(p, at_32, at_48, axis2, one)
    v = Slice(p, at_48, end, axis)
"""
NUMBERS = """int64[3] sizes = {32, 16, 16}, int64[4] first_four = {16, 32, 16, 16},
    int64[4] last_four = {32, 16, 16, 16}, int64[1] zero = {0}, int64[1] one = {1},
    int64[1] two = {2}, int64[1] at_16 = {16}, int64[1] at_32 = {32}, int64[1] at_48 = {48}, int64[1] axis = {-1},
    int64[1] end = {9223372036854775807}, int64[1] axis2 = {2}"""


def packed(parts: str, width: int = 64) -> ir.Model:
    """The layer with one product p whose `parts` are queries, keys and values."""
    return layer(PACKED + parts, ("<int64[4] heads", f"<{NUMBERS}, int64[4] heads"), whole=normal(8, HIDDEN, width) / 4)


@pytest.mark.parametrize(
    "parts", [SPLIT.format(axis=-1), SPLIT.format(axis=2), SLICES], ids=["split", "axis 2", "slices"]
)
def test_a_product_that_is_packed_already_feeds_the_attention_directly(parts: str) -> None:
    after = check(packed(parts), 1)
    assert operators(after) == {"MatMul": 1, "com.microsoft::GroupQueryAttention": 1, "Neg": 1}


@pytest.mark.parametrize(
    ("parts", "old", "new"),
    [
        (SPLIT.format(axis=-1), "q, k, v", "q, v, k"),
        (SLICES, "at_48, end", "zero, at_16"),
        (SLICES, "at_32, at_48", "zero, at_16"),
        (SPLIT.format(axis=-1), "q, k, v", "first, q, k, v"),
        (SPLIT.format(axis=-1), "q, k, v", "q, k, v, rest"),
        (SLICES, "at_48, end, axis)", "at_48, end, axis, two)"),
    ],
    ids=[
        "keys and values swapped",
        "values from the start",
        "a hole",
        "something in front",
        "something behind",
        "every second channel",
    ],
)
def test_parts_that_are_not_the_whole_in_order_are_left_alone(parts: str, old: str, new: str) -> None:
    assert old in parts
    sizes = {"first, q, k, v": "first_four", "q, k, v, rest": "last_four"}.get(new, "sizes")
    parts = parts.replace(old, new).replace("sizes", sizes)
    assert untouched(pack_qkv, packed(parts, 64 if sizes == "sizes" and "two" not in new else 80)) == []


def test_products_of_different_inputs_are_refused() -> None:
    model = layer(PRODUCTS, ("v = MatMul(x", "v = MatMul(other"))
    assert untouched(pack_qkv, model) == ["the linear layers do not read the same input"]


def test_products_of_which_some_have_a_bias_are_refused() -> None:
    mixed = BIASED.replace("kp = MatMul", "k = MatMul").replace('k = Add(kp, "layers.0.attn.k_proj.bias")', "")
    model = layer(mixed, **{name: b for name, b in BIASES.items() if "k_proj" not in name})
    assert untouched(pack_qkv, model) == ["some of the linear layers have a bias and some have none"]


def test_layers_that_share_their_weights_are_packed_once() -> None:
    nodes = f"{products()} {attention()} {products('_2')} {attention('_2')} y = Add(a, a_2)"
    result = fired(pack_qkv, build(f"{HEAD} {{ {nodes} }}", **WEIGHTS), 2)
    assert [refusal.reason for refusal in result.refusals] == [
        "layers.0.attn.qkv_proj.weight.T exists already: the layers share their weights"
    ]


@pytest.mark.parametrize(
    ("nodes", "old", "new"),
    [
        (BIASED, '"layers.0.attn.v_proj.bias"', "number"),
        (PRODUCTS, 'v = MatMul(x, "layers.0.attn.v_proj.weight.T")', "v = Reshape(k, flat_k)"),
        (PRODUCTS, 'MatMul(x, "layers.0.attn.v_proj.weight.T")', "MatMul(x, computed)"),
        (PRODUCTS, "v = MatMul", "v0 = MatMul"),
    ],
    ids=["a bias of one number", "values that are the keys", "a computed matrix", "another operator between"],
)
def test_what_is_not_three_products_of_weights_is_left_alone(nodes: str, old: str, new: str) -> None:
    assert old in nodes
    nodes = nodes.replace(old, new) + (" v = Tanh(v0)" if "v0" in new else "")
    given = BIASES if nodes.count("bias") else {}
    start = "computed = Neg(plain) " if "computed" in new else ""
    model = layer(start + nodes, plain=normal(6, HIDDEN, 16), number=normal(7, 1), **given)
    assert untouched(pack_qkv, model) == []
