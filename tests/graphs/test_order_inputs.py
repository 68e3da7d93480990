"""order_inputs: layers read their inputs in the order in which the groups of their weights are neighbors."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import build, fired, normal, operators, run, untouched

from satchel.graphs.ir.values import weight
from satchel.graphs.passes.quantize.order_inputs import order_inputs

HEADER = "(float[batch,sequence,6] x) => (float[batch,sequence,5] y, float[batch,sequence,5] z)"
NODES = 'y = MatMul(x, "q.weight.T") z = MatMul(x, "k.weight.T")'
WEIGHTS = {"q__weight__T": normal(1, 6, 5), "k__weight__T": normal(2, 6, 5)}
ORDER, OTHER = np.asarray([3, 0, 5, 1, 4, 2]), np.asarray([0, 1, 2, 4, 3, 5])


@pytest.mark.parametrize(
    ("orders", "gathers"),
    [({"q": ORDER}, 1), ({"q": ORDER, "k": ORDER}, 1), ({"q": ORDER, "k": OTHER}, 2)],
)
def test_the_results_are_the_same_and_one_order_is_gathered_once(orders: dict[str, np.ndarray], gathers: int) -> None:
    before, x = build(f"{HEADER} {{ {NODES} }}", **WEIGHTS), {"x": normal(3, 2, 3, 6)}
    after = fired(order_inputs(orders), before, len(orders)).model
    assert operators(after) == {"MatMul": 2, "Gather": gathers}
    wanted, found = run(before, x), run(after, x)
    for name in ("y", "z"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5)
    matrix = next(weight(n.inputs[1]) for n in after.graph if n.outputs[0].name == "y")
    assert matrix is not None
    np.testing.assert_array_equal(matrix.numpy(), WEIGHTS["q__weight__T"][orders["q"]])
    np.testing.assert_array_equal(matrix.columns(1, 3), WEIGHTS["q__weight__T"][orders["q"], 1:3])


def test_other_layers_are_left_alone() -> None:
    assert untouched(order_inputs({"v": ORDER}), build(f"{HEADER} {{ {NODES} }}", **WEIGHTS)) == []
