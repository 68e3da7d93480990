"""share_tied_head: a head that is the embedding table reads the table's own bytes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, the, untouched

from satchel.graphs.passes.logits.share_tied_head import share_tied_head
from satchel.graphs.passes.normalize.fold_constants import fold_constants

TABLE = normal(1, 11, 7)
IDS = {"ids": np.asarray([[3, 0, 10], [7, 7, 1]])}
TEXT = """(int64[batch,sequence] ids) => (float[batch,sequence,11] y) {
    e = Gather(table, ids) t = Transpose(table) p = MatMul(e, t) y = Neg(p)
}"""


def tied(old: str = "", new: str = "", **weights: np.ndarray) -> ir.Model:
    return fold_constants(build(TEXT, (old, new), **({"table": TABLE} | weights))).model


def test_a_head_that_is_the_table_multiplies_by_the_table_itself() -> None:
    after = fired(share_tied_head, tied(), 1, feeds=IDS).model
    assert operators(after) == {"Gather": 1, "com.microsoft::FusedMatMul": 1, "Neg": 1}
    assert list(after.graph.initializers) == ["table"]
    fused = the(after, "FusedMatMul")
    assert {name: a.value for name, a in fused.attributes.items()} == {"transB": 1}


@pytest.mark.parametrize(
    ("old", "new", "weights"),
    [
        ("e = Gather(table, ids)", "e = Gather(other, ids)", {"other": normal(2, 11, 7)}),
        ("MatMul(e, t)", "MatMul(e, head)", {"head": normal(3, 7, 11)}),
        ("e = Gather(table, ids)", "e = com.microsoft.Gather(table, ids)", {}),
    ],
    ids=["another table is looked up", "a head of its own", "another domain's look-up"],
)
def test_a_head_that_is_not_the_table_is_left_alone(old: str, new: str, weights: dict[str, np.ndarray]) -> None:
    assert untouched(share_tied_head, tied(old, new, **weights)) == []


def test_a_square_table_that_is_read_as_it_is_is_left_alone() -> None:
    square = normal(4, 11, 11)
    text = TEXT.replace("t = Transpose(table) p = MatMul(e, t)", "p = MatMul(e, table)")
    assert untouched(share_tied_head, build(text, table=square)) == []
