"""pack_gate_up: the two products of a gated feed-forward layer become one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, the, untouched

from satchel.graphs.ir.values import weight
from satchel.graphs.passes.fuse.pack_gate_up import pack_gate_up
from satchel.graphs.quant.assign import assign, layers_of, rule_of
from satchel.graphs.quant.recipe import Recipe, Rule

PATH = "layers__0__mlp__"
WEIGHTS = {f"{PATH}{name}_proj__weight__T": normal(i, 5, 7) for i, name in enumerate(("gate", "up"))}
BIASES = {f"{PATH}{name}_proj__bias": normal(i + 5, 7) for i, name in enumerate(("gate", "up"))}
X = {"x": normal(3, 2, 3, 5), "other": normal(4, 2, 3, 5)}
HEAD = """(float[batch,sequence,5] x, float[batch,sequence,5] other) => (float[batch,sequence,7] y)
    <float half = {0.5}, float one = {1.0}, float root = {1.4142135}, float cubic = {0.044715}, float three = {3.0}>"""
GATE, UP = (f'{name} = MatMul(x, "layers.0.mlp.{name}_proj.weight.T")' for name in ("gate", "up"))
BIASED = " ".join(
    f'{n}0 = MatMul(x, "layers.0.mlp.{n}_proj.weight.T") {n} = Add({n}0, "layers.0.mlp.{n}_proj.bias")'
    for n in ("gate", "up")
)
SILU = "s = Sigmoid(gate) act = Mul(gate, s)"
END = "m = Mul(act, up) y = Neg(m)"
ACTIVATIONS = {
    "SiLU": SILU,
    "GELU": "act = Gelu(gate)",
    "GELU with tanh": """p = Pow(gate, three) c = Mul(p, cubic) i = Add(gate, c) t = Tanh(i) o = Add(t, one)
        h = Mul(gate, half) act = Mul(h, o)""",
    "GELU with erf": "d = Div(gate, root) e = Erf(d) o = Add(e, one) h = Mul(gate, half) act = Mul(h, o)",
    "ReLU": "act = Relu(gate)",
}


def layer(nodes: str, **weights: np.ndarray) -> ir.Model:
    return build(f"{HEAD} {{ {nodes} }}", **(WEIGHTS | weights))


def check(model: ir.Model, count: int = 1) -> ir.Model:
    return fired(pack_gate_up, model, count, feeds=X).model


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_up_become_one_product(activation: str) -> None:
    after = check(layer(f"{GATE} {UP} {ACTIVATIONS[activation]} {END}"))
    assert operators(after)["MatMul"] == 1
    assert operators(after)["Split"] == 1
    assert the(after, "MatMul").name == "layers.0.mlp.gate_up_proj"
    packed = after.graph.initializers["layers.0.mlp.gate_up_proj.weight.T"].const_value
    assert packed is not None
    np.testing.assert_array_equal(packed.numpy(), np.concatenate(list(WEIGHTS.values()), 1))


def test_biases_are_packed_too() -> None:
    after = check(layer(f"{BIASED} {SILU} {END}", **BIASES))
    assert operators(after)["Add"] == 1
    value = after.graph.initializers["layers.0.mlp.gate_up_proj.bias"].const_value
    assert value is not None
    np.testing.assert_array_equal(value.numpy(), np.concatenate(list(BIASES.values())))


def test_one_bias_of_two_is_refused() -> None:
    up = BIASED[BIASED.index("up0") :]
    model = layer(f"{GATE} {up} {SILU} {END}", **{f"{PATH}up_proj__bias": normal(6, 7)})
    assert untouched(pack_gate_up, model) == ["some of the linear layers have a bias and some have none"]


def test_layers_that_share_their_weights_are_packed_once() -> None:
    second = f"{GATE} {UP} {SILU}".replace("gate =", "gate2 =").replace("up =", "up2 =").replace("s =", "s2 =")
    second = second.replace("act =", "act2 =").replace("(gate)", "(gate2)").replace("Mul(gate, s)", "Mul(gate2, s2)")
    nodes = f"{GATE} {UP} {SILU} m = Mul(act, up) {second} n = Mul(act2, up2) y = Add(m, n)"
    result = fired(pack_gate_up, layer(nodes), 1)
    assert [refusal.reason for refusal in result.refusals] == [
        "layers.0.mlp.gate_up_proj.weight.T exists already: the layers share their weights"
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gate = MatMul(x", "gate = MatMul(other"),
        ('gate = MatMul(x, "layers.0.mlp.gate_proj.weight.T")', "gate = Mul(up, up)"),
        ('gate = MatMul(x, "layers.0.mlp.gate_proj.weight.T")', "gate = MatMul(x, narrow)"),
        ('gate = MatMul(x, "layers.0.mlp.gate_proj.weight.T")', "c = Neg(plain) gate = MatMul(x, c)"),
        (SILU, "act = Softmax(gate)"),
        ("m = Mul(act, up)", "m = Add(act, up)"),
    ],
    ids=["another input", "the same product", "another width", "a computed matrix", "not element by element", "a sum"],
)
def test_other_products_are_left_alone(old: str, new: str) -> None:
    nodes = f"{UP} {GATE} {SILU} {END}"
    assert old in nodes
    assert untouched(pack_gate_up, layer(nodes.replace(old, new), narrow=normal(7, 5, 1), plain=normal(8, 5, 7))) == []


@pytest.mark.parametrize(
    "gate", [Rule(("*.gate_proj",), bits=8), Rule(("*.gate_proj",))], ids=["other bits", "left in float"]
)
def test_products_that_a_recipe_stores_differently_are_refused(gate: Rule) -> None:
    marked = assign(Recipe("mine", (gate, Rule(bits=4))))(marked_layer()).model
    assert untouched(pack_gate_up, marked) == ["the recipe has different rules for the linear layers"]


def test_products_with_one_rule_are_packed_and_keep_it() -> None:
    rule = Rule(("layers.*",), bits=4)
    packed = the(check(assign(Recipe("mine", (rule,)))(marked_layer()).model), "MatMul").inputs[1]
    lazy = weight(packed)
    assert lazy is not None
    assert rule_of(lazy) == rule
    assert layers_of(lazy) == ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")


def marked_layer() -> ir.Model:
    """The layer with an output as a recipe looks for it."""
    model = layer(f"{GATE} {UP} {SILU} {END}")
    model.graph.outputs[0].name = "logits"
    return model
