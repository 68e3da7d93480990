"""insert_hadamard: the input of a down projection is mixed in blocks, and its weight mixes it back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, expose, fired, normal, operators, run, untouched

from satchel.graphs.analysis.rotations import hadamard
from satchel.graphs.passes.quantize.insert_hadamard import insert_hadamard

HIDDEN, INNER = 6, 16
WEIGHTS = {f"{n}__weight__T": normal(i, HIDDEN, INNER) for i, n in enumerate(("gate", "up"))}
WEIGHTS |= {f"{n}__weight__T": normal(i, INNER, HIDDEN) for i, n in enumerate(("down", "down2"), 5)}
X = {"x": normal(3, 2, 3, HIDDEN), "rows": normal(4, 3, HIDDEN)}
HEADER = "(float[batch,sequence,6] x, float[tokens,6] rows) => (float[batch,sequence,6] y)"
GATED = 'g = MatMul(x, "gate.weight.T") u = MatMul(x, "up.weight.T") a = Gelu(g) m = Mul(a, u)'
DOWN = 'y = MatMul(m, "down.weight.T")'


def layer(*parts: str) -> ir.Model:
    text = " ".join(parts)
    used = {name: array for name, array in WEIGHTS.items() if f'"{name.replace("__", ".")}"' in text}
    return build(f"{HEADER} {{ {text} }}", **used)


def check(before: ir.Model, block: int, count: int = 1) -> ir.Model:
    after = fired(insert_hadamard(block), before, count).model
    wanted, found = run(before, X)["y"], run(after, X)["y"]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    return after


@pytest.mark.parametrize("block", [1, 4, 16])
def test_the_output_is_the_same(block: int) -> None:
    assert operators(check(layer(GATED, DOWN), block)) == {"MatMul": 4, "Gelu": 1, "Mul": 1, "Reshape": 2}


def test_the_input_is_mixed_in_blocks() -> None:
    before = layer(GATED, DOWN)
    after = check(before, 4)
    mixed = next(n for n in after.graph if n.outputs[0].name == "y").inputs[0]
    assert [str(d) for d in mixed.shape] == ["batch", "sequence", "16"]
    wanted = run(expose(before, "m"), X)["m"].reshape(2, 3, 4, 4) @ hadamard(4)
    np.testing.assert_allclose(run(expose(after, mixed.name), X)[mixed.name], wanted.reshape(2, 3, 16), atol=1e-5)


@pytest.mark.parametrize("gate", ["Sigmoid(g)", "Neg(g)"])
def test_the_output_behind_the_gate_of_a_recurrence_or_an_attention_is_mixed(gate: str) -> None:
    """Its other factor need not come from a linear layer, and heads may be apart."""
    parts = f"""g = MatMul(x, "gate.weight.T") a = {gate} u = MatMul(x, "up.weight.T") t = Tanh(u) m = Mul(t, a)"""
    assert operators(check(layer(parts, DOWN), 4))["MatMul"] == 4
    apart = parts.replace(
        "m = Mul(t, a)",
        """th = Reshape(t, heads) ah = Reshape(a, heads) mh = Mul(th, ah)
        m = Reshape(mh, flat)""",
    )
    text = f"""{HEADER} <int64[4] heads = {{0, 0, 2, 8}}, int64[3] flat = {{0, 0, 16}},
        float[batch,sequence,2,8] th, float[batch,sequence,2,8] ah, float[batch,sequence,2,8] mh,
        float[batch,sequence,16] m> {{ {apart} {DOWN} }}"""
    used = {name: array for name, array in WEIGHTS.items() if name != "down2__weight__T"}
    assert operators(check(build(text, **used), 8))["MatMul"] == 4


@pytest.mark.parametrize("factor", ["x1", "scales", "t"], ids=["of each token", "of each channel", "itself"])
def test_factors_of_whole_tokens_or_channels_and_squares_are_no_gates(factor: str) -> None:
    text = f"""{HEADER} <float[16] scales = {{{", ".join(["2"] * 16)}}}> {{ u = MatMul(x, "up.weight.T") t = Tanh(u)
        x1 = ReduceMax<keepdims = 1>(x, axis) m = Mul(t, {factor}) {DOWN} }}"""
    used = {name: WEIGHTS[name] for name in ("up__weight__T", "down__weight__T")}
    assert untouched(insert_hadamard(4), build(text, axis=np.asarray([2]), **used)) == []


def test_a_width_that_is_no_multiple_is_refused() -> None:
    assert untouched(insert_hadamard(32), layer(GATED, DOWN)) == ["16 channels are not a multiple of 32"]


def test_flattened_rows_are_refused() -> None:
    flat = GATED.replace("x,", "rows,") + ' f = MatMul(m, "down.weight.T") y = Add(x, f)'
    assert untouched(insert_hadamard(4), layer(flat)) == ["its input does not have three dimensions"]


def test_an_input_that_is_read_elsewhere_is_refused() -> None:
    assert untouched(insert_hadamard(4), layer(GATED, "n = Neg(m)", DOWN)) == ["m is read by more than one node"]


def test_other_products_are_left_alone() -> None:
    ungated = 'u = MatMul(x, "up.weight.T") m = Gelu(u)'
    assert untouched(insert_hadamard(4), layer(ungated, DOWN)) == []
