"""The decode graph takes one token at a time."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs import signature
from satchel.graphs.contract import Report, graph_pass


@graph_pass
def single_token(model: ir.Model, report: Report) -> None:
    """Fix the sequence dimension to 1, everywhere that it is named.

    before: input_ids [batch, sequence]      x [batch, sequence, hidden]
    after:  input_ids [batch, 1]             x [batch, 1, hidden]
    refuses when: the sequence is fixed already (silently).
    """
    ids = signature.graph_input(model, signature.INPUT_IDS)
    name = ids.shape[1] if ids.shape is not None else None
    if isinstance(name, int) or name is None:
        return
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is not None and name in list(value.shape):
            value.shape = ir.Shape([1 if d == name else d for d in value.shape])
    report.count += 1
