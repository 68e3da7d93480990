"""normalize_slices: a slice that takes whole parts of a Concat reads those parts."""

from __future__ import annotations

import pytest
from support.graphs import build, fired, normal, operators, untouched

from satchel.graphs.passes.normalize.normalize_slices import normalize_slices

X = {"a": normal(1, 2, 3, 4), "b": normal(2, 2, 3, 6), "c": normal(3, 2, 3, 2)}
TEXT = """(float[batch,sequence,4] a, float[batch,sequence,6] b, float[batch,sequence,2] c)
    => (float[batch,sequence,n] y)
    <int64[1] start = {4}, int64[1] end = {10}, int64[1] axis = {2}> {
    whole = Concat<axis = -1>(a, b, c)
    part = Slice(whole, start, end, axis)
    y = Neg(part)
}"""


@pytest.mark.parametrize(
    ("start", "end", "left"),
    [(4, 10, 0), (0, 4, 0), (10, 9223372036854775807, 0), (-2, 12, 0), (0, 10, 1), (4, 12, 1)],
)
def test_whole_parts_are_read_where_they_come_from(start: int, end: int, left: int) -> None:
    model = build(TEXT.replace("start = {4}", f"start = {{{start}}}").replace("end = {10}", f"end = {{{end}}}"))
    after = fired(normalize_slices, model, 1, feeds=X, exact=True).model
    assert operators(after).get("Slice", 0) == 0
    assert operators(after).get("Concat", 0) <= left + 1  # the old one is dead and is removed later


@pytest.mark.parametrize(
    ("old", "new"),
    [("start = {4}", "start = {5}"), ("axis = {2}", "axis = {1}"), ("[batch,sequence,4] a", "[batch,sequence,k] a")],
)
def test_other_slices_are_left_alone(old: str, new: str) -> None:
    assert untouched(normalize_slices, build(TEXT.replace(old, new))) == []
