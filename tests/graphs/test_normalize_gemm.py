"""normalize_gemm: a Gemm between two Reshapes becomes MatMul and Add on the rows as they are."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, expose, fired, normal, operators, tag, untouched

from satchel.graphs.passes.normalize.normalize_gemm import normalize_gemm

WEIGHTS = {"w": normal(1, 5, 7), "b": normal(2, 7)}
X = {"x": normal(3, 2, 3, 5)}
TEXT = """(float[batch,sequence,5] x) => (float[batch,sequence,7] y)
    <int64[2] flat = {-1, 5}, int64[3] spread = {0, -1, 7}, int64[1] two = {2}, float[batch,sequence,7] r> {
    rows = Reshape(x, flat)
    product = Gemm(rows, w, b)
    all = Shape<end = 2>(x)
    width = Shape<start = 1>(w)
    target = Concat<axis = 0>(all, width)
    r = Reshape(product, target)
    y = Neg(r)
}"""


def gemm(old: str = "", new: str = "", **weights: object) -> ir.Model:
    return build(TEXT, (old, new), **(WEIGHTS | weights))  # type: ignore[arg-type]


def test_a_gemm_on_flattened_rows_becomes_matmul_and_add() -> None:
    assert operators(fired(normalize_gemm, gemm(), 1, feeds=X).model) == {"MatMul": 1, "Add": 1, "Neg": 1}


@pytest.mark.parametrize("inputs", ["(rows, w)", '(rows, w, "")'], ids=["two inputs", "an empty third"])
def test_a_gemm_without_bias_becomes_matmul(inputs: str) -> None:
    after = fired(normalize_gemm, build(TEXT.replace("(rows, w, b)", inputs), w=WEIGHTS["w"]), 1, feeds=X).model
    assert operators(after) == {"MatMul": 1, "Neg": 1}


@pytest.mark.parametrize("attribute", ["alpha = 0.5", "beta = 2.0", "transA = 1", "transB = 1"])
def test_a_gemm_that_scales_or_transposes_is_refused(attribute: str) -> None:
    text = TEXT.replace("5", "7").replace("Gemm(", f"Gemm<{attribute}>(")
    assert untouched(normalize_gemm, build(text, w=normal(1, 7, 7), b=WEIGHTS["b"])) == [
        "the Gemm scales or transposes"
    ]


def test_a_gemm_with_a_bias_for_each_row_is_refused() -> None:
    model = gemm("[batch,sequence,", "[3,1,", b=normal(4, 3, 1))
    assert untouched(normalize_gemm, model) == ["the Gemm adds more than one row"]


def test_an_attribute_that_is_not_known_is_refused() -> None:
    assert "novelty" in untouched(normalize_gemm, tag(gemm(), "Gemm", "novelty", 1))[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float[batch,sequence,7] r", "float[sequence,batch,7] r"),
        ("(float[batch,sequence,5] x)", "(float[batch,sequence,1,5] x)"),
        ("(float[batch,sequence,5] x)", "(float[batch,sequence,10] x)"),
        ("batch,sequence", "?,?"),
        ("rows = Reshape(x, flat)", "rows = Flatten<axis = 2>(x)"),
        ("r = Reshape(product, target)", "s = Relu(product) r = Reshape(s, target)"),
        ("product = Gemm(rows, w, b)", "v = Neg(w) product = Gemm(rows, v, b)"),
    ],
    ids=[
        "rows split otherwise", "more axes", "rows of another width", "dimensions without a name",
        "no Reshape before", "something between", "a matrix that is computed",
    ],
)  # fmt: skip
def test_other_rows_and_other_surroundings_are_left_alone(old: str, new: str) -> None:
    assert untouched(normalize_gemm, gemm(old, new)) == []


def test_a_gemm_with_two_readers_is_left_alone() -> None:
    assert untouched(normalize_gemm, expose(gemm(), "product")) == []
