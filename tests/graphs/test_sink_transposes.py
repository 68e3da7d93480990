"""sink_transposes: norms of each head come before the heads are moved."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, same_numbers, untouched

from satchel.graphs.passes.normalize.sink_transposes import sink_transposes

X = {"x": normal(1, 2, 3, 5, 7)}
NORMS = {
    "RMSNormalization": "RMSNormalization<axis = -1, epsilon = 0.01>(moved, w)",
    "LayerNormalization": "LayerNormalization<axis = -1, epsilon = 0.01>(moved, w, b)",
}


def norm(nodes: str, *changes: tuple[str, str], shape: tuple[int, ...] = (7,)) -> ir.Model:
    """x [batch, 3, 5, 7] -> Transpose(0, 2, 1, 3) -> `nodes`, a norm of `moved` -> Neg -> y, with pieces replaced."""
    text = (
        "(float[batch,3,5,7] x) => (float[batch,5,3,7] y) {moved = Transpose<perm = [0, 2, 1, 3]>(x) r = @ y = Neg(r)}"
    )
    text = text.replace("@", nodes)
    return build(text, *changes, w=normal(2, *shape), b=normal(3, *shape))


@pytest.mark.parametrize("op_type", NORMS)
def test_a_transpose_moves_behind_the_norm(op_type: str) -> None:
    after = fired(sink_transposes, norm(NORMS[op_type]), 1, feeds=X, exact=True).model
    assert [node.op_type for node in after.graph] == [op_type, "Transpose", "Neg"]


def test_an_axis_counted_from_the_front_moves_too() -> None:
    model = norm(NORMS["RMSNormalization"], ("axis = -1", "axis = 3"))
    same_numbers(model, fired(sink_transposes, model, 1).model, X, exact=True)


def test_a_cycle_of_three_axes_keeps_its_direction() -> None:
    model = norm(NORMS["RMSNormalization"], ("[0, 2, 1, 3]", "[1, 2, 0, 3]"), ("[batch,5,3,7] y", "[3,5,batch,7] y"))
    same_numbers(model, fired(sink_transposes, model, 1).model, X, exact=True)


@pytest.mark.parametrize(
    "changes",
    [
        [("[0, 2, 1, 3]", "[0, 2, 3, 1]"), ("[batch,5,3,7] y", "[batch,5,7,3] y")],
        [("axis = -1", "axis = 2")],
        [("axis = -1", "axis = -2")],
        [("<perm = [0, 2, 1, 3]>", ""), ("[batch,5,3,7] y", "[7,5,3,batch] y")],
    ],
    ids=["the last axis moves", "norm over two axes", "norm over two axes from the end", "no permutation given"],
)
def test_a_transpose_that_the_norm_depends_on_is_left_alone(changes: list[tuple[str, str]]) -> None:
    assert untouched(sink_transposes, norm(NORMS["RMSNormalization"], *changes)) == []


def test_a_scale_that_is_no_vector_is_left_alone() -> None:
    assert untouched(sink_transposes, norm(NORMS["RMSNormalization"], shape=(3, 7))) == []
