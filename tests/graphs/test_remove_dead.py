"""remove_dead: what no output depends on goes; inputs are the contract and stay."""

from __future__ import annotations

from support.graphs import build, fired, normal, operators, untouched

from satchel.graphs.passes.normalize.remove_dead import remove_dead


def test_nodes_and_initializers_that_nothing_reads_go() -> None:
    model = build(
        """(float[3] x, float[3] unread) => (float[3] y) <float[3] c = {1.0, 2.0, 3.0}, float[3] d = {1.0, 2.0, 3.0}> {
            a = Neg(x) b = Mul(a, c) e = Abs(b) y = Add(a, d)
        }"""
    )
    after = fired(remove_dead, model, 3, feeds={"x": normal(1, 3), "unread": normal(2, 3)}, exact=True).model
    assert operators(after) == {"Neg": 1, "Add": 1}
    assert list(after.graph.initializers) == ["d"]
    assert [value.name for value in after.graph.inputs] == ["x", "unread"]


def test_a_node_of_which_one_output_is_read_stays() -> None:
    text = "(float[5] x) => (float[2] y) <int64[2] sizes = {2, 3}> { a, b = Split(x, sizes) y = Neg(a) }"
    assert untouched(remove_dead, build(text)) == []


def test_an_initializer_that_is_an_output_stays() -> None:
    assert untouched(remove_dead, build("(float[2] x) => (float[2] c) <float[2] c = {1.0, 2.0}> { }")) == []
