"""insert_hadamard: the input of a down projection is mixed in blocks, and its weight mixes it back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, expose, fired, normal, operators, run, untouched

from satchel.graphs.analysis.rotations import hadamard
from satchel.graphs.ir.values import weight
from satchel.graphs.passes.quantize.equalize import equalize
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
    after = check(layer(GATED, DOWN), block)
    assert operators(after) == {"MatMul": 4, "Gelu": 1, "Mul": 1, "Reshape": 2}


def test_the_input_is_mixed_in_blocks() -> None:
    before = layer(GATED, DOWN)
    after = check(before, 4)
    mixed = next(n for n in after.graph if n.outputs[0].name == "y").inputs[0]
    assert [str(d) for d in mixed.shape] == ["batch", "sequence", "16"]
    wanted = run(expose(before, "m"), X)["m"].reshape(2, 3, 4, 4) @ hadamard(4)
    np.testing.assert_allclose(run(expose(after, mixed.name), X)[mixed.name], wanted.reshape(2, 3, 16), atol=1e-5)


def test_the_matrix_is_a_plain_constant_that_layers_share() -> None:
    second = GATED.replace("x,", "z,").replace("g =", "g2 =").replace("u =", "u2 =").replace("a =", "a2 =")
    second = second.replace("m = Mul(a, u)", "m2 = Mul(a2, u2)").replace("Gelu(g)", "Gelu(g2)")
    nodes = layer(GATED, DOWN.replace("y", "z"), second.replace("up.", "gate."), DOWN.replace("(m", "(m2"))
    assert untouched(insert_hadamard(4), nodes)[0].endswith("layers share their weights")
    after = check(layer(GATED, 'z = MatMul(m, "down.weight.T")', "n = Mul(z, z)", "y = Identity(z)"), 4)
    (constant,) = [v for name, v in after.graph.initializers.items() if name.startswith("const/hadamard")]
    assert constant.name == "const/hadamard.4"
    assert weight(constant) is None


def test_large_blocks_are_made_once_too() -> None:
    after = fired(insert_hadamard(256), wide(), 2).model
    assert [name for name in after.graph.initializers if "hadamard" in name and name.startswith("const/")] == [
        "const/hadamard.256"
    ]


def wide() -> ir.Model:
    """Two gated layers, 256 wide, one after the other."""
    part = (
        'g{0} = MatMul({1}, "g{0}.w") u{0} = MatMul({1}, "u{0}.w") m{0} = Mul(g{0}, u{0}) {2} = MatMul(m{0}, "d{0}.w")'
    )
    names = {f"{n}{i}__w": normal(7, *((256, 6) if n == "d" else (6, 256))) for i in (0, 1) for n in "gud"}
    return build(f"{HEADER} {{ {part.format(0, 'x', 'z')} {part.format(1, 'z', 'y')} }}", **names)


def test_smoothed_products_are_mixed_too() -> None:
    before = layer(GATED, DOWN)
    next(n for n in before.graph if n.outputs[0].name == "y").name = "down"
    smoothed = equalize({"down": np.linspace(0.1, 3, INNER, dtype=np.float32)})(before).model
    check(smoothed, 8)


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


def test_a_block_that_is_no_power_of_two_is_an_error() -> None:
    with pytest.raises(ValueError, match="of a power of two, not of 12"):
        insert_hadamard(12)
