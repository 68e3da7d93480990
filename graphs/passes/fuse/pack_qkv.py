"""One linear layer for the queries, keys and values of a layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.matmul import Product, product
from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, attributes, constant, last_dim, nodes
from satchel.graphs.quant.joining import join

PASS_THROUGH = {"Reshape", "Transpose", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Mul"}
"""What may stand between a linear layer and the attention: moves, and norms and rotations of each head."""


@graph_pass
def pack_qkv(model: ir.Model, report: Report) -> None:
    """Join the three linear layers in front of a GroupQueryAttention.

    Queries, keys and values are handed over in one tensor where nothing stands between.

    before: x -> MatMul(q), x -> MatMul(k), x -> MatMul(v) -> GroupQueryAttention(q, k, v)
    after:  x -> MatMul(q|k|v) -> GroupQueryAttention(qkv)                      (with norms between: -> Split -> norms
            -> GroupQueryAttention)
    refuses when: the linear layers read different inputs, or only some have a bias.
    """
    for attention in nodes(model, "GroupQueryAttention", MICROSOFT):
        products = [_product_before(value) for value in attention.inputs[:3]]
        found = [p for p in products if p is not None]
        if len(found) == 3 and len({id(p.value) for p in found}) == 3:
            try:
                join(model, found, "qkv_proj", _first_maker(model, found))
                report.count += 1
            except Refused as refusal:
                report.refuse(attention, str(refusal))
        if _feed_packed(attention):
            report.count += 1


def _product_before(value: ir.Value | None) -> Product | None:
    while value is not None:
        found = product(value)
        node = value.producer()
        if found is not None or node is None or node.op_type not in PASS_THROUGH:
            return found
        value = next((v for v in node.inputs if v is not None and v.producer() is not None), None)
    return None


def _first_maker(model: ir.Model, products: list[Product]) -> ir.Node:
    makers = {id(p.value.producer()) for p in products}
    return next(n for n in model.graph if id(n) in makers)


def _feed_packed(attention: ir.Node) -> bool:
    """Hand over the packed tensor where query, key and value are, in this order, all the channels of one tensor."""
    if attention.inputs[1] is None:
        return False
    spans = [_span(value) for value in attention.inputs[:3]]
    if any(s is None for s in spans):
        return False
    (source, start, first), (source_k, first_k, second), (source_v, second_v, end) = (s for s in spans if s is not None)
    if (
        not (source is source_k is source_v)
        or (start, first, second) != (0, first_k, second_v)
        or end != last_dim(source)
    ):
        return False
    attention.replace_input_with(0, source)
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    return True


def _span(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(source, first, end) where the value is these channels of the last axis of a source [batch, new, channels]."""
    cut = value.producer() if value is not None else None
    if (
        value is None
        or cut is None
        or cut.domain != ""
        or cut.inputs[0] is None
        or value.shape is None
        or len(value.shape) != 3
    ):
        return None
    if cut.op_type == "Split":
        sizes = constant(cut.inputs[1]) if len(cut.inputs) > 1 else None
        try:
            axis = attributes(cut, axis=0, num_outputs=None)["axis"]
        except Refused:
            return None
        if axis not in (-1, 2) or sizes is None:
            return None
        start = int(sizes[: value.index()].sum())
        return cut.inputs[0], start, start + int(sizes[value.index() or 0])
    if cut.op_type == "Slice":
        parts = [constant(v) for v in cut.inputs[1:4]]
        step = constant(cut.inputs[4]) if len(cut.inputs) > 4 else np.ones(1, np.int64)
        width = last_dim(cut.inputs[0])
        if any(p is None or p.size != 1 for p in parts) or step is None or (step != 1).any() or width is None:
            return None
        low, high, axis = (int(p.reshape(())) for p in parts if p is not None)
        return (cut.inputs[0], *slice(low, high).indices(width)[:2]) if axis in (-1, 2) else None
    return None
