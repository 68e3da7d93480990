"""Linear layers with quantized weights, for a device that multiplies float16 by them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, nodes, replace, weight
from satchel.graphs.ir.weights import reshaped
from satchel.graphs.quant.quantized import QuantizedWeight, quantized_products
from satchel.graphs.quant.recipe import Rule


def quantize_linear(weights: Mapping[str, QuantizedWeight], rules: Mapping[str, Rule]) -> GraphPass:
    """Multiply with quantized weights in groups, activations in float.

    before: x -> MatMul(W) -> y
    after:  x -> MatMulNBits(codes, scales) -> y
    refuses when: the quantized values have a scale for each output and no groups; the rule wants activations in 8
    bits, which the device has no kernel for; or a mixture of experts is quantized: its operator reads quantized values
    in an order of the device's own, which nothing but the device's ONNX Runtime makes. Weights that are not among
    those given are left alone (silently).

    Args:
        weights: Quantized weights by the name of the float initializer.
        rules: The rule of each, by the same names.
    """

    def edit(model: ir.Model, report: Report) -> None:
        for node, quantized in quantized_products(model, weights):
            with report.refusing(node):
                _check(quantized, rules[quantized.name])
                _rewrite(model, node, quantized)
                report.count += 1
        for node in nodes(model, "MoE", MICROSOFT):
            if any((lazy := weight(value)) is not None and lazy.name in weights for value in node.inputs):
                report.refuse(node, "quantized experts would have to be in the device's own layout")

    return graph_pass(edit, quantize_linear)


def _check(quantized: QuantizedWeight, rule: Rule) -> None:
    if rule.prefill != "float" or rule.decode != "float":
        raise Refused(f"{quantized.name} is to be multiplied by activations in 8 bits, which needs float ones here")
    if quantized.grid.scheme.block is None:
        raise Refused(f"{quantized.name} is quantized per channel: its operator needs groups of inputs")


def _rewrite(model: ir.Model, node: ir.Node, quantized: QuantizedWeight) -> None:
    builder, scheme, (outputs, inputs) = Builder(model, node), quantized.grid.scheme, quantized.codes.shape
    codes, scales, points = quantized.rows()
    blocks = scales.dims[1]
    by_block = builder.shared(reshaped(codes, (outputs, blocks, codes.dims[1] // blocks), f"{codes.name}.blocks"))
    grid = [builder.shared(scales), None if points is None else builder.shared(points)]
    product = builder.value(
        "MatMulNBits", [node.inputs[0], by_block, *grid], f"{node.name}.codes", node.outputs[0], MICROSOFT,
        bits=scheme.bits, block_size=scheme.block, K=inputs, N=outputs,
    )  # fmt: skip
    replace(node.outputs[0], product)
