"""simplify_shapes: the targets of Reshapes become constants where they follow from the input."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, fired, normal, operators, run, the, untouched

from satchel.graphs.ir.values import constant
from satchel.graphs.passes.normalize.simplify_shapes import simplify_shapes

X = {"x": normal(1, 2, 3, 35)}


def reshape(target: str, result: str, source: str = "batch,sequence,35", attribute: str = "") -> ir.Model:
    """x [batch, sequence, 35] reshaped to `target`, which joins dimensions by name; `result` is the shape it gives."""
    return build(f"""(float[{source}] x) => (float[{result}] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] five = {{5}}, int64[1] seven = {{7}},
         int64[1] whole = {{35}}, int64[1] minus = {{-1}}, float[{result}] r> {{
        all = Shape(x)
        batch = Gather(all, zero)
        sequence = Gather(all, one)
        rows = Mul(batch, sequence)
        target = Concat<axis = 0>({target})
        r = Reshape{attribute}(x, target)
        y = Neg(r)
    }}""")


@pytest.mark.parametrize(
    ("target", "result", "constants"),
    [
        ("batch, sequence, five, seven", "batch,sequence,5,7", [0, 0, 5, 7]),
        ("rows, whole", "rows,35", [-1, 35]),
        ("batch, whole, sequence", "batch,35,sequence", [0, 35, -1]),
        ("batch, sequence, minus, one", "batch,sequence,35,1", [0, 0, 35, 1]),
    ],
    ids=["all kept", "one not in the input", "one at another place", "one inferred before"],
)
def test_a_target_made_of_the_inputs_shape_becomes_a_constant(target: str, result: str, constants: list[int]) -> None:
    after = fired(simplify_shapes, reshape(target, result), 1, feeds=X, exact=True).model
    assert operators(after) == {"Reshape": 1, "Neg": 1}
    array = constant(the(after, "Reshape").inputs[1])
    assert array is not None
    assert array.tolist() == constants


def test_allowzero_goes_since_a_zero_now_keeps_a_dimension() -> None:
    model = reshape("batch, sequence, five, seven", "batch,sequence,5,7", attribute="<allowzero = 1>")
    assert not the(fired(simplify_shapes, model, 1, feeds=X, exact=True).model, "Reshape").attributes


@pytest.mark.parametrize(
    ("target", "result"),
    [("sequence, batch, whole", "sequence,batch,35"), ("rows, five, seven", "2,sequence_of_two,other,7")],
    ids=["two moved", "two unknown"],
)
def test_a_target_with_two_dimensions_that_do_not_follow_is_left_alone(target: str, result: str) -> None:
    assert untouched(simplify_shapes, reshape(target, result)) == []


def test_a_target_with_an_empty_dimension_is_left_alone() -> None:
    model = reshape("batch, sequence, zero", "batch,sequence,0", source="batch,sequence,0", attribute="<allowzero = 1>")
    assert untouched(simplify_shapes, model) == []


def test_a_reshape_of_unknown_shape_is_left_alone() -> None:
    model = reshape("batch, sequence, five, seven", "batch,sequence,5,7")
    the(model, "Reshape").outputs[0].shape = None
    assert untouched(simplify_shapes, model) == []


EXPAND = """(float[batch,sequence,35] x) => (float[batch,sequence,35] y) <float[batch,sequence,35] e> {
    all = Shape(x) e = Expand(x, all) y = Neg(e)
}"""


def test_an_expand_to_the_same_shape_goes() -> None:
    assert operators(fired(simplify_shapes, build(EXPAND), 1, feeds=X, exact=True).model) == {"Neg": 1}


@pytest.mark.parametrize("shape", ["other,sequence,35", "batch,sequence,1"], ids=["another name", "another size"])
def test_an_expand_that_may_repeat_is_left_alone(shape: str) -> None:
    model = build(EXPAND.replace("(float[batch,sequence,35] x)", f"(float[{shape}] x)"))
    assert untouched(simplify_shapes, model) == []


def test_an_expand_of_unnamed_dimensions_is_left_alone() -> None:
    model = build(EXPAND.replace("batch,sequence", "?,?"))
    assert untouched(simplify_shapes, model) == []
    assert run(model, X)["y"].shape == (2, 3, 35)


PRODUCT = (
    "(float[batch,sequence,5] x, float[5,7] plain) => (float[batch,sequence,7] y) { p = MatMul(x, w) y = Add(p, b) }"
)


def without_shape(text: str) -> ir.Model:
    model = build(text, w=normal(2, 5, 7), b=normal(3, 7))
    the(model, "MatMul").outputs[0].shape = None
    return model


def test_a_product_without_a_shape_gets_that_of_its_operands() -> None:
    model = without_shape(PRODUCT)
    feeds = {"x": normal(4, 2, 3, 5), "plain": normal(5, 5, 7)}
    after = fired(simplify_shapes, model, 1, feeds=feeds, exact=True).model
    assert [str(d) for d in the(after, "MatMul").outputs[0].shape or ()] == ["batch", "sequence", "7"]
