"""lower_embedding_matmul: a tied head multiplies by the table's panels with satchel's own operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.codes import rounded
from support.graphs import build, fired, normal, operators, run, tag, the, untouched
from support.native_ops import run_reference

from satchel.graphs.ir.values import weight
from satchel.graphs.passes.native.lower_embedding_matmul import lower_embedding_matmul
from satchel.graphs.passes.quantize.quantize_embeddings import quantize_embeddings
from satchel.graphs.quant.quantized import LAYOUT, QuantizedWeight
from satchel.runtime.bundle.contract import Layout

TABLE = normal(1, 37, 96)
TEXT = """(int64[batch,sequence] ids, float[batch,rows,96] x) => (float[batch,sequence,96] e, float[batch,rows,37] y)
    <float[batch,rows,37] p> {
    e = Gather(table, ids)
    p = com.microsoft.FusedMatMul <transB=1> (x, table)
    y = Neg(p)
}"""
FEEDS = {"ids": np.asarray([[0, 36, 5]]), "x": normal(2, 1, 3, 96)}
OTHER_INPUT = "it has a bias or another input"


def codes(bits: int = 8, block: int = 32, symmetric: bool = True) -> dict[str, QuantizedWeight]:
    return {"table": rounded("table", TABLE, bits, block, symmetric)}


def tied(weights: dict[str, QuantizedWeight], level: int = 4) -> ir.Model:
    return quantize_embeddings(weights, level)(build(TEXT, table=TABLE)).model


@pytest.mark.parametrize(("bits", "block", "symmetric"), [(8, 32, True), (8, 16, False), (4, 32, True), (4, 32, False)])
def test_the_head_gives_the_same_numbers(bits: int, block: int, symmetric: bool) -> None:
    weights = codes(bits, block, symmetric)
    before = tied(weights)
    after = fired(lower_embedding_matmul(weights), before, 1).model
    assert operators(after) == {"com.microsoft::GatherBlockQuantized": 1, "satchel::Linear": 1, "Neg": 1}
    panels = weight(the(after, "Linear").inputs[1])
    assert panels is not None
    assert (panels.meta[LAYOUT], panels.dims) == (Layout.PANELS, (3, 16 * 96 * bits // 8))
    wanted, found = run(before, FEEDS), run_reference(after, FEEDS)
    np.testing.assert_array_equal(found["e"], wanted["e"])
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=0, atol=1e-5 * np.abs(wanted["y"]).max())


def test_a_bias_is_refused() -> None:
    model = tied(codes())
    node = the(model, "MatMulNBits")
    node.resize_inputs(6)
    node.replace_input_with(5, node.inputs[2])
    assert untouched(lower_embedding_matmul(codes()), model) == [OTHER_INPUT]


def test_a_product_in_float_is_refused() -> None:
    assert untouched(lower_embedding_matmul(codes()), tied(codes(), level=0)) == [
        "the linear layer takes its input as it is, not rounded to int8"
    ]


def test_groups_that_the_operator_does_not_take_are_refused() -> None:
    weights = codes(block=4)
    assert untouched(lower_embedding_matmul(weights), tied(weights)) == [
        "the operator does not support how the table is quantized"
    ]


def test_an_attribute_that_is_not_known_is_refused() -> None:
    (reason,) = untouched(lower_embedding_matmul(codes()), tag(tied(codes()), "MatMulNBits", "other", 1))
    assert "other" in reason


def test_quantized_values_that_are_no_table_are_left_alone() -> None:
    assert untouched(lower_embedding_matmul({}), tied(codes())) == []
    assert untouched(lower_embedding_matmul({"other": rounded("other", TABLE)}), tied(codes())) == []
