"""fold_key_norms: a recurrence reads one value and normalizes queries and keys itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, untouched
from support.native_ops import run_reference

from satchel.graphs.passes.native.fold_key_norms import fold_key_norms

ROOT = 6**-0.5
TEXT = f"""(float[batch,sequence,56] x, float[batch,4,6,8] past, float[batch,sequence,4] d, float[batch,sequence,4] b)
    => (float[batch,sequence,32] y, float[batch,4,6,8] present) <int64[3] sizes = {{12, 12, 32}}, float c = {{{ROOT}}},
    int64[4] heads = {{0, 0, 2, 6}}, int64[3] flat = {{0, 0, 12}}, float[6] ones = {{1, 1, 1, 1, 1, 1}},
    float[batch,sequence,2,6] qh, float[batch,sequence,2,6] kh> {{
    q, k, v = Split<axis = -1>(x, sizes) qh = Reshape(q, heads) kh = Reshape(k, heads)
    qn = RMSNormalization<epsilon = 0.01>(qh, ones) kn = RMSNormalization<epsilon = 0.01>(kh, ones) ks = Mul(kn, c)
    qf = Reshape(qn, flat) kf = Reshape(ks, flat)
    y, present = satchel.LinearAttention<q_num_heads = 2, kv_num_heads = 4, scale = 0.5,
    update_rule = "gated_delta">(qf, kf, v, past, d, b) }}"""


def graph(*changes: tuple[str, str]) -> ir.Model:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return build(text)


def test_the_numbers_and_the_state_are_the_same() -> None:
    before = graph()
    after = fired(fold_key_norms, before, 1).model
    feeds = {
        "x": normal(1, 2, 7, 56), "past": normal(2, 2, 4, 6, 8), "d": -np.abs(normal(3, 2, 7, 4)),
        "b": np.abs(normal(4, 2, 7, 4)) / 4,
    }  # fmt: skip
    found = run_reference(after, feeds)
    for name, wanted in run_reference(before, feeds).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (("(qf, kf, v,", "(qf, kf, x,"), "parts"),
        (("(qf, kf, v,", "(kf, qf, v,"), "parts"),
        (("0.01>(kh", "0.02>(kh"), "different norms"),
        ((f"{{{ROOT}}}", "{0.4}"), "long"),
        (("qh = Reshape(q, heads)", "qh = Reshape(q, heads) u = Neg(v) w = Neg(u)"), "something else"),
    ],
)
def test_other_norms_and_readers_are_refused(change: tuple[str, str], fact: str) -> None:
    (reason,) = untouched(fold_key_norms, graph(change))
    assert fact in reason


@pytest.mark.parametrize(
    "change", [("{1, 1, 1, 1, 1, 1}", "{1, 1, 1, 2, 1, 1}"), ("(qf, kf,", "(q, kf,"), ("Mul(kn, c)", "Neg(kn)")]
)
def test_what_has_no_such_norms_is_left_alone(change: tuple[str, str]) -> None:
    assert untouched(fold_key_norms, graph(change)) == []


def test_the_nodes_in_front_are_not_needed_any_more() -> None:
    after = fold_key_norms(graph()).model
    node = next(node for node in after.graph if node.op_type == "LinearAttention")
    assert [value.name if value is not None else "" for value in node.inputs] == ["x", "", "", "past", "d", "b"]
    assert operators(after)["satchel::LinearAttention"] == 1
