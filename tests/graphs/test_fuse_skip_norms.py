"""fuse_skip_norms: the residual sum and the norm behind it become one node."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, same_numbers, tag, the, untouched

from satchel.graphs.passes.fuse.fuse_skip_norms import fuse_skip_norms

FEEDS = {"a": normal(1, 2, 3, 7), "b": normal(2, 2, 3, 7), "c": normal(3, 2, 3, 7)}
WEIGHTS = {"w": normal(4, 7), "bias": normal(5, 7)}
INPUTS = "(float[batch,sequence,7] a, float[batch,sequence,7] b, float[batch,sequence,7] c)"
NORMS = {
    "RMSNormalization": ("RMSNormalization<axis = -1, epsilon = 0.01>(sum, w)", "SkipSimplifiedLayerNormalization"),
    "LayerNormalization": ("LayerNormalization<axis = -1, epsilon = 0.01>(sum, w, bias)", "SkipLayerNormalization"),
    "no bias": ("LayerNormalization<axis = 2, epsilon = 0.01>(sum, w)", "SkipLayerNormalization"),
}


def block(norm: str, *changes: tuple[str, str], inputs: str = INPUTS, **weights: object) -> ir.Model:
    """y = norm(a + b), z = (a + b) + c, with pieces of the text replaced."""
    outputs = "(float[batch,sequence,7] y, float[batch,sequence,7] z)"
    text = f"{inputs} => {outputs} {{ sum = Add(a, b) y = {norm} z = Add(sum, c) }}"
    return build(text, *changes, **(WEIGHTS | weights))  # type: ignore[arg-type]


RMS = NORMS["RMSNormalization"][0]


@pytest.mark.parametrize("name", NORMS)
def test_a_sum_and_its_norm_become_one_node(name: str) -> None:
    norm, fused = NORMS[name]
    after = fired(fuse_skip_norms, block(norm), 1, feeds=FEEDS).model
    assert operators(after) == {f"com.microsoft::{fused}": 1, "Add": 1}
    assert the(after, fused).attributes["epsilon"].value == pytest.approx(0.01)


def test_a_reader_of_the_sum_may_stand_before_the_norm() -> None:
    model = block(RMS, (f"y = {RMS} z = Add(sum, c)", f"z = Add(sum, c) y = {RMS}"))
    same_numbers(model, fired(fuse_skip_norms, model, 1).model, FEEDS)


VECTOR = "not a constant vector over the last axis"


@pytest.mark.parametrize(
    ("old", "new"),
    [("[batch,sequence,7] b", "[1,sequence,7] b"), ("[batch,sequence,7] b", "[7] b"), ("batch,sequence", "?,?")],
    ids=["repeated", "a vector", "dimensions without a name"],
)
def test_summands_that_may_differ_in_shape_are_refused(old: str, new: str) -> None:
    reasons = untouched(fuse_skip_norms, block(RMS, inputs=INPUTS.replace(old, new)))
    assert reasons == ["the summands may differ in shape"]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (RMS.replace("axis = -1", "axis = 1"), "not over the last axis"),
        (RMS.replace("epsilon", "stash_type = 11, epsilon"), "not computed in single precision"),
        (RMS.replace("w)", "one)"), VECTOR),
        (RMS.replace("w)", "square)"), VECTOR),
        (RMS.replace("w)", "computed)"), VECTOR),
        ("LayerNormalization(sum, w, one)", VECTOR),
    ],
    ids=["axis", "precision", "one number", "a matrix", "computed", "bias of one number"],
)
def test_a_norm_that_the_operator_cannot_do_is_refused(norm: str, reason: str) -> None:
    changes = [("y = ", "computed = Neg(w) y = ")]
    (found,) = untouched(fuse_skip_norms, block(norm, *changes, one=normal(6, 1), square=normal(7, 1, 7)))
    assert reason in found


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(fuse_skip_norms, tag(block(RMS), "RMSNormalization", "novelty", 1))
    assert "novelty" in reason


@pytest.mark.parametrize(
    "changes",
    [[("sum = Add(a, b)", "sum = Mul(a, b)")], [("batch,sequence,7", "sequence,7")]],
    ids=["a product", "two axes"],
)
def test_a_norm_of_something_else_is_left_alone(changes: list[tuple[str, str]]) -> None:
    assert untouched(fuse_skip_norms, block(RMS, *changes)) == []
