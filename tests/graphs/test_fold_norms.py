"""fold_norms: products norm their own input."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import expose, fired, normal, operators, tag, the, untouched
from support.native_graphs import attributes_of, codes_of, same_by_reference, with_linears

from satchel.graphs.analysis.linear import NORM_WEIGHT, has_input
from satchel.graphs.passes.native.fold_norms import fold_norms
from satchel.graphs.passes.native.fold_residuals import fold_residuals

TEXT = """(float[batch,n,64] x) => (float[batch,n,40] y) {
    m = RMSNormalization <axis = -1, epsilon = 0.01> (x, "norm.weight")
    y = MatMul(m, "layer.weight.T")
}"""
TWO = TEXT.replace("=> (float[batch,n,40] y)", "=> (float[batch,n,40] y, float[batch,n,40] z)").replace(
    "y = MatMul", 'z = MatMul(m, "other.weight.T") y = MatMul'
)
PLACE = "the norm is not over the last axis, or not computed in single precision"
X = {"x": 3 * normal(2, 2, 3, 64)}


def model(text: str = TEXT, gain: np.ndarray | None = None, block: int | None = None) -> ir.Model:
    weights = [codes_of(name, block=block) for name in ("layer.weight.T", "other.weight.T") if name in text]
    return with_linears(text, *weights, norm__weight=normal(5, 64) if gain is None else gain)


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("text", [TEXT, TWO, TEXT.replace("axis = -1", "axis = 2")], ids=["one", "two", "axis 2"])
def test_all_products_that_read_a_norm_take_it_in(text: str, block: int | None) -> None:
    before = model(text, block=block)
    after = fired(fold_norms, before, 1).model
    assert operators(after)["RMSNormalization"] == 0
    same_by_reference(before, after, X)


def test_a_gain_of_ones_is_left_out() -> None:
    before = model(gain=np.ones(64, np.float32))
    after = fired(fold_norms, before, 1).model
    assert not has_input(the(after, "Linear"), NORM_WEIGHT)
    assert attributes_of(after)["epsilon"] == pytest.approx(0.01)
    same_by_reference(before, after, X)


def test_a_norm_that_something_else_reads_stays() -> None:
    wanted = ["something other than linear layers reads its result"]
    assert untouched(fold_norms, expose(model(), "m")) == wanted
    text = TEXT.replace("y = MatMul(m,", "t = Tanh(m) y = MatMul(t,")
    assert untouched(fold_norms, model(text)) == []
    text = TWO.replace('z = MatMul(m, "other.weight.T")', "z = Tanh(m)").replace(
        "float[batch,n,40] z", "float[batch,n,64] z"
    )
    assert untouched(fold_norms, model(text)) == wanted


def test_a_norm_in_front_of_a_norm_is_taken_once() -> None:
    text = TEXT.replace("y = ", 'k = RMSNormalization <axis = -1> (m, "norm.weight") y = ').replace(
        "MatMul(m", "MatMul(k"
    )
    before = model(text)
    after = fold_norms(before).model
    assert operators(after)["RMSNormalization"] == 1
    assert untouched(fold_norms, after) == ["the linear layer has a norm already"]
    same_by_reference(before, after, X)


def test_a_residual_that_is_the_norm_is_no_input() -> None:
    text = TEXT.replace("=> (float[batch,n,40] y)", "=> (float[batch,n,64] y)").replace("y = ", "p = ")
    text = text.replace("}", "y = Add(p, m)}")
    codes = codes_of(outputs=64)
    before = fold_residuals(with_linears(text, codes, norm__weight=normal(5, 64))).model
    assert untouched(fold_norms, before) == ["something other than linear layers reads its result"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("axis = -1", "axis = 1", PLACE),
        ("axis = -1", "axis = -1, stash_type = 11", PLACE),
        ("epsilon = 0.01", "epsilon = 0.0", "the norm's epsilon is not above 0"),
    ],
)
def test_another_norm_is_refused(old: str, new: str, reason: str) -> None:
    assert untouched(fold_norms, model(TEXT.replace(old, new))) == [reason]


def test_a_gain_that_is_no_vector_is_refused() -> None:
    wanted = ["the norm's weight is not a constant vector as wide as the linear layer's input"]
    assert untouched(fold_norms, model(gain=normal(5, 1))) == wanted
    text = TEXT.replace("m = ", 'g = Neg("norm.weight") m = ').replace('(x, "norm.weight")', "(x, g)")
    assert untouched(fold_norms, model(text)) == wanted


def test_an_attribute_that_is_not_known_is_refused() -> None:
    (reason,) = untouched(fold_norms, tag(model(), "RMSNormalization", "other", 1))
    assert "other" in reason
