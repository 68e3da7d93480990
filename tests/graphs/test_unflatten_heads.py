"""unflatten_heads: what works on each head works beside its token."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, same_numbers, untouched

from satchel.graphs.passes.normalize.unflatten_heads import unflatten_heads

X = {"x": normal(1, 2, 3, 4, 5), "z": normal(2, 2, 3, 20), "other": normal(3, 24, 5)}
TEXT = """(float[batch,sequence,4,5] x, float[batch,sequence,20] z, float[rows,5] other) =>
    (float[batch,sequence,20] y) <int64[2] flat = {-1, 5}, int64[1] last = {-1},
    int64[1] first = {0},
    float[rows,5] h, float[rows,5] g, float[batch,sequence,20] r> {
    h = Reshape(x, flat) g = Reshape(z, flat) s = Mul(h, h) m = ReduceMean(s, last) q = Sqrt(m) n = Div(h, q)
    w = Mul(scale, n) a = Sigmoid(g) p = Mul(w, a) size = Shape(z) r = Reshape(p, size) y = Neg(r) }"""


def gated(*changes: tuple[str, str]) -> ir.Model:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return build(text, scale=normal(4, 5))


def test_a_norm_and_a_gate_of_each_head_stay_beside_its_token() -> None:
    model = gated()
    after = fired(unflatten_heads, model, 1).model
    shapes = {str(v.name): v.shape for node in after.graph for v in node.outputs}
    assert [list(map(str, shapes[name] or ())) for name in ("h", "g")] == [["batch", "sequence", "4", "5"]] * 2
    same_numbers(model, after, X)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ReduceMean(s, last)", "ReduceMean(s, first)"),
        ("a = Sigmoid(g)", "a = Softmax<axis = 0>(g)"),
        ("p = Mul(w, a)", "u = Mul(w, a) p = Add(u, other)"),
    ],
    ids=["a mean over rows", "softmax over rows", "rows from elsewhere"],
)
def test_rows_that_meet_or_come_from_elsewhere_stay(old: str, new: str) -> None:
    assert untouched(unflatten_heads, gated((old, new))) == []


def test_tokens_of_one_head_are_left_as_they_are() -> None:
    model = build(
        """(float[batch,sequence,5] x) => (float[batch,sequence,5] y)
        <int64[2] flat = {-1, 5}, int64[3] back = {2, 3, 5}, float[rows,5] h> {
        h = Reshape(x, flat) a = Sigmoid(h) y = Reshape(a, back) }"""
    )
    assert untouched(unflatten_heads, model) == []
