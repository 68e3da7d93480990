"""stream_tied_head: a tied head for one row per sequence reads the table as it lies."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, untouched

from satchel.graphs.passes.logits.stream_tied_head import stream_tied_head

TABLE = normal(1, 11, 7)
TEXT = """(float[batch,1,7] x) => (float[batch,1,11] y) {
    p = com.microsoft.FusedMatMul <transB=1> (x, table) y = Neg(p)
}"""


def head(old: str = "", new: str = "") -> ir.Model:
    return build(TEXT, (old, new), table=TABLE)


def with_shape(model: ir.Model, rows: int | str) -> ir.Model:
    for node in model.graph:
        node.outputs[0].shape = ir.Shape(["batch", rows, 11])
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_the_table_comes_first_in_the_product(batch: int) -> None:
    model = with_shape(head(), 1)
    after = fired(stream_tied_head, model, 1, feeds={"x": normal(2, batch, 1, 7)}).model
    assert operators(after) == {"Reshape": 1, "Transpose": 2, "MatMul": 1, "Unsqueeze": 1, "Neg": 1}
    product = next(node for node in after.graph if node.op_type == "MatMul")
    assert product.inputs[0].name == "table"


def test_a_head_over_all_positions_is_left_alone() -> None:
    text = TEXT.replace("batch,1,", "batch,sequence,")
    assert untouched(stream_tied_head, build(text, table=TABLE)) == []


def test_a_product_that_scales_is_refused() -> None:
    (reason,) = untouched(stream_tied_head, with_shape(head("transB=1", "transB=1, alpha=2.0"), 1))
    assert "scales or transposes in another way" in reason
