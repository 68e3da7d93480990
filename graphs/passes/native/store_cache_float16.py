"""The KV cache of satchel's own attention in half precision."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, nodes

PAST, PRESENT = slice(3, 5), slice(1, 3)
"""Inputs and outputs of satchel::Attention."""

CACHE_NAMES = "past_key_values."
"""What names of keys and values of the past begin with."""


@graph_pass
def store_cache_float16(model: ir.Model, report: Report) -> None:
    """Store keys and values as float16, in all layers or in none.

    Decode is bound by what it reads: of many sequences, or of long ones, that is the cache. The operator computes in
    float32 with what it reads.

    before: past.N float32 -> satchel::Attention -> y, present.N float32
    after:  past.N float16 -> satchel::Attention -> y, present.N float16
    refuses when: another operator reads or writes a cache.
    """
    found = list(nodes(model, "Attention", INTERNAL))
    pasts = {value for node in found for value in node.inputs[PAST] if value is not None and value.is_graph_input()}
    caches = [value for value in model.graph.inputs if str(value.name).startswith(CACHE_NAMES)]
    if not found or any(value.dtype != ir.DataType.FLOAT for value in caches):
        return
    for value in caches:
        readers = {node for node, _ in value.uses()}
        if value not in pasts or not readers <= set(found):
            report.refuse(next(iter(readers - set(found)), found[0]), f"it takes {value.name} in float32")
            return
    for node in found:
        for cache in (*node.inputs[PAST], *node.outputs[PRESENT]):
            if cache is not None:
                cache.type = ir.TensorType(ir.DataType.FLOAT16)
    report.count += len(found)
