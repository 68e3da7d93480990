"""scale_products: products that float16 does not hold are computed smaller, with the same result."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, run, untouched

from satchel.graphs.analysis.element_types import element_types
from satchel.graphs.analysis.float32_islands import float32_islands, too_large, write_too_large
from satchel.graphs.ir.contract import PassError
from satchel.graphs.passes.float16.compute_float16 import compute_float16
from satchel.graphs.passes.float16.scale_products import scale_products

WEIGHTS = {"w": 1e-3 * normal(3, 8, 8)}
FEEDS = {"a": 2000 * normal(1, 3, 8), "b": 300 * normal(2, 3, 8)}
TEXT = "(float[n,8] a, float[n,8] b) => (float[n,8] y) { p = Mul(a, b) m = MatMul(p, w) y = Add(m, m) }"


def marked(text: str = TEXT, **sizes: float) -> ir.Model:
    model = build(text, **WEIGHTS)
    write_too_large(model, sizes)
    return model


def test_the_product_is_smaller_and_the_result_the_same_bit_for_bit() -> None:
    after = fired(scale_products, marked(p=4e6), 1, feeds=FEEDS, exact=True).model
    assert too_large(after) == {}
    product = next(value for node in after.graph for value in node.outputs if value.name == "p")
    after.graph.outputs.append(product)
    product.shape, product.type = ir.Shape(["n", 8]), ir.TensorType(ir.DataType.FLOAT)
    largest = np.abs(FEEDS["a"] * FEEDS["b"]).max()
    assert 65504 / 8 < np.abs(run(after, FEEDS)["p"]).max() * 4e6 / largest <= 65504 / 4


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (TEXT, {"p": 4e6, "m": 1e6}),
        (TEXT, {"p": 1e12}),
        (TEXT.replace("Add(m, m)", "Add(m, p)"), {"p": 4e6}),
        (TEXT.replace("Mul(a, b)", "Add(a, b)"), {"p": 4e6}),
        (TEXT.replace("MatMul(p, w)", "MatMul(w, p)").replace("[n,8]", "[8,8]"), {"p": 4e6}),
        (TEXT, {}),
    ],
)
def test_other_values_are_left_for_float32(text: str, sizes: dict[str, float]) -> None:
    model = marked(text, **sizes)
    untouched(scale_products, model)
    assert too_large(scale_products(model).model) == sizes


def test_what_makes_or_reads_a_value_that_is_left_stays_in_float32() -> None:
    model = marked(TEXT.replace("Add(m, m)", "Add(m, p)"), p=4e6)
    half = compute_float16(model).model
    types = element_types(half)
    by_name = {value.name: types[value] for node in half.graph for value in node.outputs}
    assert by_name["p"] == by_name["m"] == ir.DataType.FLOAT
    assert {node.op_type for node in float32_islands(model, element_types(model))} == {"Mul", "MatMul", "Add"}
    assert np.isfinite(run(half, {name: array.astype(np.float16) for name, array in FEEDS.items()})["y"]).all()


def test_a_value_that_a_graph_does_not_have_is_an_error() -> None:
    with pytest.raises(PassError, match=r"gone reaches 4e.06, and float16 ends at 65504.*--target cpu"):
        compute_float16(marked(gone=4e6))
