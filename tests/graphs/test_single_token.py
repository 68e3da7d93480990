"""single_token: the decode graph takes one token at a time."""

from __future__ import annotations

import numpy as np
from support.graphs import build, fired, normal, untouched

from satchel.graphs.passes.cache.single_token import single_token

TEXT = """(int64[batch,sequence] input_ids, int64[batch,total] attention_mask) => (float[batch,sequence,7] y) {
    e = Gather(table, input_ids) y = Neg(e)
}"""
TABLE = normal(1, 5, 7)


def test_the_sequence_becomes_one_wherever_it_is_named() -> None:
    model = build(TEXT, table=TABLE)
    feeds = {"input_ids": np.asarray([[3], [0]]), "attention_mask": np.ones((2, 4), np.int64)}
    after = fired(single_token, model, 1, feeds=feeds, exact=True).model
    shapes = {str(v.name): [str(d) for d in v.shape or ()] for v in [*after.graph.inputs, *after.graph.outputs]}
    assert shapes == {"input_ids": ["batch", "1"], "attention_mask": ["batch", "total"], "y": ["batch", "1", "7"]}
    assert [str(d) for d in after.graph[0].outputs[0].shape or ()] == ["batch", "1", "7"]


def test_a_sequence_that_is_fixed_is_left_alone() -> None:
    for size in ("1", "3"):
        assert untouched(single_token, build(TEXT.replace("sequence", size), table=TABLE)) == []


def test_a_sequence_without_a_name_is_left_alone() -> None:
    assert untouched(single_token, build(TEXT.replace("sequence", "?"), table=TABLE)) == []
