"""quantize_linear: a product multiplies float activations by codes in blocks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.codes import rounded, values
from support.graphs import build, fired, normal, operators, run, the, untouched

from satchel.graphs.passes.quantize.quantize_linear import quantize_linear
from satchel.graphs.quant.quantized import QuantizedWeight
from satchel.graphs.quant.recipe import Rule

INPUTS, OUTPUTS, NAME = 64, 48, "layer.weight.T"
W = normal(1, INPUTS, OUTPUTS)
TEXT = """(float[batch,n,64] x) => (float[batch,n,48] y) {
    a = Tanh(x) p = MatMul(a, "layer.weight.T") y = Neg(p) }"""
X = {"x": normal(2, 2, 5, INPUTS)}
FLOAT = Rule(kinds=("linear",), bits=8, blocks=(32,))


def product() -> ir.Model:
    return build(TEXT, layer__weight__T=W)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(8, 32), (8, 16), (4, 32), (4, 64)])
def test_the_product_is_that_of_what_the_codes_stand_for(bits: int, block: int, symmetric: bool) -> None:
    codes = rounded(NAME, W.T.copy(), bits, block, symmetric)
    after = fired(quantize_linear({NAME: codes}, {NAME: FLOAT}), product(), 1).model
    wanted = -(np.tanh(X["x"].astype(np.float64)) @ values(codes).T.astype(np.float64))
    np.testing.assert_allclose(run(after, X)["y"], wanted, rtol=1e-4, atol=1e-4)
    node = the(after, "MatMulNBits")
    assert "accuracy_level" not in node.attributes
    assert operators(after)["MatMul"] == 0


def test_a_weight_that_is_not_quantized_is_left_alone() -> None:
    assert untouched(quantize_linear({}, {}), product()) == []


@pytest.mark.parametrize(
    ("codes", "rule", "reason"),
    [
        (rounded(NAME, W.T.copy(), 8, None), FLOAT, "per channel"),
        (rounded(NAME, W.T.copy()), Rule(kinds=("linear",), bits=8, blocks=(32,), prefill="token"), "in 8 bits"),
        (rounded(NAME, W.T.copy()), Rule(kinds=("linear",), bits=8, blocks=(32,), decode="tensor"), "in 8 bits"),
    ],
)
def test_what_has_no_kernel_is_refused(codes: QuantizedWeight, rule: Rule, reason: str) -> None:
    (found,) = untouched(quantize_linear({NAME: codes}, {NAME: rule}), product())
    assert reason in found


def test_experts_are_refused() -> None:
    text = """(float[t,16] x, float[t,2] r) => (float[t,16] y) {
        y = com.microsoft.MoE<k = 1>(x, r, "up", , "down") }"""
    up, down = normal(1, 2, 32, 16), normal(2, 2, 16, 16)
    codes = rounded("up", up.reshape(-1, 16), 8, 16)
    (found,) = untouched(quantize_linear({"up": codes}, {"up": FLOAT}), build(text, up=up, down=down))
    assert "layout" in found
