"""name_projections: products are called after their weights."""

from __future__ import annotations

import onnx_ir as ir
from support.graphs import build, fired, normal, untouched

from satchel.graphs.passes.normalize.name_projections import name_projections

X = {"x": normal(1, 3, 5)}


def names(model: ir.Model) -> list[str | None]:
    return [node.name for node in model.graph]


def test_products_take_the_names_of_their_weights() -> None:
    text = """(float[3,5] x) => (float[3,5] y) {
        a = MatMul(x, "layers.0.up.weight.T") b = MatMul(a, "head.weight") y = MatMul(b, table)
    }"""
    weights = {"layers__0__up__weight__T": normal(2, 5, 7), "head__weight": normal(3, 7, 11), "table": normal(4, 11, 5)}
    after = fired(name_projections, build(text, **weights), 3, feeds=X, exact=True).model
    assert names(after) == ["layers.0.up", "head", "table"]


def test_a_weight_that_is_used_twice_names_one_product() -> None:
    model = build("(float[3,5] x) => (float[3,5] y) { a = MatMul(x, w) y = MatMul(a, w) }", w=normal(2, 5, 5))
    assert names(fired(name_projections, model, 1).model) == ["w", "node_1"]


def test_a_name_that_is_taken_is_left_to_its_node() -> None:
    model = build("(float[3,5] x) => (float[3,5] y) { [w] a = Neg(x) y = MatMul(a, w) }", w=normal(2, 5, 5))
    assert untouched(name_projections, model) == []


def test_products_without_a_weight_are_left_alone() -> None:
    text = "(float[3,3] x) => (float[3,3] y) <float[3,3] c = {1,2,3,4,5,6,7,8,9}> { a = MatMul(x, x) y = MatMul(a, c) }"
    assert untouched(name_projections, build(text)) == []
    other = "(float[3,5] x) => (float[3,5] y) { t = com.microsoft.MatMul(x, w) y = Mul(t, w) }"
    assert untouched(name_projections, build(other, w=normal(1, 5))) == []
