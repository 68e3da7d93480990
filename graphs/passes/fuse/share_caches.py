"""Layers that attend to the keys and values of an earlier layer say so."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, nodes

OWNER = "owner"
"""The attribute: the layer whose cache an attention reads. It has none of its own then."""


@graph_pass
def share_caches(model: ir.Model, report: Report) -> None:
    """Mark each attention whose key and value are those of an earlier one, so that both get one cache.

    before: query, key, value -> satchel::Attention(layer 0), other query, key, value -> satchel::Attention(layer 2)
    after:  the same; the second has the attribute owner = 0
    refuses when: never. Layers that share only keys or only values have caches of their own (silently).
    """
    owners: dict[tuple[int, int], int] = {}
    for node in nodes(model, "Attention", INTERNAL):
        key = id(node.inputs[1]), id(node.inputs[2])
        layer = node.attributes.get_int("layer", 0)
        if owners.setdefault(key, layer) != layer and OWNER not in node.attributes:
            node.attributes[OWNER] = ir.AttrInt64(OWNER, owners[key])
            report.count += 1
