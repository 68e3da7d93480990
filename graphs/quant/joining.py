"""Joins linear layers over the same input into one: what pack_qkv and pack_gate_up share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.matmul import Product
from satchel.graphs.ir.contract import Refused
from satchel.graphs.ir.values import Builder, replace
from satchel.graphs.ir.weights import concatenated
from satchel.graphs.quant.assign import LAYERS, RULE, layers_of


def join(model: ir.Model, products: Sequence[Product], name: str) -> None:
    """Replace `products` by one linear layer and a Split of its result, where the first of them stands.

    Raises:
        Refused: The linear layers have different inputs, only some have a bias, or a recipe stores them differently.
    """
    first = products[0]
    if any(p.matrix.meta.get(RULE) != first.matrix.meta.get(RULE) for p in products):
        raise Refused("the recipe has different rules for the linear layers")
    if any(p.x is not first.x for p in products):
        raise Refused("the linear layers do not read the same input")
    biases = [p.bias for p in products if p.bias is not None]
    if biases and len(biases) != len(products):
        raise Refused("some of the linear layers have a bias and some have none")
    path = ".".join([*_common_parts([p.matrix.name for p in products]), name])
    if f"{path}.weight.T" in model.graph.initializers:
        raise Refused(f"{path}.weight.T exists already: the layers share their weights")
    makers = {p.value.producer() for p in products}
    builder = Builder(model, next(node for node in model.graph if node in makers))
    joined = concatenated([p.matrix for p in products], 1, f"{path}.weight.T")
    joined.meta[LAYERS] = tuple(layer for p in products for layer in layers_of(p.matrix))
    matrix = builder.initializer(joined)
    packed = builder.value("MatMul", [first.x, matrix], path)
    widths = [p.width for p in products]
    shape = ir.Shape([*list(first.value.shape or ())[:-1], sum(widths)]) if first.value.shape is not None else None
    packed.shape, packed.type = shape, first.value.type
    if biases:
        bias = builder.initializer(concatenated(biases, 0, f"{path}.bias"))
        packed = builder.value("Add", [packed, bias], f"{path}.biased", packed)
    sizes = builder.constant(np.asarray(widths, np.int64), "split." + "_".join(map(str, widths)))
    split = builder.node("Split", [packed, sizes], f"{path}.split", outputs=len(products), axis=-1)
    for old, new in zip(products, split.outputs, strict=True):
        new.shape, new.type = old.value.shape, old.value.type
        replace(old.value, new)


def _common_parts(names: Sequence[str]) -> list[str]:
    """The parts between dots that all names begin with."""
    parts = []
    for same in zip(*(name.split(".") for name in names), strict=False):
        if len(set(same)) > 1:
            break
        parts.append(same[0])
    return parts
