"""sink_channels: transposes around convolutions move together and go away."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, same_numbers, untouched

from satchel.graphs.passes.normalize.remove_identity import remove_identity
from satchel.graphs.passes.normalize.sink_channels import sink_channels

X = {"x": normal(1, 2, 3, 8), "z": normal(2, 2, 3, 4)}


def channels(nodes: str) -> ir.Model:
    """x [batch, sequence, 8] -> t [batch, 8, sequence] -> `nodes`, which make r [batch, 4, sequence] -> y."""
    return build(
        """(float[batch,sequence,8] x, float[batch,sequence,4] z) => (float[batch,sequence,4] y)
        <int64[2] halves = {4, 4}, float half = {0.5}> {
        t = Transpose<perm = [0, 2, 1]>(x) a, b = Split<axis = 1>(t, halves) @ y = Transpose<perm = [0, 2, 1]>(r) }
        """.replace("@", nodes),
        w=normal(3, 4, 4), rows=normal(4, 4, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ("r = Mul(a, b)", 2),
        ("c = Sigmoid(a) r = Mul(c, b)", 3),
        ("c = Mul(half, a) r = Add(c, b)", 3),
        ("c = MatMul(w, a) r = Add(c, b)", 3),
        ("q = Transpose<perm = [0, 2, 1]>(z) r = Mul(q, b)", 2),
    ],
)
def test_no_transpose_is_left_around_what_works_on_each_token(nodes: str, count: int) -> None:
    model = channels(nodes)
    after = remove_identity(fired(sink_channels, model, count).model).model
    assert operators(after)["Transpose"] == 0
    same_numbers(model, after, X)


@pytest.mark.parametrize(
    "nodes",
    ["r = Mul(a, rows)", "r = Softmax<axis = 1>(a)", "c = Transpose<perm = [0, 1, 2]>(b) r = Mul(a, c)"],
    ids=["one number for each channel", "another operator", "another order of axes"],
)
def test_the_transpose_stays_in_front_of_anything_else(nodes: str) -> None:
    model = channels(nodes)
    after = fired(sink_channels, model, 1).model  # the Split alone
    assert operators(after)["Transpose"] >= 2
    same_numbers(model, after, X)


def test_an_axis_that_is_not_the_channels_is_left_alone() -> None:
    model = build(
        """(float[batch,4,8] x) => (float[batch,8,2] y) <int64[2] halves = {2, 2}> {
        t = Transpose<perm = [0, 2, 1]>(x) a, b = Split<axis = 2>(t, halves) y = Sub(a, b) }"""
    )
    assert untouched(sink_channels, model) == []
