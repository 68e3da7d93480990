"""Hadamard matrices go into satchel's own linear operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.linear import X, linears, width
from satchel.graphs.analysis.rotations import hadamard
from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import constant, dims, producer
from satchel.graphs.ir.weights import LazyWeight


@graph_pass
def fold_hadamards(model: ir.Model, report: Report) -> None:
    """Let a linear layer apply a Hadamard transform to blocks of its input, by additions in place of a dense matmul.

    before: x -> Reshape [batch, new, k / n, n] -> MatMul(H) -> Reshape [batch, new, k] -> satchel::Linear -> y
    after:  x -> satchel::Linear(hadamard = n) -> y
    refuses when: H is not exactly the Hadamard matrix of Sylvester's construction divided by sqrt(n), the shapes are
    others, or the linear layer has a norm or such a matrix already, which come in another order.
    """
    for node in linears(model):
        join = producer(node.inputs[X], "Reshape")
        mix = producer(join.inputs[0], "MatMul") if join is not None else None
        split = producer(mix.inputs[0], "Reshape") if mix is not None else None
        if join is None or mix is None or split is None or split.inputs[0] is None:
            continue
        with report.refusing(node):
            size = _size(mix.inputs[1])
            _check(node, split, join, size)
            node.replace_input_with(X, split.inputs[0])
            node.attributes.add(ir.AttrInt64("hadamard", size))
            report.count += 1


def _size(value: ir.Value | None) -> int:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    if tensor is None or isinstance(tensor, LazyWeight) or len(tensor.shape) != 2:
        raise Refused("its input is multiplied by a matrix that is not a constant")
    matrix = tensor.numpy()
    size = len(matrix)
    power = size > 1 and not size & (size - 1)
    if not power or matrix.dtype != np.float32 or not np.array_equal(matrix, hadamard(size)):
        raise Refused("its input is multiplied by another matrix than Sylvester's")
    return size


def _check(node: ir.Node, split: ir.Node, join: ir.Node, size: int) -> None:
    inputs, _ = width(node)
    shapes = [None if len(n.inputs) < 2 else constant(n.inputs[1]) for n in (split, join)]
    wanted = ([0, 0, inputs // size, size], [0, 0, inputs])
    same = all(found is not None and list(found) == shape for found, shape in zip(shapes, wanted, strict=True))
    before = dims(split.inputs[0])
    if not same or inputs % size or before is None or len(before) != 3 or before[-1] != inputs:
        raise Refused("its input is not transformed in blocks of neighboring channels")
    if any(n.attributes.get_int("allowzero", 0) for n in (split, join)):
        raise Refused("its input is reshaped to a size of zero")
    if node.attributes.get("hadamard") or node.attributes.get("epsilon"):
        raise Refused("the linear layer has a norm or a matrix already")
