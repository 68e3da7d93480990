"""Rows looked up with one index each are looked up with Gather."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, attributes, constant, nodes, producer, rank, replace


@graph_pass
def normalize_lookups(model: ir.Model, report: Report) -> None:
    """Write a GatherND with one index per row, as the tracer spells `table[index]`, as Gather.

    before: index [batch, sequence] -> Unsqueeze(-1) -> GatherND(table) -> [batch, sequence, ...]
    after:  index -> Gather(table, axis 0) -> [batch, sequence, ...]
    refuses when: an attribute is not known, or the look-up has batch dimensions of its own.
    """
    for node in nodes(model, "GatherND"):
        table, spread = node.inputs
        unsqueeze = producer(spread, "Unsqueeze")
        index = unsqueeze.inputs[0] if unsqueeze is not None else None
        axes = constant(unsqueeze.inputs[1]) if unsqueeze is not None else None
        if index is None or axes is None or axes.tolist() not in ([-1], [rank(index)]):
            continue
        with report.refusing(node):
            if attributes(node, batch_dims=0)["batch_dims"] != 0:
                raise Refused("the look-up has batch dimensions of its own")
            output = node.outputs[0]
            replace(output, Builder(model, node).value("Gather", [table, index], f"{node.name}.rows", output, axis=0))
            report.count += 1
