"""A computed matrix is stored in half precision; what a checkpoint holds stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support.graphs import build, normal, run

from satchel.graphs.ir.contract import PassResult
from satchel.graphs.ir.weights import from_array
from satchel.graphs.passes.float16.store_linear_float16 import store_linear_float16

TEXT = "(float[2,5] x) => (float[2,3] y) <float[5,3] m> { y = MatMul(x, m) }"


def graph(*, computed: bool) -> ir.Model:
    model = build(TEXT, m=normal(1, 5, 3))
    value = model.graph.initializers["m"]
    value.const_value = from_array("m", normal(1, 5, 3), computed=computed)
    return model


def stored(result: PassResult) -> list[ir.DataType]:
    return [v.dtype for v in result.model.graph.initializers.values() if v.dtype is not None]


def test_a_matrix_of_the_checkpoint_is_refused() -> None:
    model = graph(computed=False)
    result = store_linear_float16(model)
    assert result.count == 0
    assert result.model is model


def test_the_product_is_that_of_the_rounded_matrix() -> None:
    x, matrix = normal(2, 2, 5), normal(1, 5, 3).astype(np.float16).astype(np.float32)
    found = run(store_linear_float16(graph(computed=True)).model, {"x": x})["y"]
    np.testing.assert_allclose(found, x @ matrix, rtol=1e-5, atol=1e-6)
