"""Matrices that no checkpoint holds are stored in half precision."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import nodes, weight
from satchel.graphs.passes.float16.store_float16 import store_half


@graph_pass
def store_linear_float16(model: ir.Model, report: Report) -> None:
    """Store the computed matrix of a linear layer as float16, such as the rotation in front of a tied head.

    Eight bits would not do: the matrix is nearly diagonal, so that a block with an entry of the diagonal has steps as
    large as its other entries.

    before: x -> MatMul(M float32)
    after:  x -> MatMul(M float16 -> Cast)
    refuses when: the matrix comes from the checkpoint, or is stored as float16 already (silently).
    """
    for node in nodes(model, "MatMul"):
        value = node.inputs[1]
        lazy = weight(value)
        if value is None or lazy is None or not lazy.computed or lazy.dtype != ir.DataType.FLOAT:
            continue
        store_half(model, value, lazy)
        report.count += 1
