"""choose_output: a graph with logits and hidden states keeps one of them, and an identity matrix goes away."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import build, fired, normal, run, untouched

from satchel.graphs.ir.values import IDENTITY
from satchel.graphs.passes.logits.choose_output import choose_output
from satchel.runtime.bundle.contract import HIDDEN_STATES, LOGITS

WEIGHTS = {"table": normal(1, 11, 7), "scale": normal(2, 7), "head": normal(3, 7, 11)}
TEXT = """(int64[batch,sequence] input_ids)
    => (float[batch,sequence,11] logits, float[batch,sequence,7] hidden_states) {
    h = Gather(table, input_ids) n = RMSNormalization<axis = -1>(h, scale) logits = MatMul(n, head)
    hidden_states = MatMul(n, identity)
}"""
FEEDS = {"input_ids": np.arange(6).reshape(2, 3)}


@pytest.mark.parametrize("name", [LOGITS, HIDDEN_STATES])
@pytest.mark.parametrize("turned", [False, True])
def test_one_output_stays_with_what_makes_it(name: str, turned: bool) -> None:
    named = f"{IDENTITY}.rotated" if turned else IDENTITY
    identity = normal(4, 7, 7) if turned else np.eye(7, dtype=np.float32)
    model = build(TEXT, ("identity", f'"{named}"'), **WEIGHTS, **{named: identity})
    after = fired(choose_output(name), model, 1 if turned or name == LOGITS else 2, False).model
    assert [value.name for value in after.graph.outputs] == [name]
    products = [node for node in after.graph if node.op_type == "MatMul"]
    assert len(products) == (1 if turned or name == LOGITS else 0)
    np.testing.assert_allclose(run(after, FEEDS)[name], run(model, FEEDS)[name], rtol=1e-6)


def test_a_graph_of_logits_alone_is_left_alone() -> None:
    alone = TEXT.replace(", float[batch,sequence,7] hidden_states", "")
    alone = alone.replace("hidden_states = MatMul(n, identity)", "")
    assert untouched(choose_output(LOGITS), build(alone, **WEIGHTS)) == []
