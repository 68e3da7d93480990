"""insert_qdq: a product reads codes, with activations in float, in int8 per token, or in int8 per tensor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.codes import rounded, values
from support.graphs import build, expose, fired, normal, operators, run, serialized, untouched

from satchel.graphs.passes.normalize.remove_duplicates import remove_duplicates
from satchel.graphs.passes.quantize.insert_qdq import insert_qdq
from satchel.graphs.quant.quantized import Quantized, QuantizedWeight
from satchel.graphs.quant.recipe import Rule
from satchel.graphs.targets.sessions import EXACT_PRODUCTS, cpu_sessions
from satchel.runtime.bundle.contract import NATIVE

INPUTS, OUTPUTS = 64, 48
W = normal(1, INPUTS, OUTPUTS)
TEXT = """(float[batch,n,64] x) => (float[batch,n,48] y) {
    a = Tanh(x)
    p = MatMul(a, "layer.weight.T")
    y = Neg(p)
}"""
NAME = "layer.weight.T"
X = {"x": normal(2, 2, 5, INPUTS)}
CHANNEL = rounded(NAME, W.T.copy(), 8, None)


def product(text: str = TEXT, **weights: np.ndarray) -> ir.Model:
    return build(text, **(weights or {"layer__weight__T": W}))


def quantized(codes: QuantizedWeight, form: str, before: ir.Model | None = None, count: int = 1) -> ir.Model:
    given = product() if before is None else before
    return fired(insert_qdq({codes.name: codes}, {codes.name: form}), given, count).model


def decoded(codes: QuantizedWeight) -> ir.Model:
    """The float graph over what the codes stand for."""
    return product(layer__weight__T=np.ascontiguousarray(values(codes).T))


def per_token(a: np.ndarray, codes: QuantizedWeight) -> np.ndarray:
    """The product with each row of `a` in int8, its largest magnitude being 127, in float64."""
    a = a.astype(np.float64)
    step = np.maximum(np.abs(a).max(-1, keepdims=True), 1e-10) / 127
    return np.rint(a / step) * step @ values(codes).T.astype(np.float64)


def per_tensor(a: np.ndarray, codes: QuantizedWeight) -> np.ndarray:
    """The product with `a` in uint8 as ONNX defines DynamicQuantizeLinear, in float64."""
    low, high = min(float(a.min()), 0.0), max(float(a.max()), 0.0)
    step = (high - low) / 255
    zero = np.clip(np.rint(-low / step), 0, 255)
    codes_of_a = np.clip(np.rint(a.astype(np.float64) / step) + zero, 0, 255)
    return (codes_of_a - zero) * step @ values(codes).T.astype(np.float64)


def optimized(model: ir.Model, path: Path, level: str = "4") -> onnx.ModelProto:
    """What ONNX Runtime makes of a graph with the runner's own session settings."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    sessions = cpu_sessions(Quantized(model, {NAME: CHANNEL}, {}, {}, "int8"))
    for key, value in sessions["prefill"].config.items():
        options.add_session_config_entry(key, value)
    assert options.get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == level
    ort.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 16), (8, 64), (8, None)])
def test_in_float_the_product_is_that_of_the_decoded_weight(bits: int, block: int | None, symmetric: bool) -> None:
    codes = rounded(NAME, W.T.copy(), bits, block, symmetric)
    after = quantized(codes, "float")
    casts, subtractions = int(block is not None), int(bits == 8 and symmetric)  # of scales in float16, for zero points
    made = {"Cast": casts + subtractions, "Sub": subtractions}
    assert operators(after) == Counter({"Tanh": 1, "DequantizeLinear": 1, "MatMul": 1, "Neg": 1, **made})
    np.testing.assert_array_equal(run(after, X)["y"], run(decoded(codes), X)["y"])
    wanted = run(decoded(codes), X)["y"]  # fused with its matrix, the linear layer rounds its input to 8 bits
    np.testing.assert_allclose(run(after, X, optimized=True)["y"], wanted, rtol=0, atol=0.01 * np.abs(wanted).max())


def test_per_token_each_row_has_its_own_scale() -> None:
    feeds = {"x": X["x"] * np.asarray([1e-3, 1, 10, 0.1, 1e-5], np.float32)[:, None]}
    found = run(quantized(CHANNEL, "token"), feeds)["y"]
    wanted = -per_token(np.tanh(feeds["x"]), CHANNEL)
    largest = np.abs(wanted).max(-1, keepdims=True)
    assert (np.abs(found - wanted) / largest).max() < 1e-5


def test_per_token_a_row_of_zeros_stays_zeros() -> None:
    feeds = {"x": X["x"].copy()}
    feeds["x"][0, 2] = 0
    found = run(quantized(CHANNEL, "token"), feeds)["y"]
    np.testing.assert_array_equal(found[0, 2], 0)
    assert np.abs(found[0, 1]).min() > 0


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (8, 32), (8, None)])
def test_expanded_the_product_is_one_of_int8_weights_made_of_the_codes(
    bits: int, block: int | None, symmetric: bool
) -> None:
    codes = rounded(NAME, W.T.copy(), bits, block, symmetric)
    after = quantized(codes, "int8")
    decoded_weight = values(codes).astype(np.float32)  # [outputs, inputs]
    step = np.abs(decoded_weight).max(1, keepdims=True) / np.float32(127)
    int8 = np.rint(decoded_weight / step)  # in float32 as in the graph, since codes often lie between two steps
    a = np.tanh(X["x"]).astype(np.float64)
    row = np.abs(a).max(-1, keepdims=True) / 127
    wanted = np.rint(a / row) * row @ (int8 * step).T.astype(np.float64)
    np.testing.assert_allclose(run(after, X)["y"], -wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted + run(decoded(codes), X)["y"]).max() > 1e-3, "nothing was rounded"


def per_block(a: np.ndarray, codes: QuantizedWeight) -> np.ndarray:
    """The product with each block of each row of `a` in int8, the largest number of it being 127, in float64."""
    rows, inputs = a.shape
    block = 64
    whole = np.zeros((rows, -(-inputs // block) * block))
    whole[:, :inputs] = a
    parts = whole.reshape(rows, -1, block)
    step = np.maximum(np.abs(parts).max(-1, keepdims=True), 1e-30) / 127
    return (np.rint(parts / step) * step).reshape(rows, -1)[:, :inputs] @ values(codes).T.astype(np.float64)


@pytest.mark.parametrize("inputs", [64, 40, 130, 192, 256])
def test_by_blocks_each_block_of_each_row_has_its_own_scale(inputs: int) -> None:
    codes = rounded(NAME, normal(4, OUTPUTS, inputs), 8, None)
    text = TEXT.replace("64] x", f"{inputs}] x")
    before = product(text, layer__weight__T=np.ascontiguousarray(values(codes).T))
    x = normal(5, 3, 1, inputs) * np.asarray([1e-3, 1, 50], np.float32)[:, None, None]
    found = run(quantized(codes, "groups", before), {"x": x})["y"]
    wanted = -per_block(np.tanh(x)[:, 0], codes)
    np.testing.assert_allclose(found[:, 0], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(found - run(before, {"x": x})["y"]).max() > 1e-3, "nothing was rounded"
    for row in range(3):
        alone = run(quantized(codes, "groups", before), {"x": x[row : row + 1]})["y"]
        np.testing.assert_allclose(found[row], alone[0], rtol=0, atol=1e-6 * np.abs(alone).max())


def test_per_tensor_one_token_is_quantized_dynamically() -> None:
    feeds = {"x": X["x"][:1, :1]}
    after = quantized(CHANNEL, "tensor")
    assert operators(after)["MatMulInteger"] == 1
    assert operators(after)["MatMul"] == 0
    wanted = -per_tensor(np.tanh(feeds["x"]), CHANNEL)
    np.testing.assert_allclose(run(after, feeds, optimized=True)["y"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["float", "token", "tensor", "int8", "groups"])
def test_a_product_that_is_the_graph_s_output_keeps_its_name(form: str) -> None:
    after = quantized(CHANNEL, form, expose(product(), "p"))
    assert [str(v.name) for v in after.graph.outputs] == ["y", "p"]
    found = run(after, X)
    np.testing.assert_array_equal(found["p"], -found["y"])


@pytest.mark.parametrize("form", ["float", "token", "tensor", "int8", "groups"])
def test_two_products_of_one_weight_share_its_codes(form: str) -> None:
    twice = TEXT.replace("y = Neg(p)", f'q = MatMul(x, "{NAME}") y = Sub(p, q)')
    after = quantized(CHANNEL, form, product(twice), 2)
    assert sum(name.startswith(NAME) for name in after.graph.initializers) == 2


@pytest.mark.parametrize("form", ["float", "token", "tensor", "int8", "groups"])
def test_a_session_loads_several_weights_of_one_shape(form: str) -> None:
    names = [f"{letter}.weight.T" for letter in "abc"]
    text = """(float[batch,n,48] x) => (float[batch,n,48] y) {
        p = MatMul(x, "a.weight.T") q = MatMul(p, "b.weight.T") y = MatMul(q, "c.weight.T")
    }"""
    codes = {name: rounded(name, normal(seed, 48, 48), 8, None) for seed, name in enumerate(names)}
    given = build(text, **{name.replace(".", "__"): values(codes[name]).T.copy() for name in names})
    after = fired(insert_qdq(codes, dict.fromkeys(codes, form)), given, 3).model
    fewer = remove_duplicates(after).model
    x = {"x": normal(9, 1, 1, 48)}
    found, wanted = run(fewer, x, optimized=True)["y"], run(given, x)["y"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.05 * np.abs(wanted).max())


def test_sessions_that_multiply_bytes_are_exact() -> None:
    rule = Rule(kinds=("linear",), bits=8, prefill="token", decode="float")
    sessions = cpu_sessions(Quantized(product(), {NAME: CHANNEL}, {NAME: rule}, {}, "int8"))
    exact = {phase for phase, session in sessions.items() if EXACT_PRODUCTS.items() <= session.config.items()}
    assert exact >= {"prefill", "score", NATIVE}
    assert "decode" not in exact
    twice = product(TEXT.replace("y = Neg(p)", f'q = MatMul(x, "{NAME}") y = Sub(p, q)'))
    assert (
        not EXACT_PRODUCTS.keys()
        & cpu_sessions(Quantized(twice, {NAME: CHANNEL}, {NAME: rule}, {}, "int8"))["score"].config
    )


def test_weights_that_are_not_named_are_left_alone() -> None:
    assert untouched(insert_qdq({}, {}), product()) == []
    other = rounded("other.weight.T", W.T.copy())
    assert untouched(insert_qdq({other.name: other}, {other.name: "float"}), product()) == []


@pytest.mark.parametrize(
    ("form", "bits", "block", "kernel"),
    [
        ("float", 4, 32, "MatMulNBits"),
        ("float", 8, 64, "MatMulNBits"),
        ("token", 8, None, "MatMulIntegerToFloat"),
        ("tensor", 8, None, "DynamicQuantizeMatMul"),
        ("int8", 4, 32, "MatMulIntegerToFloat"),
        ("int8", 8, 64, "MatMulIntegerToFloat"),
        ("groups", 8, None, "MatMulNBits"),
    ],
)
def test_the_runner_multiplies_codes(form: str, bits: int, block: int | None, kernel: str, tmp_path: Path) -> None:
    graph = optimized(quantized(rounded(NAME, W.T.copy(), bits, block), form), tmp_path / "optimized.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert "MatMul" not in kinds, kinds
    assert kernel in kinds, kinds
    if kernel == "MatMulNBits":
        (node,) = [n for n in graph.node if n.op_type == kernel]
        assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4
