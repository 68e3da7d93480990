"""Finds linear layers: a MatMul by a constant weight, with or without a bias."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from satchel.graphs.ir.values import last_dim, only_user, producer, rank, weight
from satchel.graphs.ir.weights import LazyWeight


@dataclasses.dataclass(frozen=True)
class Product:
    """x @ matrix (+ bias), with constant matrix [in, out] and bias [out]; `value` is the result."""

    x: ir.Value
    matrix: LazyWeight
    bias: LazyWeight | None
    value: ir.Value

    @property
    def width(self) -> int:
        return self.matrix.dims[1]


def product(value: ir.Value | None) -> Product | None:
    """The linear layer with constant weights that makes `value`, or None."""
    if value is None:
        return None
    add = producer(value, "Add")
    if add is not None:
        for index, operand in enumerate(add.inputs):
            inner, bias = producer(operand, "MatMul"), add.inputs[1 - index]
            if (
                inner is not None
                and weight(bias) is not None
                and rank(bias) == 1
                and only_user(inner.outputs[0]) is add
            ):
                found = product(inner.outputs[0])
                whole = found is not None and last_dim(bias) == found.width
                return dataclasses.replace(found, bias=weight(bias), value=value) if found and whole else None
        return None
    node = producer(value, "MatMul")
    matrix = weight(node.inputs[1]) if node is not None else None
    if node is None or matrix is None or len(matrix.dims) != 2 or node.inputs[0] is None:
        return None
    return Product(node.inputs[0], matrix, None, value)
