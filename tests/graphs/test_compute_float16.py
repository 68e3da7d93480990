"""compute_float16: a float32 graph computes in float16, with float32 where norms and angles need it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, run, the

from satchel.graphs.analysis.element_types import element_types
from satchel.graphs.ir.contract import PassError
from satchel.graphs.passes.float16.compute_float16 import compute_float16

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
WEIGHTS = {"table": normal(1, 11, 8), "gain": 1 + 0.1 * normal(2, 8), "w": normal(3, 8, 8), "head": normal(4, 8, 11)}
IDS = {"ids": np.asarray([[3, 0, 10], [7, 7, 1]])}
NORM = """two = Constant<value = float {2.0}>() square = Pow(e, two) mean = ReduceMean<keepdims = 1>(square, axis)
    moved = Add(mean, epsilon) root = Sqrt(moved) inverse = Reciprocal(root) even = Mul(e, inverse)
    scaled = Mul(even, gain)"""
TEXT = f"""(int64[batch,sequence] ids) => (float[batch,sequence,11] logits)
<int64[1] axis = {{-1}}, float epsilon = {{0.00001}}> {{
    e = Gather(table, ids) {NORM} p = MatMul(scaled, w) r = Add(e, p) logits = MatMul(r, head)
}}"""


def layer(old: str = "", new: str = "", **weights: np.ndarray) -> ir.Model:
    return build(TEXT, (old, new), **(WEIGHTS | weights))


def converted(model: ir.Model) -> ir.Model:
    """What the pass makes of a model, checked by the rules of every pass."""
    count = compute_float16(model).count
    assert count > 0
    return fired(compute_float16, model, count).model


def close(before: ir.Model, after: ir.Model, feeds: dict[str, np.ndarray], tolerance: float = 4e-3) -> None:
    """Check that outputs differ by float16's rounding at most, as a part of the largest."""
    wanted, found = run(before, feeds), run(after, feeds)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        error = np.abs(found[name].astype(np.float64) - array).max() / np.abs(array).max()
        assert 0 < error < tolerance, f"{name}: {error}"


def types(model: ir.Model, op_type: str) -> set[tuple[ir.DataType | None, ...]]:
    """The types of the inputs of each node of that operator, as its definition gives them."""
    known = element_types(model)
    return {tuple(known[v] for v in n.inputs if v is not None) for n in model.graph if n.op_type == op_type}


def test_products_and_the_residual_stream_are_in_float16_and_the_logits_in_float32() -> None:
    before = layer()
    after = converted(before)
    close(before, after, IDS)
    assert types(after, "MatMul") == {(HALF, HALF)}
    assert (HALF, HALF) in types(after, "Add")
    assert after.graph.outputs[0].dtype == FLOAT
    assert set(after.graph.initializers) >= {"table.fp16", "w.fp16", "head.fp16"}
    assert not {"table", "w", "head"} & set(after.graph.initializers)
    assert the(after, "Gather").inputs[1] is after.graph.inputs[0]


def test_a_norm_written_as_arithmetic_stays_in_float32() -> None:
    after = converted(layer())
    for op_type in ("Pow", "ReduceMean", "Sqrt", "Reciprocal"):
        assert {each[0] for each in types(after, op_type)} == {FLOAT}
    assert types(after, "Mul") == {(FLOAT, FLOAT), (HALF, HALF)}  # by the inverse, and by the gain
    assert operators(after)["Cast"] == 3  # up for both readers of the residual, down for the result, the logits


def test_a_layer_norm_written_as_arithmetic_stays_in_float32() -> None:
    change = (
        NORM,
        """average = ReduceMean<keepdims = 1>(e, axis) centered = Sub(e, average) square = Mul(centered, centered)
        mean = ReduceMean<keepdims = 1>(square, axis) moved = Add(mean, epsilon) root = Sqrt(moved)
        even = Div(centered, root) scaled = Mul(even, gain)""",
    )
    large = {"table": 3000 * WEIGHTS["table"]}
    after = converted(layer(*change, **large))
    close(layer(*change, **large), after, IDS)
    assert types(after, "Sub") | types(after, "Div") == {(FLOAT, FLOAT)}
    assert operators(after)["Cast"] == 3


def test_what_follows_the_heads_product_stays_in_float32() -> None:
    end = "logits = MatMul(r, head)"
    change = (end, "m = MatMul(r, head) d = Div(m, epsilon) t = Tanh(d) logits = Mul(t, epsilon)")
    after = converted(layer(*change))
    assert types(after, "Tanh") == {(FLOAT,)}
    assert types(after, "MatMul") == {(HALF, HALF)}
    assert after.graph.outputs[0].dtype == FLOAT


def test_operators_of_com_microsoft_take_float16_and_an_int8_cache_keeps_its_scales() -> None:
    text = """(float[1,2,16] x, float[1,1,c,8] "past_key_values.0.key", float[1,1,c,8] "past_key_values.0.value",
        int32[1] last, int32 total) => (float[1,2,16] y, float[1,1,c,8] k, float[1,1,c,8] v)
        <float[1,1,1,8] s = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0}> {
        n, a, b, sum = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.00001>(x, x, gain)
        q = MatMul(n, wq) kk = MatMul(n, wk)
        y, k, v = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1, scale = 0.5>
            (q, kk, kk, "past_key_values.0.key", "past_key_values.0.value", last, total, , , , , , s, s)
    }"""
    after = converted(build(text, gain=1 + 0.1 * normal(1, 16), wq=normal(2, 16, 16), wk=normal(3, 16, 8)))
    assert [value.dtype for value in after.graph.inputs] == [
        HALF, HALF, HALF, ir.DataType.INT32, ir.DataType.INT32
    ]  # fmt: skip
    assert [value.dtype for value in after.graph.outputs] == [HALF, HALF, HALF]
    (found,) = types(after, "GroupQueryAttention")
    assert found[:5] == (HALF,) * 5
    assert found[-2:] == (FLOAT, FLOAT)
    assert types(after, "SkipSimplifiedLayerNormalization") == {(HALF, HALF, HALF)}
    assert "Cast" not in operators(after)


def test_a_cache_that_where_writes_and_a_mask_are_in_float16() -> None:
    text = """(float[1,1,1,4] x, float[1,1,6,4] past, bool[1,1,6,1] row, float[1,1,1,6] mask)
        => (float[1,1,1,4] y, float[1,1,6,4] present) <int64[4] order = {0, 1, 3, 2}> {
        present = Where(row, x, past) turned = Transpose<perm = [0, 1, 3, 2]>(present) s = MatMul(x, turned)
        t = Add(s, mask) p = Softmax<axis = -1>(t) y = MatMul(p, present)
    }"""
    before = build(text)
    after = converted(before)
    row = np.arange(6).reshape(1, 1, 6, 1) == 3
    mask = np.where(np.arange(6) > 3, -65504, 0).astype(np.float32).reshape(1, 1, 1, 6)
    feeds = {"x": normal(5, 1, 1, 1, 4), "past": normal(6, 1, 1, 6, 4), "mask": mask}
    wanted = run(before, {**feeds, "row": row})
    found = run(after, {name: array.astype(np.float16) for name, array in feeds.items()} | {"row": row})
    for name in wanted:
        assert found[name].dtype == np.float16
        np.testing.assert_allclose(found[name], wanted[name], atol=4e-3, err_msg=name)
    assert "Cast" not in operators(after)


def test_numbers_of_the_graph_stay_finite_and_stay_above_zero() -> None:
    end = "r = Add(e, p)"
    change = (end, "a = Max(p, low) b = Max(a, tiny) r = Add(e, b)")
    text = TEXT.replace("float epsilon", "float low = {-3.4e38}, float tiny = {1e-20}, float epsilon")
    after = converted(build(text.replace(*change), **WEIGHTS))
    low, tiny = (after.graph.initializers[f"{name}.fp16"].const_value for name in ("low", "tiny"))
    assert low is not None and tiny is not None
    assert float(low.numpy()) == -65504
    assert 0 < float(tiny.numpy()) < 1e-7


def test_an_empty_tensor_of_a_number_is_rounded_too() -> None:
    text = """(float[3] x) => (float[3] y) <int64[1] three = {3}> {
        low = ConstantOfShape<value = float[1] {-1e30}>(three) y = Max(x, low) }"""
    after = converted(build(text))
    feeds = {"x": np.asarray([1, -2, -65504], np.float16)}
    np.testing.assert_array_equal(run(after, feeds)["y"], feeds["x"])


def test_angles_of_positions_stay_in_float32() -> None:
    text = """(int64[n] positions, float[n,4] x) => (float[n,4] y) <int64[1] axis = {1}> {
        p = Cast<to = 1>(positions) column = Unsqueeze(p, axis) a = Mul(column, frequencies) c = Cos(a) y = Mul(x, c)
    }"""
    before = build(text, frequencies=np.asarray([1, 0.1, 0.01, 0.001], np.float32))
    after = converted(before)
    feeds = {"positions": np.arange(4001, 4006), "x": 1 + np.abs(normal(1, 5, 4))}
    wanted, found = run(before, feeds)["y"], run(after, feeds | {"x": feeds["x"].astype(np.float16)})["y"]
    np.testing.assert_allclose(found, wanted, atol=4e-3)
    assert types(after, "Cos") == {(FLOAT,)}


def test_a_weight_that_is_stored_in_float16_loses_its_cast() -> None:
    text = "(float[2,8] x) => (float[2,8] y) { wide = Cast<to = 1>(w) y = MatMul(x, wide) }"
    after = converted(build(text, w=normal(1, 8, 8).astype(np.float16)))
    assert operators(after) == {"MatMul": 1}
    assert the(after, "MatMul").inputs[1] is after.graph.initializers["w"]


def test_activations_in_8_bits_are_an_error() -> None:
    text = "(float[2,8] x) => (float[2,8] y) <float one = {1.0}> { q = QuantizeLinear(x, one) y = Cast<to = 1>(q) }"
    with pytest.raises(PassError, match=r"QuantizeLinear.*activations in 8 bits"):
        compute_float16(build(text))
