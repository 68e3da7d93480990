"""fold_residuals: a product adds its result to the residual stream."""

from __future__ import annotations

import pytest
from support.graphs import expose, fired, normal, operators, the, untouched
from support.native_graphs import codes_of, same_by_reference, with_linears

from satchel.graphs.passes.native.fold_biases import fold_biases
from satchel.graphs.passes.native.fold_residuals import fold_residuals

TEXT = """(float[batch,n,64] x, float[batch,n,40] r) => (float[batch,n,40] y) {
    p = MatMul(x, "layer.weight.T")
    s = Tanh(r)
    y = Add(p, s)
}"""
FEEDS = {"x": normal(2, 2, 3, 64), "r": normal(3, 2, 3, 40)}


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("Add(p, s)", "Add(s, p)")])
@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, 16)])
def test_the_product_adds_the_residual_wherever_that_is_made(text: str, bits: int, block: int | None) -> None:
    before = with_linears(text, codes_of(bits=bits, block=block))
    after = fired(fold_residuals, before, 1).model
    assert operators(after) == {"satchel::Linear": 1, "Tanh": 1}
    assert [node.op_type for node in after.graph] == ["Tanh", "Linear"]
    same_by_reference(before, after, FEEDS)


def test_a_bias_comes_first() -> None:
    text = TEXT.replace("y = Add(p, s)", 'b = Add(p, "layer.bias") y = Add(s, b)')
    before = with_linears(text, codes_of(), layer__bias=normal(4, 40))
    after = fired(fold_residuals, fold_biases(before).model, 1).model
    assert operators(after) == {"satchel::Linear": 1, "Tanh": 1}
    same_by_reference(before, after, FEEDS)


def test_of_two_products_one_adds_the_other() -> None:
    text = TEXT.replace("s = Tanh(r)", 's = MatMul(x, "other.weight.T")')
    before = with_linears(text, codes_of(), codes_of("other.weight.T"))
    after = fired(fold_residuals, before, 1).model
    assert operators(after) == {"satchel::Linear": 2}
    same_by_reference(before, after, FEEDS)


@pytest.mark.parametrize("r", ["float[1,1,40] r", "float[batch,1,40] r", "float[batch,?,40] r"])
def test_summands_that_may_differ_in_shape_are_refused(r: str) -> None:
    before = with_linears(TEXT.replace("float[batch,n,40] r", r), codes_of())
    assert untouched(fold_residuals, before) == ["the summands may differ in shape"]


def test_a_product_that_something_else_reads_is_left_alone() -> None:
    before = with_linears(TEXT, codes_of())
    assert untouched(fold_residuals, expose(before, str(the(before, "Linear").outputs[0].name))) == []


def test_a_second_residual_and_a_weight_are_left_alone() -> None:
    text = TEXT.replace("y = Add(p, s)", "t = Add(p, s) y = Add(t, r)")
    assert operators(fired(fold_residuals, with_linears(text, codes_of()), 1).model)["Add"] == 1
    text = TEXT.replace("Add(p, s)", 'Add(p, "layer.bias")')
    assert untouched(fold_residuals, with_linears(text, codes_of(), layer__bias=normal(4, 40))) == []
