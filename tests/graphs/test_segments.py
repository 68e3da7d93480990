"""segments: a graph in pieces of at most one node with large weights, which compute together what the graph does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, normal, run, serialized, session

from satchel.graphs.analysis.segments import Segment, split
from satchel.graphs.analysis.segments import build as build_segment
from satchel.graphs.ir.values import weight

TEXT = """(int64[batch,n] ids, float[batch,n,160] past) => (float[batch,n,160] y, float[batch,n,120] side)
    <float two = {2.0}> {
    e = Gather(table, ids)
    s = Mul(e, small)
    p = MatMul(s, first)
    c = Add(p, past)
    d = Mul(c, two)
    q = MatMul(d, second)
    side = Neg(q)
    r = MatMul(q, third)
    y = Add(r, s)
}"""
WEIGHTS = {
    "table": normal(1, 130, 160), "small": normal(2, 160), "first": normal(3, 160, 160) / 12,
    "second": normal(4, 160, 120) / 12, "third": normal(5, 120, 160) / 12,
}  # fmt: skip
FEEDS = {"ids": np.asarray([[3, 129, 0], [7, 7, 1]]), "past": normal(6, 2, 3, 160)}
OPSETS = {"": 24}


def model() -> ir.Model:
    return build(TEXT, **WEIGHTS)


def one_by_one(segments: list[Segment], feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the pieces, each of which sees what it reads and no more."""
    known = dict(feeds)
    for segment in segments:
        weights = {name: np.ascontiguousarray(lazy.numpy()) for name, lazy in segment.weights.items()}
        given = {name: known[name] for name in segment.reads} | weights
        opened = session(build_segment(segment, {name: array.dtype for name, array in given.items()}, OPSETS))
        assert {value.name for value in opened.get_inputs()} == set(given)
        known |= dict(zip(segment.keeps, opened.run(list(segment.keeps), given), strict=True))
    return known


def test_a_piece_reads_and_keeps_what_crosses_its_edges() -> None:
    segments = split(model(), ["y", "side"])
    assert [s.reads for s in segments] == [("ids",), ("s", "past"), ("d",), ("q", "s")]
    assert [s.keeps for s in segments] == [("s",), ("d",), ("q", "side"), ("y",)]


def test_computed_tables_stay_where_they_are() -> None:
    before = model()
    lazy = weight(before.graph.initializers["second"])
    assert lazy is not None
    lazy.computed = True
    assert [list(s.weights) for s in split(before, ["y"])] == [["table"], ["first"], ["third"]]


@pytest.mark.parametrize("wanted", [["y", "side"], ["y", "side", "c"]])
def test_the_pieces_compute_what_the_graph_computes(wanted: list[str]) -> None:
    before = model()
    content = serialized(before)
    found = one_by_one(split(before, wanted), FEEDS)
    assert serialized(before) == content
    for name, array in run(before, FEEDS).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)


def test_a_node_with_two_outputs_and_an_attribute_is_rebuilt() -> None:
    text = """(float[n,160] x) => (float[n,4] y, int64[n,4] places) <int64[1] four = {4}> {
        p = MatMul(x, first)
        y, places = TopK<axis = 1, largest = 0>(p, four)
    }"""
    before = build(text, first=WEIGHTS["first"])
    feeds = {"x": normal(8, 3, 160)}
    found = one_by_one(split(before, ["y", "places"]), feeds)
    np.testing.assert_array_equal(found["places"], run(before, feeds)["places"])
