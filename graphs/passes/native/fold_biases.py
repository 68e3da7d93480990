"""Biases go into satchel's own linear operator."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.analysis.linear import BIAS, fusable, has_input, set_input, width
from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import dims, nodes, replace, weight


@graph_pass
def fold_biases(model: ir.Model, report: Report) -> None:
    """Let a linear layer add its own bias.

    before: x -> satchel::Linear -> Add(bias) -> y
    after:  x -> satchel::Linear(bias) -> y
    refuses when: what is added is a weight of another shape than [outputs]. A linear layer that something else reads,
    or that adds something already, is left alone (silently).
    """
    for add in nodes(model, "Add"):
        for value, bias in (add.inputs, reversed(add.inputs)):
            product = fusable(value)
            if product is None or bias is None or weight(bias) is None or has_input(product, BIAS):
                continue
            if dims(bias) != [width(product)[1]] or bias.dtype != ir.DataType.FLOAT:
                report.refuse(add, "what it adds is not one number for each output")
                continue
            set_input(product, BIAS, bias)
            replace(add.outputs[0], product.outputs[0])
            report.count += 1
            break
