"""add_top_k: the most likely tokens are outputs of their own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, run, untouched

from satchel.graphs.passes.logits.add_top_k import add_top_k

TEXT = "(float[batch,1,{n}] x) => (float[batch,1,{n}] logits) {{ logits = Neg(x) }}"


@pytest.mark.parametrize(("vocabulary", "k"), [(7, 7), (64, 64), (200, 64)])
def test_the_most_likely_tokens_come_out_most_likely_first(vocabulary: int, k: int) -> None:
    after = fired(add_top_k, build(TEXT.format(n=vocabulary)), 1, keeps_signature=False).model
    assert [value.name for value in after.graph.outputs] == ["logits", "top_logits", "top_ids"]
    assert [str(d) for d in after.graph.outputs[2].shape or ()] == ["batch", "1", str(k)]
    assert [value.dtype for value in after.graph.outputs[1:]] == [ir.DataType.FLOAT, ir.DataType.INT64]
    found = run(after, {"x": normal(1, 2, 1, vocabulary)})
    order = np.argsort(-found["logits"], axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(found["top_ids"], order)
    np.testing.assert_array_equal(found["top_logits"], np.take_along_axis(found["logits"], order, -1))


@pytest.mark.parametrize("shape", ["batch,sequence,7", "batch,1,vocabulary", "batch,7"])
def test_logits_of_several_tokens_or_of_unknown_width_are_left_alone(shape: str) -> None:
    assert untouched(add_top_k, build(TEXT.format(n=7).replace("batch,1,7", shape))) == []
