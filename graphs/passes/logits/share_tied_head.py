"""A head that is the embedding table reads the table's own bytes."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, nodes, replace, weight


@graph_pass
def share_tied_head(model: ir.Model, report: Report) -> None:
    """Multiply by the transposed table in place of a transposed copy of it.

    before: ids -> Gather(W) ...  x -> MatMul(W.T) -> logits
    after:  ids -> Gather(W) ...  x -> FusedMatMul(W, transB) -> logits
    refuses when: the table is not read by a Gather, so that a transposed copy costs nothing (silently).
    """
    tables = {w.name: node.inputs[0] for node in nodes(model, "Gather") if (w := weight(node.inputs[0])) is not None}
    for node in list(nodes(model, "MatMul")):
        matrix = weight(node.inputs[1])
        table = (
            tables.get(matrix.name.removesuffix(".T")) if matrix is not None and matrix.name.endswith(".T") else None
        )
        if table is None:
            continue
        shared = Builder(model, node).value(
            "FusedMatMul", [node.inputs[0], table], f"{node.name}.tied", node.outputs[0], MICROSOFT, transB=1
        )
        replace(node.outputs[0], shared)
        report.count += 1
