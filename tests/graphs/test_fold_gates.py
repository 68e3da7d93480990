"""fold_gates: the product of a gated layer multiplies its two halves."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import expose, fired, normal, operators, tag, untouched
from support.native_graphs import attributes_of, codes_of, same_by_reference, with_linears

from satchel.graphs.passes.native.fold_biases import fold_biases
from satchel.graphs.passes.native.fold_gates import fold_gates

SILU, GELU, TANH, RELU = (
    "s = Sigmoid(g) a = Mul(g, s)",
    "a = Gelu(g)",
    'a = Gelu <approximate = "tanh"> (g)',
    "a = Relu(g)",
)
TEXT = """(float[batch,n,64] x) => (float[batch,n,20] y) <int64[2] halves = {20, 20}> {
    p = MatMul(x, "layer.weight.T")
    g, u = Split <axis = -1> (p, halves)
    ACT
    y = Mul(a, u)
}"""
X = {"x": normal(2, 2, 3, 64)}
CODES = codes_of()
UNKNOWN = "its activation is not one that the operator knows, or the first half is read by something else too"


def model(activation: str = SILU, text: str = TEXT) -> ir.Model:
    return with_linears(text.replace("ACT", activation), CODES)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("activation", "name"),
    [(SILU, "silu"), (SILU.replace("g, s", "s, g"), "silu"), (GELU, "gelu"), (TANH, "gelu_tanh"), (RELU, "relu")],
)
def test_a_gate_is_computed_by_the_product(activation: str, name: str, swapped: bool) -> None:
    before = model(activation, TEXT.replace("Mul(a, u)", "Mul(u, a)") if swapped else TEXT)
    after = fired(fold_gates, before, 1).model
    assert operators(after) == {"satchel::Linear": 1}
    assert attributes_of(after)["gate"] == name
    assert sorted(after.graph.initializers) == ["layer.weight.T.gated_panel_scales", "layer.weight.T.gated_panels"]
    same_by_reference(before, after, X)


def test_a_bias_is_added_before_the_gate() -> None:
    text = TEXT.replace("(p, halves)", "(b, halves)").replace("g, u =", 'b = Add(p, "layer.bias") g, u =')
    before = with_linears(text.replace("ACT", SILU), CODES, layer__bias=normal(3, 40))
    after = fired(fold_gates, fired(fold_biases, before, 1).model, 1).model
    assert operators(after) == {"satchel::Linear": 1}
    same_by_reference(before, after, X)


def test_a_split_along_another_axis_is_refused() -> None:
    text = TEXT.replace("axis = -1", "axis = 1").replace("float[batch,n,20] y", "float[batch,20,40] y")
    assert untouched(fold_gates, model(RELU, text)) == ["the linear layer is not split into two halves of its outputs"]


def test_a_gate_in_the_second_half_is_refused() -> None:
    text = TEXT.replace("Mul(a, u)", "Mul(a, g)")
    reasons = untouched(fold_gates, model("s = Sigmoid(u) a = Mul(u, s)", text))
    assert reasons == ["the second half is not multiplied as it is, or is read by something else too"]


@pytest.mark.parametrize(
    "activation",
    ["a = Tanh(g)", "s = Tanh(g) a = Mul(g, s)", "s = Sigmoid(g) a = Add(g, s)", "s = Sigmoid(u) a = Mul(g, s)"],
)
def test_another_activation_is_refused(activation: str) -> None:
    (reason,) = untouched(fold_gates, model(activation))
    assert reason in (UNKNOWN, "the second half is not multiplied as it is, or is read by something else too")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("g", UNKNOWN),
        ("u", "the second half is not multiplied as it is, or is read by something else too"),
        ("s", "the activation's sigmoid is read by something else too"),
        ("a", UNKNOWN),
    ],
)
def test_parts_that_something_else_reads_are_refused(name: str, reason: str) -> None:
    assert untouched(fold_gates, expose(model(), name)) == [reason]


def test_an_attribute_that_is_not_known_is_refused() -> None:
    (reason,) = untouched(fold_gates, tag(model(GELU), "Gelu", "other", 1))
    assert "other" in reason


def test_a_split_that_is_no_gate_is_left_alone() -> None:
    assert untouched(fold_gates, model("a = Relu(x)", TEXT.replace("Mul(a, u)", "Add(g, u)"))) == []


def test_a_further_reader_is_refused() -> None:
    text = TEXT.replace("y = Mul(a, u)", "h = Mul(a, u) k = Neg(a) y = Add(h, k)")
    assert untouched(fold_gates, model(SILU, text)) == ["the activated half is read by something else too"]
