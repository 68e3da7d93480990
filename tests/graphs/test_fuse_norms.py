"""fuse_norms: norms written as arithmetic become one operator each, or stay as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import build, expose, fired, normal, operators, tag, untouched

from satchel.graphs.passes.fuse.fuse_norms import fuse_norms

HEAD = """
(float[batch,3,7] x) => (float[batch,3,7] y) <float two = {2.0}, float eps = {0.01}, int64[1] last = {-1}>
"""
RMS = """{
    squares = Pow(x, two)
    mean = ReduceMean<keepdims = 1>(squares, last)
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    inverse = Reciprocal(root)
    normed = Mul(x, inverse)
    y = Mul(normed, scale)
}"""
X = {"x": normal(1, 2, 3, 7) + np.float32(1)}
SCALE = normal(2, 7)


def rms(*changes: tuple[str, str], head: str = HEAD, scale: np.ndarray = SCALE) -> ir.Model:
    """The norm with some pieces of its text replaced; each piece must be there."""
    text = head + RMS
    return build(text, *changes, scale=scale)


@pytest.mark.parametrize(
    "change",
    [
        ("squares = Pow(x, two)", "squares = Mul(x, x)"),
        ("Mul(normed, scale)", "Mul(scale, normed)"),
        ("Mul(x, inverse)", "Mul(inverse, x)"),
        ("Add(mean, eps)", "Add(eps, mean)"),
        ("last = {-1}", "last = {2}"),
    ],
)
def test_every_spelling_of_the_same_norm_fuses(change: tuple[str, str]) -> None:
    assert operators(fired(fuse_norms, rms(change), 1, feeds=X).model) == {"RMSNormalization": 1}


def test_a_norm_without_scale_gets_a_vector_of_ones() -> None:
    result = fired(fuse_norms, rms(("y = Mul(normed, scale)", "y = Identity(normed)")), 1, feeds=X)
    assert operators(result.model) == {"RMSNormalization": 1, "Identity": 1}
    assert "ones.7" in result.model.graph.initializers


@pytest.mark.parametrize("shape", [(1,), (3, 7), (1, 1, 7)], ids=["one number", "a matrix", "three axes"])
def test_a_scale_that_is_no_vector_stays_a_product_after_the_norm(shape: tuple[int, ...]) -> None:
    result = fired(fuse_norms, rms(scale=normal(3, *shape)), 1, feeds=X)
    assert operators(result.model) == {"RMSNormalization": 1, "Mul": 1}


@pytest.mark.parametrize(
    "change",
    [
        ("last = {-1}", "last = {1}"),
        ("int64[1] last = {-1}", "int64[2] last = {-1, -2}"),
        ("(squares, last)", "(squares)"),
    ],
    ids=["another axis", "two axes", "all axes"],
)
def test_a_mean_over_other_axes_is_refused(change: tuple[str, str]) -> None:
    assert any("not over the last axis alone" in reason for reason in untouched(fuse_norms, rms(change)))


def test_a_mean_with_an_unknown_attribute_is_refused() -> None:
    reasons = untouched(fuse_norms, tag(rms(), "ReduceMean", "weighted", 1))
    assert any("weighted" in reason for reason in reasons)


@pytest.mark.parametrize(
    "change",
    [
        ("two = {2.0}", "two = {3.0}"),
        ("Pow(x, two)", "Mul(x, scale)"),
        ("Mul(x, inverse)", "Mul(other, inverse)"),
        ("Mul(x, inverse)", "Sub(x, inverse)"),
        ("Add(mean, eps)", "Add(mean, mean)"),
        ("Add(mean, eps)", "Sub(mean, eps)"),
    ],
    ids=["cube", "product of two", "another operand", "difference", "epsilon not constant", "epsilon taken off"],
)
def test_arithmetic_that_is_no_norm_is_left_alone(change: tuple[str, str]) -> None:
    assert untouched(fuse_norms, rms(change, head=HEAD.replace("x)", "x, float[batch,3,7] other)"))) == []


def test_an_inverse_with_two_readers_is_left_alone() -> None:
    assert untouched(fuse_norms, expose(rms(), "inverse")) == []


def test_a_norm_of_unknown_width_without_scale_is_refused() -> None:
    model = rms(("y = Mul(normed, scale)", "y = Identity(normed)"), head=HEAD.replace("batch,3,7", "batch,3,width"))
    assert untouched(fuse_norms, model) == ["the width of the norm is not known"]


LAYER = """
(float[batch,3,7] x) => (float[batch,3,7] y) <int64[1] last = {-1}> {
    mean = ReduceMean<keepdims = 1>(x, last)
    centered = Sub(x, mean)
    y = RMSNormalization<axis = -1, epsilon = 0.01>(centered, scale)
}"""


def layer(old: str = "", new: str = "") -> ir.Model:
    return build(LAYER, (old, new), scale=SCALE)


def test_a_norm_of_centered_values_becomes_a_layer_norm() -> None:
    assert operators(fired(fuse_norms, layer(), 1, feeds=X).model) == {"LayerNormalization": 1}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Sub(x, mean)", "Sub(mean, x)"),
        ("Sub(x, mean)", "Add(x, mean)"),
        ("ReduceMean", "ReduceMax"),
        ("mean = ReduceMean<keepdims = 1>(x, last)", "other = Abs(x) mean = ReduceMean<keepdims = 1>(other, last)"),
    ],
    ids=["the mean less x", "a sum", "a maximum", "the mean of something else"],
)
def test_values_that_are_not_centered_keep_their_norm(old: str, new: str) -> None:
    assert untouched(fuse_norms, layer(old, new)) == []


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("last = {-1}", "last = {1}", "not over the last axis alone"),
        ("axis = -1", "axis = 1", "not over the last axis alone"),
        ("axis = -1", "axis = -1, stash_type = 1", "stash_type"),
    ],
    ids=["mean over another axis", "norm over more axes", "attribute not known"],
)
def test_a_layer_norm_over_other_axes_is_refused(old: str, new: str, reason: str) -> None:
    (found,) = untouched(fuse_norms, layer(old, new))
    assert reason in found
