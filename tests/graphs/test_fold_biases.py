"""fold_biases: a product adds its own bias."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import expose, fired, normal, operators, the, untouched
from support.native_graphs import codes_of, same_by_reference, with_linears

from satchel.graphs.passes.native.fold_biases import fold_biases
from satchel.graphs.passes.native.fold_residuals import fold_residuals

TEXT = """(float[batch,n,64] x) => (float[batch,n,40] y) {
    p = MatMul(x, "layer.weight.T")
    y = Add(p, "layer.bias")
}"""
X = {"x": normal(2, 2, 3, 64)}


@pytest.mark.parametrize("text", [TEXT, TEXT.replace('Add(p, "layer.bias")', 'Add("layer.bias", p)')])
@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, 16)])
def test_a_bias_is_added_by_the_product(text: str, bits: int, block: int | None) -> None:
    before = with_linears(text, codes_of(bits=bits, block=block), layer__bias=normal(3, 40))
    after = fired(fold_biases, before, 1).model
    assert operators(after) == {"satchel::Linear": 1}
    same_by_reference(before, after, X)


def test_only_one_bias_is_taken() -> None:
    text = TEXT.replace('y = Add(p, "layer.bias")', 'q = Add(p, "layer.bias") y = Add(q, "other.bias")')
    before = with_linears(text, codes_of(), layer__bias=normal(3, 40), other__bias=normal(4, 40))
    after = fired(fold_biases, before, 1).model
    assert operators(after) == {"satchel::Linear": 1, "Add": 1}
    same_by_reference(before, after, X)


@pytest.mark.parametrize("bias", [normal(3, 1), normal(3, 1, 40), np.asarray(2, np.float32)])
def test_another_shape_is_refused(bias: np.ndarray) -> None:
    before = with_linears(TEXT, codes_of(), layer__bias=bias)
    assert untouched(fold_biases, before) == ["what it adds is not one number for each output"]


def test_a_product_that_something_else_reads_is_left_alone() -> None:
    before = with_linears(TEXT, codes_of(), layer__bias=normal(3, 40))
    assert untouched(fold_biases, expose(before, str(the(before, "Linear").outputs[0].name))) == []


def test_a_product_with_a_gate_or_a_residual_is_left_alone() -> None:
    text = TEXT.replace("y = Add(p,", "q = Add(p, r) y = Add(q,").replace("64] x)", "64] x, float[batch,n,40] r)")
    before = fold_residuals(with_linears(text, codes_of(), layer__bias=normal(3, 40))).model
    assert operators(before)["Add"] == 1
    assert untouched(fold_biases, before) == []
