"""A tied head for one row reads the embedding table as it lies."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, dims, last_dim, nodes, replace, weight


@graph_pass
def stream_tied_head(model: ir.Model, report: Report) -> None:
    """Put the table of a tied head first in its matmul, where ONNX Runtime makes no packed copy of it.

    before: x [batch, 1, hidden] -> FusedMatMul(W, transB) -> logits [batch, 1, vocabulary]
    after:  x -> Reshape [-1, hidden] -> Transpose -> MatMul(W, .) [vocabulary, batch] -> Transpose -> Unsqueeze
            -> logits
    The look-up needs the table as it is, so a packed copy for the head would be a second one.
    refuses when: the linear layer is of more than one row per sequence, as in the score graph (silently), or has other
    attributes than transB.
    """
    for node in nodes(model, "FusedMatMul", MICROSOFT):
        x, table = node.inputs
        shape = dims(x)
        hidden = last_dim(x)
        if shape is None or len(shape) != 3 or shape[1] != 1 or hidden is None or weight(table) is None:
            continue
        if set(node.attributes) != {"transB"}:
            report.refuse(node, "the linear layer scales or transposes in another way than by transB")
            continue
        builder, name = Builder(model, node), str(node.name)
        rows = builder.value("Reshape", [x, builder.shape(-1, hidden)], f"{name}.rows")
        columns = builder.value("Transpose", [rows], f"{name}.columns", perm=[1, 0])  # [hidden, batch]
        product = builder.value("MatMul", [table, columns], f"{name}.streamed")  # [vocabulary, batch]
        by_row = builder.value("Transpose", [product], f"{name}.by_row", perm=[1, 0])
        axis = builder.constant(np.asarray([1], np.int64), "axis.1")
        replace(node.outputs[0], builder.value("Unsqueeze", [by_row, axis], f"{name}.logits", node.outputs[0]))
        report.count += 1
