"""Puts QuantizeLinear and DequantizeLinear around linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Report
from satchel.graphs.ir.sweep import sweep
from satchel.graphs.ir.two_parts import in_two_parts
from satchel.graphs.ir.values import MICROSOFT, Builder, rank, replace
from satchel.graphs.quant.quantized import INT8_PRODUCTS, QuantizedWeight, float_scales, quantized_products
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.layouts import GROUP_SIZE, INT8_MAX, SMALLEST_RANGE


def insert_qdq(weights: Mapping[str, QuantizedWeight], activations: Mapping[str, str]) -> GraphPass:
    """A pass that quantizes linear layers.

    Args:
        weights: What is stored for a float weight, by the weight's name.
        activations: By the same names, how the linear layer takes its input: "float", "twice", "token" or "tensor", or
            "int8" or "groups".

    before: x -> MatMul(W) -> y
    after:  "float":  Wq -> DequantizeLinear -> W';  x -> MatMul(W') -> y
            "twice":  as "float", with x in two parts (`in_two_parts`), for a kernel that rounds them to int8
            "token":  s = Max(ReduceMax(x), -ReduceMin(x), tiny) for each token;  x -> Div(s) -> QuantizeLinear(1/127)
                      -> DequantizeLinear -> MatMul(DequantizeLinear(Wq)) -> Mul(s) -> y
            "int8":   as "token", over int8 per-channel weights that the device makes from Wq
            "tensor": x -> DynamicQuantizeLinear -> MatMulInteger(Wq) -> Cast -> Mul(scales) -> y
            "groups": x -> MatMulNBits(Wg) -> y, which rounds x group by group, over Wg that the device makes from Wq
    refuses when: the weight is not among those given (silently).
    """

    def edit(model: ir.Model, report: Report) -> None:
        for node, quantized in quantized_products(model, weights):
            INSERT[activations[quantized.name]](model, node, quantized)
            report.count += 1
        if report.count:
            sweep(model.graph)

    return GraphPass("insert_qdq", edit, insert_qdq.__doc__ or "")


def _float(model: ir.Model, node: ir.Node, quantized: QuantizedWeight) -> None:
    node.replace_input_with(1, _dequantized(Builder(model, node), quantized, str(node.name)))


def _twice(model: ir.Model, node: ir.Node, quantized: QuantizedWeight) -> None:
    builder, name, x, result = Builder(model, node), str(node.name), node.inputs[0], node.outputs[0]
    block, inputs, axes = quantized.grid.scheme.block, quantized.codes.shape[1], rank(x)
    if x is None or block is None or axes is None or axes < 2:
        _float(model, node, quantized)
        return
    matrix = _dequantized(builder, quantized, name)

    def multiply(rows: ir.Value, called: str) -> ir.Value:
        return builder.value("MatMul", [rows, matrix], called)

    replace(result, in_two_parts(builder, name, x, (axes, inputs, block), multiply, result))


def _token(model: ir.Model, node: ir.Node, quantized: QuantizedWeight) -> None:
    builder = Builder(model, node)
    _multiply_tokens(builder, node, _dequantized(builder, quantized, str(node.name), fused=True))


def _int8(model: ir.Model, node: ir.Node, quantized: QuantizedWeight) -> None:
    builder = Builder(model, node)
    codes, scales = (builder.shared(lazy) for lazy in quantized.derived(Layout.INT8))
    matrix = builder.value("DequantizeLinear", [codes, scales], f"{node.name}.matrix", axis=1)
    matrix.type, matrix.shape = ir.TensorType(ir.DataType.FLOAT), codes.shape
    _multiply_tokens(builder, node, matrix)


def _multiply_tokens(builder: Builder, node: ir.Node, matrix: ir.Value) -> None:
    """Replace a linear layer by one of `matrix` with the input's rows in int8, each with its own scale."""
    name, x = str(node.name), node.inputs[0]
    axis = builder.constant(np.asarray([-1], np.int64), "axis.last")
    tiny = builder.constant(np.asarray(SMALLEST_RANGE), "smallest")
    step = builder.constant(np.asarray(1 / INT8_MAX, np.float32), "int8_step")
    zero = builder.constant(np.asarray(128, np.uint8), "uint8_zero")
    low = builder.value("Neg", [builder.value("ReduceMin", [x, axis], f"{name}.min", keepdims=1)], f"{name}.neg_min")
    high = builder.value("ReduceMax", [x, axis], f"{name}.max", keepdims=1)
    scale = builder.value("Max", [low, high, tiny], f"{name}.row_scale")
    even = builder.value("Div", [x, scale], f"{name}.row_scaled", x)
    codes = builder.value("QuantizeLinear", [even, step, zero], f"{name}.quantized")
    rounded = builder.value("DequantizeLinear", [codes, step, zero], f"{name}.dequantized", x)
    result = node.outputs[0]
    product = builder.value("MatMul", [rounded, matrix], f"{name}.product", result)
    replace(result, builder.value("Mul", [product, scale], f"{name}.rescaled", result))


def _tensor(model: ir.Model, node: ir.Node, quantized: QuantizedWeight) -> None:
    builder, name, result = Builder(model, node), str(node.name), node.outputs[0]
    codes, scales = (builder.shared(lazy) for lazy in quantized.columns()[:2])
    dynamic = builder.node("DynamicQuantizeLinear", [node.inputs[0]], f"{name}.quantized", outputs=3)
    quantized_x, x_scale, x_zero = dynamic.outputs
    whole = builder.value("MatMulInteger", [quantized_x, codes, x_zero], f"{name}.integer")
    product = builder.value("Cast", [whole], f"{name}.float", result, to=ir.DataType.FLOAT)
    scale = builder.value("Mul", [x_scale, scales], f"{name}.scale")
    replace(result, builder.value("Mul", [product, scale], f"{name}.rescaled", result))


def _groups(model: ir.Model, node: ir.Node, quantized: QuantizedWeight) -> None:
    builder, result = Builder(model, node), node.outputs[0]
    lazy, lazy_scales = quantized.derived(Layout.GROUPS)
    codes, scales = builder.shared(lazy), builder.shared(lazy_scales)
    outputs, inputs = quantized.codes.shape
    product = builder.value(
        "MatMulNBits", [node.inputs[0], codes, scales], f"{node.name}.by_blocks", result, MICROSOFT,
        bits=8, block_size=GROUP_SIZE, K=inputs, N=outputs, accuracy_level=INT8_PRODUCTS,
    )  # fmt: skip
    replace(result, product)


def _dequantized(builder: Builder, quantized: QuantizedWeight, name: str, fused: bool = False) -> ir.Value:
    """The weight in float for the linear layer `name`: layers that share a weight have one such node each.

    With `fused`, a per-channel weight is multiplied by quantized activations, in an operator that takes int8 as it is.
    """
    lazy_codes, lazy_scales, lazy_points = quantized.columns()
    codes, scales = builder.shared(lazy_codes), float_scales(builder, lazy_scales, f"{name}.float_scales")
    zero_points = None if lazy_points is None else builder.shared(lazy_points)
    block = quantized.grid.scheme.block
    where: dict[str, Any] = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
    if zero_points is None and codes.dtype == ir.DataType.INT8 and not (fused and block is None):
        zero_points = _zeros(builder, scales, name)
    inputs = [v for v in (codes, scales, zero_points) if v is not None]
    value = builder.value("DequantizeLinear", inputs, f"{name}.matrix", **where)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    value.shape = codes.shape
    return value


def _zeros(builder: Builder, scales: ir.Value, name: str) -> ir.Value:
    """Zero points of 0 in the shape of the scales, which are computed when a session loads the graph.

    On x86-64 without VNNI, ONNX Runtime turns int8 weights into uint8 with zero points of 128, for exact products.
    Where none are given it makes a scalar, which DequantizeLinear refuses; and each weight needs its own.
    """
    zeros = builder.value("Sub", [scales, scales], f"{name}.float_zeros", scales)
    return builder.value("Cast", [zeros], f"{name}.zeros", to=ir.DataType.INT8)


INSERT = {
    "float": _float,
    "twice": _twice,
    "token": _token,
    "tensor": _tensor,
    Layout.INT8.value: _int8,
    Layout.GROUPS.value: _groups,
}
