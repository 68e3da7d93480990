"""quantize_folded: weights as codes, of which a session makes weights in float16 before any provider sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.codes import rounded, values
from support.graphs import build, fired, normal, operators, run, serialized, untouched

from satchel.graphs.passes.float16.compute_float16 import compute_float16
from satchel.graphs.passes.normalize.lower_opset import lower_opset
from satchel.graphs.passes.quantize.quantize_folded import quantize_folded
from satchel.graphs.quant.recipe import Rule

MATRIX, TABLE = normal(1, 6, 5), normal(2, 11, 6)
TEXT = """(int64[1,3] ids) => (float[1,3,5] logits, float[1,11,3] z)
{ e = Gather(table, ids) logits = MatMul(e, w) c = Transpose<perm = [0, 2, 1]>(e) z = MatMul(table, c) }"""
IDS = {"ids": np.asarray([[3, 0, 10]])}
CODES = {
    "w": rounded("w", np.ascontiguousarray(MATRIX.T), 8, None),
    "table": rounded("table", TABLE, 8, None, symmetric=False),
}
RULES = {name: Rule(bits=8, blocks=("channel",)) for name in CODES}


def graph(w: np.ndarray = MATRIX, table: np.ndarray = TABLE) -> ir.Model:
    return compute_float16(lower_opset(build(TEXT, w=w, table=table)).model).model


def test_all_readers_read_what_the_codes_stand_for() -> None:
    after = fired(quantize_folded(CODES, RULES), graph(), 2).model
    assert operators(after)["DequantizeLinear"] == 2, "the table's two readers share one"
    exact = graph(values(CODES["w"]).T, values(CODES["table"]))
    for name, array in run(exact, IDS).items():
        np.testing.assert_allclose(run(after, IDS)[name], array, rtol=2e-3, atol=2e-3)
    assert {v.dtype.name for n, v in after.graph.initializers.items() if "codes" in n and v.dtype} == {"INT8", "UINT8"}


def test_a_session_that_folds_leaves_no_code(tmp_path: Path) -> None:
    after = quantize_folded(CODES, RULES)(graph()).model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    ort.InferenceSession(serialized(after), options, providers=["CPUExecutionProvider"])
    saved = ir.load(tmp_path / "saved.onnx").graph
    assert not [node for node in saved if "Quantize" in node.op_type or "Dequantize" in node.op_type]
    halves = [v for v in saved.initializers.values() if v.dtype == ir.DataType.FLOAT16 and v.const_value.size > 16]
    assert sorted(v.const_value.size for v in halves if v.const_value is not None) == [30, 66]


@pytest.mark.parametrize(
    ("codes", "rule", "says"),
    [
        (rounded("w", MATRIX.T.copy(), 4, None), RULES["w"], "no weights in 4 bits"),
        (rounded("w", normal(1, 5, 32), 8, 32), RULES["w"], "no scales for blocks"),
        (CODES["w"], Rule(bits=8, blocks=("channel",), prefill="token", decode="token"), "activations in int8"),
        (rounded("w", normal(1, 5, 7), 8, None), RULES["w"], "another shape"),
    ],
)
def test_what_has_no_form_is_refused(codes: object, rule: Rule, says: str) -> None:
    (reason,) = untouched(quantize_folded({"w": codes}, {"w": rule}), graph())  # type: ignore[dict-item]
    assert says in reason


def test_other_weights_are_left_alone() -> None:
    assert untouched(quantize_folded({"other": CODES["w"]}, {"other": RULES["w"]}), graph()) == []
