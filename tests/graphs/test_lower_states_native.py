"""lower_states_native: recurrences and convolutions become satchel's own operators, with the same meaning."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, run, tag, the, untouched
from support.native_ops import run_reference

from satchel.graphs.passes.native.lower_states_native import lower_states_native

RECURRENCE = """(float[batch,sequence,{keys}] q, float[batch,sequence,{keys}] k, float[batch,sequence,32] v,
    float[batch,4,6,8] past, float[batch,sequence,{decay}] d, float[batch,sequence,4] b) =>
    (float[batch,sequence,32] y, float[batch,4,6,8] present) <float[batch,sequence,32] r>
    {{ r, present = com.microsoft.LinearAttention<q_num_heads = {groups}, kv_num_heads = 4, scale = 0.5,
    update_rule = "{rule}">(q, k, v, past{inputs}) y = Neg(r) }}"""
INPUTS = {"linear": "", "gated": ", d", "delta": ", , b", "gated_delta": ", d, b"}

CONVOLUTION = """(float[batch,sequence,6] x, float[batch,3,6] past) =>
    (float[batch,sequence,6] y, float[batch,3,6] present) <float[batch,sequence,6] c>
    { c, present = com.microsoft.CausalConvWithState<channels_last = 1, activation = "silu">(x, w, b, past)
    y = Neg(c) }"""


def recurrence(rule: str = "gated_delta", groups: int = 4, decay: int = 4, **changes: str) -> ir.Model:
    text = RECURRENCE.format(rule=rule, groups=groups, keys=6 * groups, decay=decay, inputs=INPUTS[rule])
    return build(changed(text, changes))


def convolution(**changes: str) -> ir.Model:
    return build(changed(CONVOLUTION, changes), w=normal(1, 6, 1, 4), b=normal(2, 6))


def changed(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def agrees(before: ir.Model, feeds: dict[str, np.ndarray], operator: str) -> None:
    """ONNX Runtime on the graph before, and the reference of satchel's operators on the one after."""
    after = fired(lower_states_native, before, 1).model
    assert operators(after)[f"satchel::{operator}"] == 1
    found = run_reference(after, feeds)
    for name, wanted in run(before, feeds).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("groups", "decay"), [(4, 4), (2, 24), (1, 4)])
@pytest.mark.parametrize("rule", INPUTS)
def test_a_recurrence_keeps_its_numbers_and_state(rule: str, groups: int, decay: int) -> None:
    key = normal(2, 2, 7, groups, 6)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    feeds = {
        "q": normal(1, 2, 7, 6 * groups), "k": key.reshape(2, 7, -1), "v": normal(3, 2, 7, 32),
        "past": normal(4, 2, 4, 6, 8), "d": -np.abs(normal(5, 2, 7, decay)), "b": np.abs(normal(6, 2, 7, 4)) / 4,
    }  # fmt: skip
    agrees(recurrence(rule, groups, decay), feeds, "LinearAttention")


@pytest.mark.parametrize("changes", [{}, {', activation = "silu"': ""}, {"(x, w, b, past)": "(x, w, , past)"}], ids=str)
def test_a_convolution_keeps_its_numbers_and_state(changes: dict[str, str]) -> None:
    agrees(convolution(**changes), {"x": normal(3, 2, 5, 6), "past": normal(4, 2, 3, 6)}, "CausalConv")


@pytest.mark.parametrize(
    ("model", "fact"),
    [
        (recurrence(**{"past, d, b": ", d, b"}), "no state"),
        (recurrence(**{"float[batch,4,6,8]": "float16[batch,4,6,8]"}), "float32"),
        (recurrence(**{"float[batch,4,6,8]": "float[batch,4,6,7]"}), "[None, 4, 6, 7]".replace("None", "'batch'")),
        (recurrence(**{"scale = 0.5,": ""}), "scale"),
        (tag(recurrence(), "LinearAttention", "chunk_size", 64), "chunk_size"),
        (convolution(**{"channels_last = 1, ": ""}), "channels"),
        (convolution(**{'"silu"': '"tanh"'}), "tanh"),
        (tag(convolution(), "CausalConvWithState", "dilation", 2), "dilation"),
        (build(CONVOLUTION, w=normal(1, 6, 1, 33), b=normal(2, 6)), "33"),
    ],
)  # fmt: skip
def test_what_the_operators_do_not_have_is_refused(model: ir.Model, fact: str) -> None:
    (reason,) = untouched(lower_states_native, model)
    assert fact in reason


def test_the_operators_are_named_after_those_before() -> None:
    before = recurrence()
    name = the(before, "LinearAttention").name
    assert the(lower_states_native(before).model, "LinearAttention").name == f"{name}.native"
