"""Inputs of linear layers in the order in which their groups are neighbors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.graphs.analysis.channels import marked
from satchel.graphs.ir.contract import GraphPass, Report, graph_pass
from satchel.graphs.ir.low_rank import carry_inputs
from satchel.graphs.ir.values import Builder, nodes, replace, weight
from satchel.graphs.ir.weights import LazyWeight, marked_like
from satchel.graphs.quant.assign import layer_name

MARK = "ordered"


def order_inputs(orders: Mapping[str, NDArray[np.int64]]) -> GraphPass:
    """Reorder the inputs of linear layers whose stored groups are scattered (GPTQ with act-order).

    Layers over the same input in the same order share one Gather, so that they can be joined.

    before: x -> MatMul(W) -> y
    after:  x -> Gather(order) -> MatMul(W[order]) -> y
    refuses when: the layer is not among those given, or is ordered already (silently).

    Args:
        orders: By the name of the checkpoint's layer: the order, [inputs] int64.
    """

    def edit(model: ir.Model, report: Report) -> None:
        gathered: dict[tuple[ir.Value | None, bytes], ir.Value] = {}
        for node in nodes(model, "MatMul"):
            matrix, x = weight(node.inputs[1]), node.inputs[0]
            order = None if matrix is None else orders.get(layer_name(matrix))
            if order is None or matrix is None or marked(node.inputs[1], MARK) or matrix.dims[0] != len(order):
                continue
            builder, key = Builder(model, node), (x, order.tobytes())
            if key not in gathered:
                index = builder.constant(order, f"{layer_name(matrix)}.order")
                gathered[key] = builder.value("Gather", [x, index], f"{node.name}.ordered", x, axis=-1)
            node.replace_input_with(0, gathered[key])
            if node.inputs[1] is not None:
                replace(node.inputs[1], builder.initializer(_ordered(matrix, order)))
            report.count += 1

    return graph_pass(edit, order_inputs)


def _ordered(matrix: LazyWeight, order: NDArray[np.int64]) -> LazyWeight:
    """The rows of a weight in another order; any of them reads all."""
    new = LazyWeight(
        f"{matrix.name}.{MARK}", matrix.dims, matrix.dtype,
        rows=lambda a, b: matrix.numpy()[order[a:b]], columns=lambda a, b: matrix.columns(a, b)[order],
    )  # fmt: skip
    return marked_like(carry_inputs(new, matrix, lambda first: _ordered(first, order)), matrix)
