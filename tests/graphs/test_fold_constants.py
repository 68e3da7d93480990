"""fold_constants: what depends on constants only is computed once, with ONNX's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import build, fired, normal, operators, run, tag, untouched

from satchel.graphs.ir.values import SMALL
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.passes.normalize.fold_constants import EVALUATORS, fold_constants

X = {"x": normal(1, 2, 3, 5)}


def test_a_chain_of_constants_becomes_an_initializer() -> None:
    model = build("""(float[2,3,5] x) => (float[10,3] y) {
        pair = Constant<value_floats = [10.0, 3.0]>()
        whole = Cast<to = 7>(pair)
        same = Constant<value_ints = [2]>()
        shape = Reshape(whole, same)
        y = Reshape(x, shape)
    }""")
    result = fired(fold_constants, model, 4, feeds=X, exact=True)
    assert operators(result.model) == {"Reshape": 1}
    assert list(result.model.graph.initializers) == ["shape"]


FOLDED = {
    "Cast to int64": ("floats", "int64[5] out", "y = Cast<to = 7>(a)"),
    "Reshape that keeps and infers": ("floats", "float[1,5] out", "t = Reshape(a, one_five) y = Reshape(t, keep_rest)"),
    "Slice with a step": ("floats", "float[2] out", "y = Slice(a, one, four, zero, two)"),
    "Slice backwards to the start": ("floats", "float[5] out", "y = Slice(a, four, below, zero, back)"),
    "Slice from the end": ("floats", "float[2] out", "y = Slice(a, minus_two, far)"),
    "Unsqueeze and Squeeze": ("floats", "float[5] out", "t = Unsqueeze(a, zero) y = Squeeze(t)"),
    "Squeeze of one axis": ("floats", "float[5,1] out", "t = Unsqueeze(a, ends) y = Squeeze(t, zero)"),
    "Transpose by default": ("matrix", "float[3,2] out", "y = Transpose(a)"),
    "Transpose of three axes": ("cube", "float[5,2,3] out", "y = Transpose<perm = [2, 0, 1]>(a)"),
    "Concat": ("matrix", "float[2,6] out", "y = Concat<axis = -1>(a, a)"),
    "Gather of one": ("matrix", "float[2] out", "i = Squeeze(two) y = Gather<axis = 1>(a, i)"),
    "Gather from the end": ("floats", "float[1] out", "y = Gather(a, minus_two)"),
    "Add of two shapes": ("matrix", "float[2,3] out", "y = Add(a, half)"),
    "Sub": ("matrix", "float[2,3] out", "y = Sub(half, a)"),
    "Mul": ("matrix", "float[2,3] out", "y = Mul(a, a)"),
    "Div of floats": ("matrix", "float[2,3] out", "y = Div(half, a)"),
    "Div of integers rounds towards zero": ("integers", "int64[4] out", "y = Div(a, divisors)"),
    "Neg": ("floats", "float[5] out", "y = Neg(a)"),
    "Sqrt": ("squares", "float[3] out", "y = Sqrt(a)"),
    "Reciprocal": ("floats", "float[5] out", "y = Reciprocal(a)"),
    "Identity": ("floats", "float[5] out", "y = Identity(a)"),
}
OPERANDS = {
    "floats": "float[5] a = {1.5, -2.5, 3.25, -0.75, 9.0}",
    "matrix": "float[2,3] a = {1.0, -2.0, 3.0, 4.0, -5.0, 7.0}",
    "cube": "float[2,3,5] a = {" + ", ".join(map(str, map(float, range(30)))) + "}",
    "integers": "int64[4] a = {7, -7, 8, -8}",
    "squares": "float[3] a = {2.0, 3.0, 5.0}",
}
INDICES = """int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[1] back = {-1},
    int64[1] minus_two = {-2}, int64[1] below = {-9}, int64[1] far = {9223372036854775807}, int64[2] ends = {0, 2},
    int64[2] one_five = {1, 5}, int64[2] keep_rest = {0, -1}, float[1] half = {0.5},
    int64[4] divisors = {2, 2, -3, -3}"""


@pytest.mark.parametrize("case", FOLDED)
def test_a_folded_value_is_what_onnx_runtime_computes(case: str) -> None:
    operand, declared, nodes = FOLDED[case]
    # The last node keeps the folded value from being an output of the graph, which is left alone.
    text = f"() => ({declared}) <{OPERANDS[operand]}, {INDICES}> {{ {nodes} out = Clip(y) }}"
    model = build(text)
    result = fired(fold_constants, model, len(model.graph) - 1)
    assert operators(result.model) == {"Clip": 1}
    wanted, found = run(model, {})["out"], run(result.model, {})["out"]
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_every_evaluator_is_tried() -> None:
    text = " ".join(nodes for _, _, nodes in FOLDED.values())
    assert [name for name in EVALUATORS if f"= {name}(" not in text and f"= {name}<" not in text] == []


WIDE = (131, 137)  # more bytes than passes read


def test_the_transpose_of_a_large_weight_is_written_down_and_not_computed() -> None:
    weight = normal(2, *WIDE)
    assert weight.nbytes > SMALL
    model = build("(float[2,137] x) => (float[2,131] y) { t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }", w=weight)
    result = fired(fold_constants, model, 1, feeds={"x": normal(3, 2, 137) / 137})
    assert operators(result.model) == {"MatMul": 1}
    (value,) = result.model.graph.initializers.values()
    assert value.name == "w.T"
    assert isinstance(value.const_value, LazyWeight)
    np.testing.assert_array_equal(value.const_value.numpy(), weight.T)


def test_a_weight_that_is_read_elsewhere_keeps_its_own_initializer() -> None:
    model = build(
        "(int64[2] i) => (float[2,131] y) { t = Transpose(w) e = Gather(w, i) y = MatMul(e, t) }",
        w=normal(2, *WIDE) / 8,
    )
    result = fired(fold_constants, model, 1, feeds={"i": np.asarray([130, 0])})
    assert set(result.model.graph.initializers) == {"w", "w.T"}


@pytest.mark.parametrize("shape", [(131, 137), (2, 3, 4000)], ids=["kept as it is", "three axes"])
def test_other_moves_of_a_large_weight_are_left_alone(shape: tuple[int, ...]) -> None:
    perm = {2: "[0, 1]", 3: "[2, 0, 1]"}[len(shape)]
    text = f"(float[1] x) => (float[1] y) {{ t = Transpose<perm = {perm}>(w) s = Size(t) y = CastLike(s, x) }}"
    assert untouched(fold_constants, build(text, w=normal(2, *shape))) == []


def test_a_result_that_would_be_large_is_left_alone() -> None:
    columns, rows = normal(1, 150, 1), normal(2, 1, 150)
    text = "(float[150] x) => (float[150,150] y) { v = Mul(a, b) y = Add(x, v) }"
    assert untouched(fold_constants, build(text, a=columns, b=rows)) == []


@pytest.mark.parametrize(
    "body",
    ["y = Add(x, x)", "s = Shape(x) t = Cast<to = 1>(s) y = Add(t, x)", "r = Relu(one) y = Add(x, r)"],
    ids=["an input", "a shape", "an operator without evaluator"],
)
def test_what_is_not_constant_or_not_known_is_left_alone(body: str) -> None:
    text = f"(float[1] x) => (float[1] y) <float[1] one = {{1.0}}> {{ {body} }}"
    assert untouched(fold_constants, build(text)) == []


@pytest.mark.parametrize("body", ["y = Neg(one)", "y = Constant<value_float = 1.5>()"])
def test_an_output_of_the_graph_stays_a_node(body: str) -> None:
    assert untouched(fold_constants, build(f"() => (float y) <float one = {{1.0}}> {{ {body} }}")) == []


@pytest.mark.parametrize("op_type", sorted(set(EVALUATORS) - {"Identity"}))
def test_an_attribute_that_no_evaluator_knows_is_refused(op_type: str) -> None:
    inputs = {"Concat": "a, a", "Gather": "a, i", "Reshape": "a, i", "Slice": "a, i, i", "Unsqueeze": "a, i"}
    attribute = {"Concat": "<axis = 0>", "Cast": "<to = 1>"}.get(op_type, "")
    binary = op_type in ("Add", "Sub", "Mul", "Div")
    text = f"""() => (float[1] y) <float[1] a = {{2.0}}, int64[1] i = {{0}}> {{
        v = {op_type}{attribute}({inputs.get(op_type, "a, a" if binary else "a")}) y = Clip(v)
    }}"""
    reasons = untouched(fold_constants, tag(build(text), op_type, "novelty", 1))
    assert reasons == [f"{op_type} has an attribute that this pass does not know: novelty"]
