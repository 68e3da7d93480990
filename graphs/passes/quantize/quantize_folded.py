"""Weights as quantized values that a session makes into float16 when it loads the graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, replace, weight
from satchel.graphs.ir.weights import LazyWeight, from_array
from satchel.graphs.quant.quantized import QuantizedWeight, code_type
from satchel.graphs.quant.recipe import Rule


def quantize_folded(weights: Mapping[str, QuantizedWeight], rules: Mapping[str, Rule]) -> GraphPass:
    """Store weights as int8 quantized values with a scale for each output, in front of all their readers.

    A session that folds constants, quantized ones too, has the weight in float16 before its provider sees the graph:
    the file is half the size, and the device computes as with weights in float16.

    before: W float16 -> readers
    after:  codes, scales float32 -> DequantizeLinear -> Cast(float16) -> readers
    refuses when: the rule has blocks, 4 bits or activations in int8: operator set 17 has none of these.

    Args:
        weights: What is stored for a float weight, by the weight's name; in the graph it may be called NAME.fp16.
        rules: The rule of each, by the same names.
    """

    def edit(model: ir.Model, report: Report) -> None:
        for value in list(model.graph.initializers.values()):
            lazy = weight(value)
            name = str(value.name).removesuffix(".fp16")
            quantized = weights.get(name)
            if lazy is None or quantized is None:
                continue
            reader = next(iter(value.uses())).node
            with report.refusing(reader):
                _check(quantized, rules[name], lazy)
                _store(model, value, quantized)
                report.count += 1

    return graph_pass(edit, quantize_folded)


def _check(quantized: QuantizedWeight, rule: Rule, lazy: LazyWeight) -> None:
    scheme = quantized.grid.scheme
    if scheme.bits != 8:
        raise Refused(f"operator set 17 has no weights in {scheme.bits} bits")
    if scheme.block is not None:
        raise Refused('operator set 17 has no scales for blocks of inputs: give blocks = ["channel"]')
    if (rule.prefill, rule.decode) != ("float", "float"):
        raise Refused("activations in int8 have no operators that a device for this target runs")
    if lazy.dims not in (quantized.codes.shape, quantized.codes.shape[::-1]):
        raise Refused(f"{lazy.name} is quantized in another shape")


def _store(model: ir.Model, value: ir.Value, quantized: QuantizedWeight) -> None:
    readers = {id(use.node) for use in value.uses()}
    builder = Builder(model, next(node for node in model.graph if id(node) in readers))
    by_rows = any(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses())
    parts = _rows(quantized) if by_rows else quantized.columns()
    inputs = [builder.shared(lazy) for lazy in parts if lazy is not None]
    name = str(value.name)
    floats = builder.value("DequantizeLinear", inputs, f"{name}.float32", axis=0 if by_rows else 1)
    floats.shape, floats.type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    if value.dtype == ir.DataType.FLOAT:
        replace(value, floats)
        return
    half = builder.value("Cast", [floats], f"{name}.float16", value, to=value.dtype)
    replace(value, half)


def _rows(quantized: QuantizedWeight) -> tuple[LazyWeight, LazyWeight, LazyWeight | None]:
    """Quantized values [outputs, inputs], scales and zero points [outputs], for DequantizeLinear along axis 0."""
    grid = quantized.grid
    dtype = code_type(grid)

    codes = LazyWeight(
        f"{quantized.name}.codes_by_row", quantized.codes.shape, dtype,
        lambda a, b: quantized.codes[a:b].astype(dtype.numpy()),
    )  # fmt: skip
    scales = from_array(f"{quantized.name}.scales", grid.scales[:, 0], computed=True)
    if grid.zero_points is None:
        return codes, scales, None
    return codes, scales, from_array(f"{quantized.name}.zero_points", grid.zero_points[:, 0].astype(dtype.numpy()))
