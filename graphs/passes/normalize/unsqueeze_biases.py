"""Biases keep a form that no optimizer joins with the linear layer in front of them."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, last_dim, nodes, producer, rank, weight
from satchel.graphs.ir.weights import reshaped


@graph_pass
def unsqueeze_biases(model: ir.Model, report: Report) -> None:
    """Give the bias of each linear layer as many dimensions as its matmul has, over the same bytes.

    ONNX Runtime joins a matmul and a bias of one dimension to Gemm, for which released parsers of Ascend's
    compiler show no entry.

    before: x [1, tokens, n] -> MatMul(W) -> Add(bias [m])
    after:  x -> MatMul(W) -> Add(bias [1, 1, m])
    refuses when: the matmul's result does not have three dimensions, or what is added is not a vector over its last one
    (silently).
    """
    for add in nodes(model, "Add"):
        for index, value in enumerate(add.inputs):
            product, lazy = producer(add.inputs[1 - index], "MatMul"), weight(value)
            if product is None or lazy is None or len(lazy.dims) != 1 or rank(product.outputs[0]) != 3:
                continue
            if lazy.dims[0] != last_dim(product.outputs[0]):
                continue
            wide = reshaped(lazy, (1, 1, lazy.dims[0]), f"{lazy.name}.wide")
            add.replace_input_with(index, Builder(model).shared(wide))
            report.count += 1
