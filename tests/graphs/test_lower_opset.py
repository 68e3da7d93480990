"""lower_opset: each operator in its form of version 17, with the same numbers."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from support.graphs import build, normal, same_numbers, untouched

from satchel.graphs.passes.normalize.lower_opset import lower_opset

FEEDS = {"x": normal(1, 2, 3, 8)}
REWRITTEN = {
    "mean": "y = ReduceMean<keepdims = 1>(x, axis)",
    "largest": "y = ReduceMax<keepdims = 0>(x, axis)",
    "smallest": "y = ReduceMin(x, axis)",
    "gelu": "y = Gelu(x)",
    "gelu by tanh": 'y = Gelu<approximate = "tanh">(x)',
    "swish": "y = Swish(x)",
    "steep swish": "y = Swish<alpha = 1.7>(x)",
    "split": "a, b, c = Split<axis = -1, num_outputs = 3>(x) y = Concat<axis = -1>(c, b, a)",
    "cast": "h = Cast<to = 10, saturate = 1>(x) y = Cast<to = 1>(h)",
}
KEPT = {
    "sum": "y = ReduceSum(x, axis)",
    "arithmetic": "a = Mul(x, x) y = Softmax<axis = -1>(a)",
    "reshape": "y = Reshape<allowzero = 0>(x, shape)",
}


SHAPES = {"mean": "2,3,1", "largest": "2,3", "smallest": "2,3,1", "sum": "2,3,1", "reshape": "6,8"}


def graph(body: str, shape: str = "2,3,8") -> ir.Model:
    return build(
        f"(float[2,3,8] x) => (float[{shape}] y) <int64[1] axis = {{-1}}, int64[2] shape = {{6, 8}}> {{ {body} }}"
    )


@pytest.mark.parametrize("name", [*REWRITTEN, *KEPT])
def test_the_numbers_are_the_same_and_the_checker_knows_the_form(name: str) -> None:
    model = graph((REWRITTEN | KEPT)[name], SHAPES.get(name, "2,3,8"))
    after = lower_opset(model)
    assert after.count == (2 if name in REWRITTEN else 1)
    assert after.model.graph.opset_imports == {"": 17}
    assert after.model.ir_version == 8
    onnx.checker.check_model(ir.to_proto(after.model), full_check=True)
    same_numbers(model, after.model, FEEDS)
    assert untouched(lower_opset, after.model) == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = com.microsoft.QuickGelu(x)", "com.microsoft::QuickGelu is not of the standard set"),
        ("y = RMSNormalization(x, x)", "RMSNormalization has no form in operator set 17 that is known here"),
        ("a = NonZero(x) y = Cast<to = 1>(a)", "NonZero has no form in operator set 17 that is known here"),
    ],
)
def test_what_has_no_form_is_refused_and_the_version_stays(body: str, reason: str) -> None:
    result = lower_opset(graph(body))
    assert [refusal.reason for refusal in result.refusals] == [reason]
    assert result.model.graph.opset_imports[""] == 24


def test_axes_that_are_no_constants_are_refused() -> None:
    text = "(float[2,3,8] x, int64[1] axis) => (float[?,?,?] y) { y = ReduceMean(x, axis) }"
    assert untouched(lower_opset, build(text)) == ["the axes of ReduceMean are not constants"]


def test_a_width_that_is_no_number_is_refused() -> None:
    text = "(float[2,3,n] x) => (float[?,?,?] y) { a, b = Split<axis = -1, num_outputs = 2>(x) y = Add(a, b) }"
    assert untouched(lower_opset, build(text)) == ["the width that is split is not a number"]
