"""slice_final_logits: the head works on the last position only, which no shape and no mask has to tell."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, run, untouched

from satchel.graphs.passes.logits.slice_final_logits import slice_final_logits
from satchel.graphs.passes.logits.slice_last_logits import slice_last_logits

WEIGHTS = {"table": normal(1, 11, 7), "scale": normal(2, 7), "head": normal(3, 7, 11)}
TEXT = """(int64[batch,sequence] input_ids, int64[batch,total] attention_mask)
    => (float[batch,sequence,11] logits) <float cap = {2.5}> {
    e = Gather(table, input_ids) h = Relu(e) n = RMSNormalization<axis = -1>(h, scale) p = MatMul(n, head)
    d = Div(p, cap) t = Tanh(d) logits = Mul(t, cap)
}"""


def feeds(new: int, total: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(6).integers(0, 11, (2, new))
    return {"input_ids": ids, "attention_mask": np.ones((2, total), np.int64)}


@pytest.mark.parametrize(("new", "total"), [(5, 5), (1, 1), (3, 13), (1, 20)])
def test_the_logits_are_those_of_the_last_position(new: int, total: int) -> None:
    model = build(TEXT, **WEIGHTS)
    after = fired(slice_final_logits, model, 1).model
    given = feeds(new, total)
    found, wanted = run(after, given)["logits"], run(model, given)["logits"]
    assert found.shape == (2, 1, 11)
    np.testing.assert_allclose(found[:, 0], wanted[:, -1], rtol=1e-5, atol=1e-6)


def test_logits_that_are_sliced_already_are_left_alone() -> None:
    sliced: ir.Model = slice_last_logits(build(TEXT, **WEIGHTS)).model
    assert untouched(slice_final_logits, sliced) == []
