"""rotate_values: the cache holds rotated values, and the output projection rotates them back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, expose, fired, normal, run, tag, untouched

from satchel.graphs.analysis.rotations import hadamard, rotation
from satchel.graphs.passes.quantize.rotate_values import rotate_values

HIDDEN, HEADS, KV_HEADS, BATCH, NEW, CAPACITY = 6, 4, 2, 2, 3, 5
HEADER = """(float[batch,sequence,6] x, float[batch,2,capacity,{d}] past_k, float[batch,2,capacity,{d}] past_v,
    int32[batch] last, int32 total) => (float[batch,sequence,7] y)
    <int64[3] sizes = {{ {q}, {v}, {v} }}, int64[3] flat = {{0, 0, {v}}}, int64[4] heads = {{0, 0, 2, {d}}},
     float[batch,sequence,{q}] a, float three = {{3.0}}>"""
PACKED = 'qkv = MatMul(x, "qkv.weight.T")'
BIASED = 'p = MatMul(x, "qkv.weight.T") qkv = Add(p, "qkv.bias")'
GROUPED = "com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2, scale = 0.3>"
ATTEND = f"a, pk, pv = {GROUPED}(qkv, , , past_k, past_v, last, total)"
SPLIT = "q, k, v = Split<axis = -1>(qkv, sizes)"
APART = f"a, pk, pv = {GROUPED}(q, k, v, past_k, past_v, last, total)"
OWN = 'qkv = MatMul(x, "qkv.weight.T") q, k, w = Split<axis = -1>(qkv, sizes) v = MatMul(x, "v.weight.T")'
END = 'y = MatMul(a, "o.weight.T")'


def layer(*parts: str, width: int = 16) -> ir.Model:
    q, v = HEADS * width, KV_HEADS * width
    weights = {
        "qkv__weight__T": normal(1, HIDDEN, q + 2 * v), "qkv__bias": normal(2, q + 2 * v),
        "v__weight__T": normal(3, HIDDEN, v), "o__weight__T": normal(4, q, 7), "zero": normal(5, q, q),
    }  # fmt: skip
    text = " ".join(parts)
    used = {name: array for name, array in weights.items() if name.replace("__", ".") in text}
    return build(f"{HEADER.format(d=width, q=q, v=v)} {{ {text} }}", **used)


def feeds(width: int) -> dict[str, np.ndarray]:
    past = np.zeros((BATCH, KV_HEADS, CAPACITY, width), np.float32)
    return {
        "x": normal(6, BATCH, NEW, HIDDEN), "past_k": past, "past_v": past,
        "last": np.full(BATCH, NEW - 1, np.int32), "total": np.asarray(NEW, np.int32),
    }  # fmt: skip


def check(before: ir.Model, width: int = 16) -> ir.Model:
    after = fired(rotate_values, before, 1).model
    wanted, found = run(before, feeds(width))["y"], run(after, feeds(width))["y"]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    return after


@pytest.mark.parametrize("width", [8, 16, 24])
@pytest.mark.parametrize(
    "parts",
    [(PACKED, ATTEND), (BIASED, ATTEND), (PACKED, SPLIT, APART), (BIASED, SPLIT, APART), (OWN, APART)],
    ids=["packed", "packed with a bias", "split", "split with a bias", "a product of its own"],
)
def test_the_output_is_the_same(parts: tuple[str, ...], width: int) -> None:
    check(layer(*parts, END, width=width), width)


@pytest.mark.parametrize(("width", "matrix"), [(16, hadamard(16)), (24, rotation(24))])
def test_the_cache_holds_rotated_values(width: int, matrix: np.ndarray) -> None:
    before = layer(BIASED, ATTEND, END, width=width)
    after = check(before, width)
    for name, turned in (("pv", matrix), ("pk", np.eye(width))):
        wanted, found = (run(expose(m.clone(), name), feeds(width))[name][:, :, :NEW] for m in (before, after))
        np.testing.assert_allclose(found, wanted @ turned, rtol=1e-4, atol=1e-5)


STANDS = "something stands between its values and their linear layer"
REFUSED: dict[str, tuple[ir.Model, str]] = {
    "a norm of the values": (
        layer(PACKED, SPLIT.replace("k, v ", "k, v0 "), "v = Mul(v0, three)", APART, END),
        STANDS,
    ),
    "a gate on the output": (
        layer(PACKED, ATTEND, "s = Sigmoid(a) g = Mul(a, s)", END.replace("(a", "(g")),
        "its output does not go straight into one linear layer",
    ),
    "an output that is multiplied by a number": (
        layer(PACKED, ATTEND, "g = Mul(a, three)", END.replace("(a", "(g")),
        "its output does not go straight into one linear layer",
    ),
    "a computed output projection": (
        layer(PACKED, ATTEND, 'w = Neg("o.weight.T")', END.replace('"o.weight.T"', "w")),
        "its output goes into a linear layer without constant weights",
    ),
    "values that are an output": (expose(layer(PACKED, SPLIT, APART, END), "v"), "v is read by more than one node"),
    "a product that is read elsewhere": (
        layer(PACKED, SPLIT, APART, 'n = Neg(qkv)', END),
        "qkv is read by more than one node",
    ),
    "shared weights": (
        layer(PACKED, 'n = MatMul(x, "qkv.weight.T")', ATTEND, END),
        "qkv.weight.T is read by more than one node: layers share their weights",
    ),
    "a shared output projection": (
        layer(PACKED, ATTEND, 'n = Neg("o.weight.T")', END),
        "o.weight.T is read by more than one node: layers share their weights",
    ),
    "an attribute that is not known": (
        tag(layer(PACKED, ATTEND, END), "GroupQueryAttention", "v_quant_type", "PER_TENSOR"),
        "GroupQueryAttention has an attribute that this pass does not know: v_quant_type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_cannot_be_rotated_are_refused(name: str) -> None:
    before, reason = REFUSED[name]
    assert untouched(rotate_values, before) == [reason]


def test_values_that_another_layer_reads_from_the_cache_stay_as_they_are() -> None:
    second = f'b, pk2, pv2 = {GROUPED}(q, k, v, pk, pv, last, total) c = Add(a, b) y = MatMul(c, "o.weight.T")'
    reasons = untouched(rotate_values, layer(PACKED, SPLIT, APART, second))
    assert reasons == ["its cache is read by several layers"] * 2
