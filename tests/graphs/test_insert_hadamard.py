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
