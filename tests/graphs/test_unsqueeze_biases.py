"""unsqueeze_biases: biases that ONNX Runtime does not join with the product in front of them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.graphs import build, fired, normal, operators, serialized, untouched

from satchel.graphs.passes.normalize.unsqueeze_biases import unsqueeze_biases

WEIGHTS = {"w": normal(1, 6, 5), "b": normal(2, 5)}
TEXT = "(float[1,3,6] x) => (float[1,3,5] y) { p = MatMul(x, w) y = Add(p, b) }"


def optimized(model: ir.Model, place: Path) -> ir.Model:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(place / "saved.onnx")
    ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    return ir.load(place / "saved.onnx")


@pytest.mark.parametrize("order", ["p, b", "b, p"])
def test_the_sum_is_the_same_and_stays_a_sum(order: str, tmp_path: Path) -> None:
    model = build(TEXT.replace("p, b", order), **WEIGHTS)
    after = fired(unsqueeze_biases, model, 1, feeds={"x": normal(3, 1, 3, 6)}, exact=True).model
    assert operators(optimized(model, tmp_path)) == {"Reshape": 2, "Gemm": 1}, "what the pass is there for"
    assert operators(optimized(after, tmp_path)) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize(
    "text",
    [
        "(float[3,6] x) => (float[3,5] y) { p = MatMul(x, w) y = Add(p, b) }",
        "(float[1,3,5] x) => (float[1,3,5] y) { p = Tanh(x) y = Add(p, b) }",
    ],
)
def test_other_sums_are_left_alone(text: str) -> None:
    assert untouched(unsqueeze_biases, build(text, **WEIGHTS)) == []
