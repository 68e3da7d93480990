"""Linear layers are called after their weights."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import nodes, weight


@graph_pass
def name_projections(model: ir.Model, report: Report) -> None:
    """Name each linear layer after its weight, so that recipes, reports and profiles speak of layers.

    before: node_linear_3 = MatMul(x, model.layers.0.self_attn.o_proj.weight.T)
    after:  model.layers.0.self_attn.o_proj = MatMul(x, model.layers.0.self_attn.o_proj.weight.T)
    refuses when: another node has that name already (silently).
    """
    taken = {node.name for node in model.graph}
    for node in nodes(model, "MatMul"):
        lazy = weight(node.inputs[1])
        name = lazy.name.removesuffix(".T").removesuffix(".weight") if lazy is not None else ""
        if name and name not in taken:
            taken.add(name)
            node.name = name
            report.count += 1
