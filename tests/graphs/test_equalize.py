"""equalize: outliers move from the input of a down projection into its weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, expose, fired, normal, run, untouched

from satchel.graphs.ir.values import weight
from satchel.graphs.passes.quantize.equalize import equalize

HIDDEN, INNER = 6, 8
WEIGHTS = {
    "gate_up__weight__T": normal(1, HIDDEN, 2 * INNER), "gate_up__bias": normal(2, 2 * INNER),
    "gate__weight__T": normal(3, HIDDEN, INNER), "up__weight__T": normal(4, HIDDEN, INNER),
    "down__weight__T": normal(5, INNER, 5),
}  # fmt: skip
X = {"x": normal(6, 2, 3, HIDDEN)}
RMS = np.asarray([0.5, 1, 2, 40, 0.01, 1, 3, 1], np.float32)
HEADER = """(float[batch,sequence,6] x) => (float[batch,sequence,5] y)
    <int64[2] halves = {8, 8}, float one = {1.0}, float two = {2.0}>"""
PACKED = 'p = MatMul(x, "gate_up.weight.T") g, u = Split<axis = -1>(p, halves)'
BIASED = 'q = MatMul(x, "gate_up.weight.T") p = Add(q, "gate_up.bias") g, u = Split<axis = -1>(p, halves)'
APART = 'g = MatMul(x, "gate.weight.T") u = MatMul(x, "up.weight.T")'
SILU = "s = Sigmoid(g) a = Mul(g, s)"
GATED = "m = Mul(a, u)"
DOWN = 'y = MatMul(m, "down.weight.T")'


def layer(*parts: str) -> ir.Model:
    text = " ".join(parts)
    used = {name: array for name, array in WEIGHTS.items() if f'"{name.replace("__", ".")}"' in text}
    model = build(f"{HEADER} {{ {text} }}", **used)
    next(n for n in model.graph if n.outputs[0].name == "y").name = "down"
    return model


def check(before: ir.Model, rms: np.ndarray = RMS, alpha: float = 0.5) -> ir.Model:
    after = fired(equalize({"down": rms}, alpha), before, 1).model
    wanted, found = run(before, X)["y"], run(after, X)["y"]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    return after


@pytest.mark.parametrize("gated", [GATED, "m = Mul(u, a)"])
@pytest.mark.parametrize("products", [PACKED, BIASED, APART], ids=["packed", "packed with a bias", "apart"])
@pytest.mark.parametrize("activation", [SILU, "a = Gelu(g)", "a = Identity(g)"])
def test_the_output_is_the_same(products: str, activation: str, gated: str) -> None:
    check(layer(products, activation, gated, DOWN))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_input_is_divided_by_the_factors(alpha: float) -> None:
    before = layer(BIASED, SILU, GATED, DOWN)
    after = check(before, alpha=alpha)
    factors = RMS.astype(np.float64) ** alpha
    factors /= np.exp(np.log(factors).mean())
    down = weight(after.graph.node("down").inputs[1])
    assert down is not None
    np.testing.assert_allclose(down.numpy(), WEIGHTS["down__weight__T"] * factors[:, None], rtol=1e-5)
    wanted, found = (run(expose(m.clone(), "m"), X)["m"] for m in (before, after))
    np.testing.assert_allclose(found, wanted / factors, rtol=1e-4, atol=1e-5)


def test_a_channel_that_is_always_zero_gets_a_small_factor() -> None:
    rms = np.where(np.arange(INNER) == 3, 0, RMS).astype(np.float32)
    down = weight(check(layer(PACKED, SILU, GATED, DOWN), rms).graph.node("down").inputs[1])
    assert down is not None
    factors = (down.numpy() / WEIGHTS["down__weight__T"])[:, 0]
    assert 0 < factors[3] < 0.1 * np.delete(factors, 3).min() + 0.1
    np.testing.assert_allclose(np.log(factors).mean(), 0, atol=1e-5)


def test_all_channels_zero_change_no_number() -> None:
    after = check(layer(PACKED, SILU, GATED, DOWN), np.zeros(INNER, np.float32))
    down = weight(after.graph.node("down").inputs[1])
    assert down is not None
    np.testing.assert_array_equal(down.numpy(), WEIGHTS["down__weight__T"])


def test_a_product_without_statistics_is_left_alone() -> None:
    assert untouched(equalize({"another": RMS}), layer(PACKED, SILU, GATED, DOWN)) == []


NO_GATE = "its input is not an up projection times an activation"
REFUSED: dict[str, tuple[ir.Model, str]] = {
    "no gate": (layer('u = MatMul(x, "up.weight.T") m = Relu(u)', DOWN), NO_GATE),
    "an activation on both": (layer(PACKED, SILU, "v = Relu(u)", "m = Mul(a, v)", DOWN), NO_GATE),
    "a sum": (layer(PACKED, SILU, "m = Add(a, u)", DOWN), NO_GATE),
    "an up projection that is read twice": (
        layer(PACKED, SILU, GATED, "n = Neg(u)", DOWN), "u is read by more than one node",
    ),
    "an input that is read twice": (layer(PACKED, SILU, GATED, "n = Neg(m)", DOWN), "m is read by more than one node"),
    "shared weights": (
        layer(PACKED, SILU, GATED, 'n = Neg("down.weight.T")', DOWN),
        "down.weight.T is read by more than one node: layers share their weights",
    ),
    "a shared up projection": (
        layer(PACKED, SILU, GATED, 'n = Neg("gate_up.weight.T")', DOWN),
        "gate_up.weight.T is read by more than one node: layers share their weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_products_of_another_kind_are_refused(name: str) -> None:
    before, reason = REFUSED[name]
    assert untouched(equalize({"down": RMS}), before) == [reason]


@pytest.mark.parametrize("rms", [RMS[:-1], -RMS, np.where(RMS > 30, np.inf, RMS), np.where(RMS > 30, np.nan, RMS)])
def test_statistics_that_are_none_are_refused(rms: np.ndarray) -> None:
    assert untouched(equalize({"down": rms}), layer(PACKED, SILU, GATED, DOWN)) == [
        "its statistics are not one finite number of at least 0 for each of 8 channels"
    ]
