"""fix_shapes: every named dimension becomes a number, and each Reshape says all of its own."""

from __future__ import annotations

from support.graphs import build, fired, normal, the

from satchel.graphs.ir.inputs import Lengths
from satchel.graphs.ir.values import constant, dims
from satchel.graphs.passes.static.fix_shapes import fix_shapes

FIX = fix_shapes(Lengths(tokens=5, capacity=9))
TEXT = """(float[batch,sequence,6] x, float[batch,2,capacity,3] past) => (float[batch,sequence,2,3] y, float[batch,2,capacity,3] z)
<int64[4] shape = {0, 0, 2, 3}, float two = {2.0}> { y = Reshape(x, shape) z = Mul(past, two) }"""  # noqa: E501
FEEDS = {"x": normal(1, 1, 5, 6), "past": normal(2, 1, 2, 9, 3)}


def test_all_names_become_numbers() -> None:
    after = fired(FIX, build(TEXT), 5, keeps_signature=False, feeds=FEEDS, exact=True).model
    shapes = {v.name: dims(v) for v in (*after.graph.inputs, *after.graph.outputs)}
    assert shapes == {"x": [1, 5, 6], "past": [1, 2, 9, 3], "y": [1, 5, 2, 3], "z": [1, 2, 9, 3]}
    assert constant(the(after, "Reshape").inputs[1]).tolist() == [1, 5, 2, 3]  # type: ignore[union-attr]


def test_a_result_whose_shape_nobody_noted_is_worked_out() -> None:
    text = TEXT.replace("{0, 0, 2, 3}", "{0, -1, 2, 3}")
    model = build(text)
    the(model, "Reshape").outputs[0].shape = None
    assert dims(the(FIX(model).model, "Reshape").outputs[0]) == [1, 5, 2, 3]


def test_a_reshape_to_what_cannot_be_known_is_refused() -> None:
    text = "(float[batch,sequence,6] x, int64[2] shape) => (float[?,?] y) { y = Reshape(x, shape) }"
    assert [refusal.reason for refusal in FIX(build(text)).refusals] == ["what it reshapes to cannot be known"]
