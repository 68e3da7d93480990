"""lower_embedding_matmul: a tied head multiplies by the table's codes with satchel's own operator."""

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

TABLE = normal(1, 37, 96)
TEXT = """(int64[batch,sequence] ids, float[batch,rows,96] x) => (float[batch,sequence,96] e, float[batch,rows,37] y)
    <float[batch,rows,37] p> {
    e = Gather(table, ids)
    p = com.microsoft.FusedMatMul <transB=1> (x, table)
    y = Neg(p)
}"""
FEEDS = {"ids": np.asarray([[0, 36, 5]]), "x": normal(2, 1, 3, 96)}
BITS = "it is not quantized to 8 bits, or has zero points, a bias or another input"
BLOCKS = "its group size is not a power of two that divides its inputs"


def tied(bits: int = 8, block: int = 32, symmetric: bool = True, level: int = 4) -> ir.Model:
    codes = rounded("table", TABLE, bits, block, symmetric)
    return quantize_embeddings({"table": codes}, level)(build(TEXT, table=TABLE)).model


@pytest.mark.parametrize("block", [16, 32])
def test_the_head_gives_the_same_numbers_over_the_same_bytes(block: int) -> None:
    before = tied(block=block)
    after = fired(lower_embedding_matmul, before, 1).model
    assert operators(after) == {"com.microsoft::GatherBlockQuantized": 1, "satchel::TableLinear": 1, "Neg": 1}
    looked_up, multiplied = the(after, "GatherBlockQuantized").inputs[0], the(after, "TableLinear").inputs[1]
    assert weight(looked_up).base is weight(multiplied).base  # type: ignore[union-attr]
    wanted, found = run(before, FEEDS), run_reference(after, FEEDS)
    np.testing.assert_array_equal(found["e"], wanted["e"])
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=0, atol=1e-5 * np.abs(wanted["y"]).max())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False)])
def test_4_bits_and_zero_points_are_refused(bits: int, symmetric: bool) -> None:
    assert untouched(lower_embedding_matmul, tied(bits, symmetric=symmetric)) == [BITS]


def test_a_bias_is_refused() -> None:
    model = tied()
    node = the(model, "MatMulNBits")
    node.resize_inputs(6)
    node.replace_input_with(5, node.inputs[2])
    assert untouched(lower_embedding_matmul, model) == [BITS]


def test_a_product_in_float_is_refused() -> None:
    assert untouched(lower_embedding_matmul, tied(level=0)) == [
        "the linear layer takes its input as it is, not rounded to int8"
    ]


@pytest.mark.parametrize("block", [48, 8])
def test_other_blocks_are_refused(block: int) -> None:
    assert untouched(lower_embedding_matmul, tied(block=block)) == [BLOCKS]


def test_an_attribute_that_is_not_known_is_refused() -> None:
    (reason,) = untouched(lower_embedding_matmul, tag(tied(), "MatMulNBits", "other", 1))
    assert "other" in reason


def test_codes_that_nothing_looks_up_are_left_alone() -> None:
    model = tied()
    gather = the(model, "GatherBlockQuantized")
    other = rounded("other", TABLE, 8, 32).rows()[0]
    other_table = ir.Value(name="other", shape=ir.Shape(other.dims), type=ir.TensorType(other.dtype), const_value=other)
    model.graph.register_initializer(other_table)
    gather.replace_input_with(0, other_table)
    assert untouched(lower_embedding_matmul, model) == []
