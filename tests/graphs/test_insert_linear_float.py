"""insert_linear_float: products with float16 weights become satchel's own, a tied head over the table's own bytes."""

from __future__ import annotations

import numpy as np
from support.graphs import build, fired, normal, operators, tag, the, untouched
from support.native_graphs import attributes_of
from support.native_ops import run_reference

from satchel.graphs.ir.values import weight
from satchel.graphs.passes.float16.store_float16 import store_float16
from satchel.graphs.passes.native.fold_gates import fold_gates
from satchel.graphs.passes.native.insert_linear_float import insert_linear_float
from satchel.graphs.quant.quantized import LAYOUT
from satchel.runtime.bundle.contract import Layout

W = normal(1, 64, 40)
TEXT = """(float[batch,n,64] x) => (float[batch,n,40] y) { p = MatMul(x, w) y = Neg(p) }"""
X = {"x": normal(2, 2, 5, 64)}
TABLE = normal(3, 37, 30)
TIED = """(int64[batch,n] ids, float[batch,1,30] x) => (float[batch,n,30] e, float[batch,1,37] y) {
    g = Gather(table, ids)
    e = Neg(g)
    y = com.microsoft.FusedMatMul <transB=1> (x, table)
}"""


def halves(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float64)


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-7 * np.abs(wanted).max())


def test_the_product_is_that_of_the_weight_in_float16() -> None:
    after = fired(insert_linear_float, build(TEXT, w=W), 1).model
    assert attributes_of(after) == {"inputs": 64, "outputs": 40, "bits": 16, "block": 0}
    panels = weight(the(after, "Linear").inputs[1])
    assert panels is not None
    assert panels.meta[LAYOUT] is Layout.PANELS
    assert len(the(after, "Linear").inputs) == 2
    close(run_reference(after, X)["y"], -(X["x"].astype(np.float64) @ halves(W)))


def test_a_gate_is_folded_in() -> None:
    text = """(float[batch,n,64] x) => (float[batch,n,20] y) <int64[2] parts = {20, 20}> {
        p = MatMul(x, w) g, u = Split <axis = -1> (p, parts) a = Relu(g) y = Mul(a, u) }"""
    after = fired(fold_gates, fired(insert_linear_float, build(text, w=W), 1).model, 1).model
    assert list(after.graph.initializers) == ["w.gated_panels"]
    gate, up = np.split(X["x"].astype(np.float64) @ halves(W), 2, axis=-1)
    close(run_reference(after, X)["y"], np.maximum(gate, 0) * up)


def test_a_tied_head_reads_the_table_that_is_looked_up() -> None:
    after = fired(insert_linear_float, build(TIED, table=TABLE), 1).model
    after = fired(store_float16, after, 1).model
    assert operators(after) == {"Gather": 1, "Cast": 1, "Neg": 1, "satchel::TableLinear": 1}
    assert the(after, "Gather").inputs[0] is the(after, "TableLinear").inputs[1]
    feeds = {"ids": np.asarray([[0, 36, 5]]), "x": normal(4, 1, 1, 30)}
    found = run_reference(after, feeds)
    np.testing.assert_array_equal(found["e"], -halves(TABLE)[feeds["ids"]])
    close(found["y"], feeds["x"].astype(np.float64) @ halves(TABLE).T)


def test_a_scaled_head_is_refused() -> None:
    model = tag(build(TIED, table=TABLE), "FusedMatMul", "alpha", 2.0)
    (reason,) = untouched(insert_linear_float, model)
    assert "transB" in reason


def test_an_input_of_unknown_width_is_refused() -> None:
    (reason,) = untouched(insert_linear_float, build(TEXT.replace("64] x", "k] x"), w=W))
    assert "as wide" in reason


def test_what_no_checkpoint_holds_is_left_alone() -> None:
    model = build(TEXT, w=W)
    lazy = weight(model.graph.initializers["w"])
    assert lazy is not None
    lazy.computed = True
    assert untouched(insert_linear_float, model) == []
