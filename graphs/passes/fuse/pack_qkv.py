"""One linear layer for the queries, keys and values of a layer."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.analysis.matmul import Product, product
from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, last_dim, nodes, rank, span
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
            with report.refusing(attention):
                join(model, found, "qkv_proj")
                report.count += 1
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


def _feed_packed(attention: ir.Node) -> bool:
    """Hand over the packed tensor where query, key and value are, in this order, all the channels of one tensor."""
    spans = [s for value in attention.inputs[:3] if rank(value) == 3 and (s := span(value)) is not None]
    if len(spans) < 3 or any(source is not spans[0][0] or part.step != 1 for source, part in spans):
        return False
    ends = [0, *(part.stop for _, part in spans)]
    if [part.start for _, part in spans] != ends[:3] or ends[3] != last_dim(spans[0][0]):
        return False
    for index, value in enumerate((spans[0][0], None, None)):
        attention.replace_input_with(index, value)
    return True
