"""Inputs that nothing reads go away."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.runtime.bundle.contract import ATTENTION_MASK, POSITION_IDS


@graph_pass
def drop_inputs(model: ir.Model, report: Report) -> None:
    """Take out the inputs that nothing reads: some runtimes match inputs by their place among those that are read.

    before: input_ids, attention_mask (inputs); nothing reads attention_mask
    after:  input_ids (input)
    refuses when: attention_mask or position_ids is read still: a static graph takes positions as rows of tables and
    masks only.
    """
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)
            report.count += 1
        elif value.name in (ATTENTION_MASK, POSITION_IDS) and value.uses():
            reader = next(iter(value.uses())).node
            report.refuse(reader, f"{value.name} is used in another way than to mask attention and to look up tables")
