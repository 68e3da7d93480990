"""decompose_norms: norms as arithmetic, which ONNX Runtime does not make into norms again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.graphs import build, fired, normal, operators, serialized, tag, untouched

from satchel.graphs.passes.normalize.decompose_norms import decompose_norms
from satchel.graphs.passes.normalize.lower_opset import lower_opset

WEIGHTS = {"scale": normal(1, 7), "bias": normal(2, 7)}
FEEDS = {"x": normal(3, 2, 5, 7) + 1}
NORMS = {
    "root mean square": "RMSNormalization<axis = -1, epsilon = 0.01>(x, scale)",
    "layer": "LayerNormalization<axis = 2, epsilon = 0.01>(x, scale, bias)",
    "layer without a bias": "LayerNormalization<axis = -1, epsilon = 0.01>(x, scale)",
    "default epsilon": "LayerNormalization(x, scale)",
}


def graph(norm: str, kind: str = "float") -> ir.Model:
    weights = {n: a.astype(np.float16 if kind == "float16" else np.float32) for n, a in WEIGHTS.items()}
    return build(f"({kind}[batch,sequence,7] x) => ({kind}[batch,sequence,7] y) {{ y = {norm} }}", **weights)


@pytest.mark.parametrize("name", NORMS)
def test_the_arithmetic_is_the_norm(name: str) -> None:
    after = fired(decompose_norms, graph(NORMS[name]), 1, feeds=FEEDS).model
    assert not [op for op in operators(after) if "Normalization" in op]


@pytest.mark.parametrize("name", NORMS)
def test_no_optimizer_makes_a_norm_of_it_again(name: str, tmp_path: Path) -> None:
    after = lower_opset(decompose_norms(graph(NORMS[name])).model).model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    ort.InferenceSession(serialized(after), options, providers=["CPUExecutionProvider"])
    assert not [n.op_type for n in ir.load(tmp_path / "saved.onnx").graph if "Norm" in n.op_type]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        ("LayerNormalization<axis = 1>(x, wide)", "the norm is not over the last axis alone"),
        ("RMSNormalization<axis = 1>(x, wide)", "the norm is not over the last axis alone"),
    ],
)
def test_a_norm_over_more_than_the_last_axis_is_refused(norm: str, reason: str) -> None:
    text = f"(float[2,5,7] x) => (float[2,5,7] y) {{ y = {norm} }}"
    assert untouched(decompose_norms, build(text, wide=normal(1, 5, 7))) == [reason]


def test_a_mean_that_is_read_is_refused() -> None:
    text = "(float[2,5,7] x) => (float[2,5,7] y, float[2,5,1] m) { y, m = LayerNormalization(x, scale) }"
    assert untouched(decompose_norms, build(text, scale=WEIGHTS["scale"])) == ["its mean or deviation is read, too"]


def test_an_unknown_attribute_is_refused() -> None:
    (reason,) = untouched(decompose_norms, tag(graph(NORMS["layer"]), "LayerNormalization", "shape", 1))
    assert "shape" in reason


def test_a_norm_in_half_precision_is_refused() -> None:
    (reason,) = untouched(decompose_norms, graph(NORMS["layer"], "float16"))
    assert "float32" in reason
