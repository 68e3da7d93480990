"""fold_hadamards: a product mixes its input in blocks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import fired, normal, operators, untouched
from support.native_graphs import attributes_of, codes_of, same_by_reference, with_linears

from satchel.graphs.analysis.rotations import hadamard, rotation
from satchel.graphs.ir.values import Builder
from satchel.graphs.passes.native.fold_hadamards import fold_hadamards
from satchel.graphs.passes.native.fold_norms import fold_norms

TEXT = """(float[batch,n,64] x) => (float[batch,n,40] y)
<int64[4] blocks = {0, 0, 4, 16}, int64[3] whole = {0, 0, 64}> {
    s = Reshape(x, blocks)
    m = MatMul(s, H)
    k = Reshape(m, whole)
    y = MatMul(k, "layer.weight.T")
}"""
X = {"x": normal(2, 2, 3, 64)}
MATRIX, SHAPE = (
    "its input is multiplied by another matrix than Sylvester's",
    ("its input is not transformed in blocks of neighboring channels"),
)


def model(
    text: str = TEXT, matrix: np.ndarray | None = None, block: int | None = None, **arrays: np.ndarray
) -> ir.Model:
    """The graph with the matrix as insert_hadamard leaves it: a plain tensor."""
    size = 16 if matrix is None else len(matrix)
    arrays["h__plain"] = normal(1, size, size)
    built = with_linears(text.replace("H)", '"h.plain")'), codes_of(block=block), **arrays)
    lazy = built.graph.initializers["h.plain"]
    plain = Builder(built).constant(hadamard(16) if matrix is None else matrix, f"hadamard.{size}")
    ir.convenience.replace_all_uses_with(lazy, plain)
    del built.graph.initializers["h.plain"]
    return built


@pytest.mark.parametrize("block", [None, 16, 64])
@pytest.mark.parametrize("size", [4, 16, 32])
def test_a_product_mixes_its_own_input(size: int, block: int | None) -> None:
    text = TEXT.replace("{0, 0, 4, 16}", f"{{0, 0, {64 // size}, {size}}}")
    before = model(text, hadamard(size), block)
    after = fired(fold_hadamards, before, 1).model
    assert operators(after) == {"satchel::Linear": 1}
    assert attributes_of(after)["hadamard"] == size
    same_by_reference(before, after, X)


def test_a_norm_comes_before_it() -> None:
    text = TEXT.replace("s = Reshape(x,", 'c = RMSNormalization <axis = -1> (x, "norm.weight") s = Reshape(c,')
    built = model(text, norm__weight=normal(4, 64))
    after = fired(fold_norms, fired(fold_hadamards, built, 1).model, 1).model
    assert operators(after) == {"satchel::Linear": 1}
    same_by_reference(built, after, X)


@pytest.mark.parametrize(
    "matrix",
    [
        rotation(16),
        -hadamard(16),
        hadamard(16) * np.float32(1.0000001),
        hadamard(16).astype(np.float64)[:, ::-1].astype(np.float32),
    ],
    ids=["rotation", "sign", "scale", "order"],
)
def test_another_matrix_is_refused(matrix: np.ndarray) -> None:
    assert untouched(fold_hadamards, model(matrix=np.ascontiguousarray(matrix))) == [MATRIX]


def test_a_weight_is_no_hadamard_matrix() -> None:
    built = with_linears(TEXT.replace("H)", '"h.plain")'), codes_of(), h__plain=hadamard(16))
    assert untouched(fold_hadamards, built) == ["its input is multiplied by a matrix that is not a constant"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("blocks = {0, 0, 4, 16}", "blocks = {0, 0, -1, 16}"),
        ("whole = {0, 0, 64}", "whole = {0, 0, -1}"),
        ("Reshape(x, blocks)", "Reshape <allowzero = 1> (x, blocks)"),
    ],
)
def test_other_shapes_are_refused(old: str, new: str) -> None:
    (reason,) = untouched(fold_hadamards, model(TEXT.replace(old, new)))
    assert reason in (SHAPE, "its input is reshaped to a size of zero")


def test_a_product_with_a_norm_is_refused() -> None:
    before = model()
    (linear,) = [node for node in before.graph if node.op_type == "Linear"]
    linear.attributes.add(ir.AttrFloat32("epsilon", 0.1))
    assert untouched(fold_hadamards, before) == ["the linear layer has a norm or a matrix already"]
