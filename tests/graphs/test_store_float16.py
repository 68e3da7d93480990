"""store_float16: weights are stored in half precision and computed with in single precision."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, run, untouched

from satchel.graphs.passes.float16.store_float16 import store_float16

WEIGHTS = {"table": normal(1, 11, 7), "w": normal(2, 7, 5), "b": normal(3, 5)}
IDS = {"ids": np.asarray([[3, 0, 10], [7, 7, 1]])}
TEXT = """(int64[batch,sequence] ids) => (float[batch,sequence,5] y) <float two = {2.0}> {
    e = Gather(table, ids) p = MatMul(e, w) s = Add(p, b) y = Mul(s, two)
}"""


def layer(old: str = "", new: str = "", **weights: np.ndarray) -> ir.Model:
    return build(TEXT, (old, new), **(WEIGHTS | weights))


def rounded(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float16).astype(np.float32) for name, array in weights.items()}


def check(model: ir.Model, count: int, exact: ir.Model) -> ir.Model:
    """Check that the pass gives what float32 gives on weights rounded to float16, to the last bit."""
    after = fired(store_float16, model, count).model
    np.testing.assert_array_equal(run(after, IDS)["y"], run(exact, IDS)["y"])
    assert np.ptp(run(after, IDS)["y"]) > 0
    return after


def dtypes(model: ir.Model) -> dict[str, str]:
    return {name: value.dtype.name for name, value in model.graph.initializers.items() if value.dtype is not None}


def test_weights_are_stored_in_half_and_cast_before_their_readers() -> None:
    after = check(layer(), 3, layer(**rounded(WEIGHTS)))
    halves = {"table.fp16": "FLOAT16", "w.fp16": "FLOAT16", "b.fp16": "FLOAT16"}
    assert dtypes(after) == halves | {"two": "FLOAT"}
    assert [node.op_type for node in after.graph].count("Cast") == 3


@pytest.mark.parametrize("dtype", [np.int64, np.float16])
def test_weights_that_are_not_float32_are_left_alone(dtype: type) -> None:
    text = "(float[5] x) => (float[5] y) { c = Cast<to = 1>(w) y = Add(x, c) }"
    assert untouched(store_float16, build(text, w=np.arange(5).astype(dtype))) == []


def test_numbers_and_plain_constants_are_left_alone() -> None:
    text = "(float[2] x) => (float[2] y) <float[2] c = {1.5, 2.5}> { a = Add(x, c) y = Mul(a, w) }"
    assert untouched(store_float16, build(text, w=np.asarray(2.5, np.float32))) == []


def test_the_largest_float16_and_an_infinity_are_stored_as_they_are() -> None:
    edge = WEIGHTS["w"].copy()
    edge[0, :3] = 65504, -65504, np.inf
    lazy = store_float16(layer(w=edge)).model.graph.initializers["w.fp16"].const_value
    assert lazy is not None
    np.testing.assert_array_equal(lazy.numpy()[0, :3].astype(np.float32), edge[0, :3])
