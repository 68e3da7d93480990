"""Of logits and hidden states, a graph has one."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Report, graph_pass
from satchel.graphs.ir.values import IDENTITY, producer, replace, weight
from satchel.runtime.bundle.contract import HIDDEN_STATES, LOGITS


def choose_output(name: str) -> GraphPass:
    """Keep the logits or the hidden states, and what makes them.

    before: x -> norm -> y -> MatMul(W) -> logits      y -> MatMul(identity) -> hidden_states
    after:  x -> norm -> y -> MatMul(W) -> logits                          or  x -> norm -> hidden_states
    The matrix in front of the hidden states stays where a rotation has changed it.
    refuses when: the graph has no hidden states (silently).
    """

    def edit(model: ir.Model, report: Report) -> None:
        outputs = model.graph.outputs
        for value in [v for v in outputs if v.name in (LOGITS, HIDDEN_STATES) and v.name != name]:
            outputs.remove(value)
            report.count += 1
        for value in [v for v in outputs if v.name == HIDDEN_STATES]:
            product = producer(value, "MatMul")
            states, matrix = product.inputs if product is not None else (None, None)
            lazy = weight(matrix)
            if states is not None and lazy is not None and lazy.name == IDENTITY:
                replace(value, states)
                report.count += 1

    return graph_pass(edit, choose_output)
