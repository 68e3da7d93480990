"""take_last_token: the last token is gathered by an index that comes in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from support.graphs import build, fired, normal, operators, run, untouched

from satchel.graphs.ir.inputs import Lengths
from satchel.graphs.passes.cache.drop_inputs import drop_inputs
from satchel.graphs.passes.logits.slice_last_logits import slice_last_logits
from satchel.graphs.passes.logits.take_last_token import take_last_token
from satchel.graphs.passes.static.fix_shapes import fix_shapes

WEIGHT = normal(2, 6, 11)
TEXT = """(int64[batch,sequence] input_ids, int64[batch,total] attention_mask, float[batch,sequence,6] x)
=> (float[batch,sequence,11] logits) { logits = MatMul(x, w) }"""
X = normal(1, 1, 5, 6)


def sliced() -> ir.Model:
    return slice_last_logits(build(TEXT, w=WEIGHT)).model


def test_the_row_is_the_one_that_is_asked_for() -> None:
    model = fix_shapes(Lengths(5, 9))(sliced()).model
    after = drop_inputs(fired(take_last_token, model, 1, keeps_signature=False).model).model
    assert operators(after) == {"Gather": 1, "MatMul": 1}
    assert [v.name for v in after.graph.inputs] == ["x", "last_token"]
    for index in (0, 3, 4):
        found = run(after, {"x": X, "last_token": np.asarray([index])})["logits"]
        np.testing.assert_allclose(found, X[:, index : index + 1] @ WEIGHT, rtol=1e-5)


def test_shapes_that_vary_are_refused() -> None:
    assert untouched(take_last_token, sliced()) == ["its input is not [1, tokens, n]"]


def test_other_look_ups_are_left_alone() -> None:
    assert untouched(take_last_token, build(TEXT, w=WEIGHT)) == []
