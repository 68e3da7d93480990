"""insert_linear: a product becomes satchel's own, over codes in panels, its input rounded to int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.codes import rounded, values
from support.graphs import build, expose, fired, normal, operators, the, untouched
from support.native_ops import run_reference

from satchel.graphs.ir.values import weight
from satchel.graphs.passes.native.insert_linear import insert_linear
from satchel.graphs.quant.quantized import QuantizedWeight

INPUTS, OUTPUTS, NAME = 64, 40, "layer.weight.T"
W = normal(1, OUTPUTS, INPUTS)
TEXT = """(float[batch,n,64] x) => (float[batch,n,40] y) {
    a = Tanh(x)
    p = MatMul(a, "layer.weight.T")
    y = Neg(p)
}"""
X = {"x": normal(2, 2, 5, INPUTS) * np.asarray([1e-3, 1, 10, 0.1, 3], np.float32)[:, None]}


def product(text: str = TEXT, inputs: int = INPUTS) -> ir.Model:
    return build(text.replace("64] x", f"{inputs}] x"), layer__weight__T=normal(1, OUTPUTS, inputs).T.copy())


def by_rounded_rows(a: np.ndarray, codes: QuantizedWeight) -> np.ndarray:
    """The product with each row, or each block of it, in int8, the largest number being 127, in float64."""
    parts = a.reshape(*a.shape[:-1], -1, codes.grid.scheme.block or a.shape[-1])
    step = np.abs(parts).max(-1, keepdims=True) / np.float32(127)
    return (np.rint(parts / step).astype(np.float64) * step).reshape(a.shape) @ values(codes).T.astype(np.float64)


@pytest.mark.parametrize("inputs", [64, 192])
@pytest.mark.parametrize(
    ("bits", "block", "symmetric"),
    [(8, None, True), (8, 16, True), (8, 64, False), (8, 32, True), (4, 16, True), (4, 32, False), (4, 64, False)],
)
def test_the_product_is_that_of_the_codes_with_rounded_rows(
    bits: int, block: int | None, symmetric: bool, inputs: int
) -> None:
    codes = rounded(NAME, normal(1, OUTPUTS, inputs), bits, block, symmetric)
    after = fired(insert_linear({NAME: codes}), product(inputs=inputs), 1).model
    x = np.tile(X["x"], (1, 1, inputs // INPUTS))
    wanted = -by_rounded_rows(np.tanh(x), codes)
    found = run_reference(after, {"x": x})["y"]
    assert (np.abs(found - wanted) / np.abs(wanted).max(-1, keepdims=True)).max() < 1e-6
    assert operators(after) == {"Tanh": 1, "satchel::Linear": 1, "Neg": 1}


def test_inputs_that_fill_no_group_of_four_are_filled_up() -> None:
    codes = rounded(NAME, normal(1, OUTPUTS, 70), 8, None)
    after = fired(insert_linear({NAME: codes}), product(inputs=70), 1).model
    x = normal(3, 1, 2, 70)
    np.testing.assert_allclose(
        run_reference(after, {"x": x})["y"], -by_rounded_rows(np.tanh(x), codes), rtol=1e-5, atol=1e-5
    )
    assert weight(the(after, "Linear").inputs[1]).dims == (3, 18 * 64)  # type: ignore[union-attr]


def test_two_products_of_one_weight_share_its_panels() -> None:
    text = TEXT.replace("y = Neg(p)", f'q = MatMul(x, "{NAME}") y = Sub(p, q)')
    after = fired(insert_linear({NAME: rounded(NAME, W, 8, None)}), product(text), 2).model
    assert len(after.graph.initializers) == 2


def test_a_product_that_is_the_graph_s_output_keeps_its_name() -> None:
    after = fired(insert_linear({NAME: rounded(NAME, W, 8, None)}), expose(product(), "p"), 1).model
    found = run_reference(after, X)
    np.testing.assert_array_equal(found["p"], -found["y"])


@pytest.mark.parametrize(("bits", "block", "symmetric"), [(4, None, True), (8, None, False), (4, None, False)])
def test_codes_without_blocks_are_taken_in_8_bits_without_zero_points_only(
    bits: int, block: int | None, symmetric: bool
) -> None:
    codes = rounded(NAME, W, bits, block, symmetric)
    assert untouched(insert_linear({NAME: codes}), product()) == [
        "the operator does not support how its weight is quantized"
    ]


def test_an_input_of_another_or_an_unknown_width_is_refused() -> None:
    codes = rounded(NAME, normal(1, OUTPUTS, 128), 8, None)
    assert untouched(insert_linear({NAME: codes}), product()) == ["its input is not known to be as wide as its weight"]


def test_weights_that_are_not_named_are_left_alone() -> None:
    assert untouched(insert_linear({}), product()) == []
    assert untouched(insert_linear({"other": rounded("other", W, 8, None)}), product()) == []
