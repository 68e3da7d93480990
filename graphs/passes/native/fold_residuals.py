"""Residual sums go into satchel's own linear operator."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.analysis.linear import RESIDUAL, fusable, set_input
from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import dims, nodes, replace, weight


@graph_pass
def fold_residuals(model: ir.Model, report: Report) -> None:
    """Let a linear layer add its result to the residual stream.

    before: x -> satchel::Linear -> Add(residual) -> y
    after:  x -> satchel::Linear(residual) -> y
    refuses when: the two summands may differ in shape. A linear layer that something else reads, or that adds a
    residual or has a gate already, is left alone (silently), and so is a weight.
    """
    for add in nodes(model, "Add"):
        for value, residual in (reversed(add.inputs), add.inputs):
            product = fusable(value)
            if product is None or residual is None or residual is value or weight(residual) is not None:
                continue
            shape = dims(residual)
            if shape is None or None in shape or shape != dims(product.outputs[0]):
                report.refuse(add, "the summands may differ in shape")
                continue
            # It goes to where the sum was made: the residual may be made after the linear layer.
            model.graph.remove(product)
            model.graph.insert_before(add, product)
            set_input(product, RESIDUAL, residual)
            replace(add.outputs[0], product.outputs[0])
            report.count += 1
            break
