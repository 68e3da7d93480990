"""Linear layers with quantized weights become satchel's own operator."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from satchel.graphs.analysis.linear import native_operator
from satchel.graphs.ir.contract import GraphPass, Report, graph_pass
from satchel.graphs.ir.values import Builder, last_dim, replace
from satchel.graphs.quant.quantized import QuantizedWeight, quantized_products
from satchel.runtime.bundle.contract import Layout


def insert_linear(weights: Mapping[str, QuantizedWeight]) -> GraphPass:
    """Multiply with quantized weights in panels, the input rounded to int8: each row as a whole, or group by group like
    the weights.

    The panels are made on the device (QuantizedWeight.derived).

    before: x -> MatMul(W) -> y
    after:  x -> satchel::Linear(panels, scales, zero points) -> y
    refuses when: the quantized values have a form that the operator does not take (QuantizedWeight.fits_panels), or x
    is not as wide as they are. Weights that are not among those given are left alone (silently).

    Args:
        weights: What is stored for a float weight, by the weight's name.
    """

    def edit(model: ir.Model, report: Report) -> None:
        for node, quantized in quantized_products(model, weights):
            if not quantized.fits_panels():
                report.refuse(node, "the operator does not support how its weight is quantized")
            elif last_dim(node.inputs[0]) != quantized.codes.shape[1]:
                report.refuse(node, "its input is not known to be as wide as its weight")
            else:
                _rewrite(model, node, quantized)
                report.count += 1

    return graph_pass(edit, insert_linear)


def _rewrite(model: ir.Model, node: ir.Node, quantized: QuantizedWeight) -> None:
    builder, (outputs, inputs), scheme = Builder(model, node), quantized.codes.shape, quantized.grid.scheme
    panels = [builder.shared(lazy) for lazy in quantized.derived(Layout.PANELS)]
    sizes = {"inputs": inputs, "outputs": outputs, "bits": scheme.bits, "block": scheme.block or 0}
    product = native_operator(
        builder, "Linear", [node.inputs[0], *panels], f"{node.name}.linear", node.outputs[0], sizes
    )
    replace(node.outputs[0], product)
