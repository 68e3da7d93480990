"""The decode graph takes one token at a time."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.inputs import graph_input
from satchel.graphs.ir.values import dims
from satchel.runtime.bundle.contract import INPUT_IDS


@graph_pass
def single_token(model: ir.Model, report: Report) -> None:
    """Fix the sequence dimension to 1, everywhere that it is named.

    before: input_ids [batch, sequence]      x [batch, sequence, hidden]
    after:  input_ids [batch, 1]             x [batch, 1, hidden]
    refuses when: the sequence is fixed already, or has no name (silently).
    """
    _, name = dims(graph_input(model, INPUT_IDS)) or (None, None)
    if not isinstance(name, str):
        return
    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        shape = dims(value)
        if shape is not None and name in shape:
            value.shape = ir.Shape([1 if d == name else d for d in shape])
    report.count += 1
