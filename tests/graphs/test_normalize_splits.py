"""normalize_splits: parts that are handed out through a sequence come from one Split."""

from __future__ import annotations

import pytest
from support.graphs import build, fired, normal, operators, tag, the, untouched

from satchel.graphs.ir.values import constant
from satchel.graphs.passes.normalize.normalize_splits import normalize_splits

X = {"x": normal(1, 2, 3, 10)}
TEXT = """(float[batch,sequence,10] x) => (float[batch,sequence,n] a, float[batch,sequence,m] b)
    <int64[2] sizes = {4, 6}, int64 first = {0}, int64 second = {1}> {
    parts = SplitToSequence<axis = -1>(x, sizes)
    low = SequenceAt(parts, first)
    high = SequenceAt(parts, second)
    a = Neg(low)
    b = Exp(high)
}"""


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [("int64[2] sizes = {4, 6}", [4, 6]), ("int64 sizes = {5}", [5, 5]), ("int64 sizes = {7}", [7, 3])],
)
def test_parts_read_by_number_come_from_a_split_of_the_same_sizes(sizes: str, expected: list[int]) -> None:
    model = build(TEXT.replace("int64[2] sizes = {4, 6}", sizes))
    after = fired(normalize_splits, model, 1, feeds=X, exact=True).model
    assert operators(after) == {"Split": 1, "Neg": 1, "Exp": 1}
    lengths = constant(the(after, "Split").inputs[1])
    assert lengths is not None
    assert lengths.tolist() == expected


def test_parts_may_be_read_out_of_order_and_left_out() -> None:
    text = TEXT.replace("{4, 6}", "{4, 3, 3}").replace("int64[2]", "int64[3]").replace("first = {0}", "first = {2}")
    after = fired(normalize_splits, build(text), 1, feeds=X, exact=True).model
    assert operators(after) == {"Split": 1, "Neg": 1, "Exp": 1}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("float[batch,sequence,10] x", "float[batch,sequence,width] x", "the size of the axis, or of the parts"),
        ("<axis = -1>", "<axis = 1>", "the size of the axis, or of the parts"),
        ("(x, sizes)", "(x)", "the size of the axis, or of the parts"),
        ("SequenceAt(parts, first)", "ConcatFromSequence<axis = 0>(parts)", "not read by numbers"),
    ],
)
def test_what_is_not_known_is_left_alone_with_the_reason(old: str, new: str, reason: str) -> None:
    (found,) = untouched(normalize_splits, build(TEXT, (old, new)))
    assert reason in found


def test_an_attribute_that_is_not_known_is_refused() -> None:
    (found,) = untouched(normalize_splits, tag(build(TEXT), "SplitToSequence", "padding", 1))
    assert "padding" in found
