"""Attention by satchel's own kernel."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, attributes, nodes, replace

OTHERS, PAST, SCALES = slice(10, 12), slice(3, 5), slice(12, 14)
"""Inputs of GroupQueryAttention: those that the operator does not have, the past, and the scales of an int8 cache. The
operator has all others in the same order."""


@graph_pass
def lower_attention_native(model: ir.Model, report: Report) -> None:
    """Let satchel's own operator attend.

    before: query, key, value, past, lengths, rotation, scales? -> GroupQueryAttention -> y, present
    after:  query, key, value, past, lengths, rotation, scales? -> satchel::Attention -> y, present
    refuses when: GroupQueryAttention has an attribute or an input that the operator does not have, no scale, a cache
    of another layer, or one that is neither in float32 nor in int8 with scales for each head and channel.
    """
    for node in nodes(model, "GroupQueryAttention", MICROSOFT):
        with report.refusing(node):
            options = _options(node)
            _rewrite(model, node, options)
            report.count += 1


def _options(node: ir.Node) -> dict[str, Any]:
    options = attributes(
        node, num_heads=0, kv_num_heads=0, scale=0.0, softcap=0.0, local_window_size=-1, do_rotary=0,
        rotary_interleaved=0, k_quant_type="NONE", v_quant_type="NONE", kv_cache_bit_width=0,
    )  # fmt: skip
    kinds = {options.pop("k_quant_type"), options.pop("v_quant_type")}, options.pop("kv_cache_bit_width")
    scales = [value for value in node.inputs[SCALES] if value is not None]
    if any(value is not None for value in (*node.inputs[OTHERS], *node.inputs[SCALES.stop :])):
        raise Refused("GroupQueryAttention has an input that the operator does not have")
    if any(value is not None and not value.is_graph_input() for value in node.inputs[PAST]):
        raise Refused("it reads the cache of another layer")
    dtype = ir.DataType.INT8 if scales else ir.DataType.FLOAT
    if any(value is None or value.dtype != dtype for value in node.inputs[PAST]):
        raise Refused("its cache is neither in float32 nor in int8 with scales")
    if scales and (len(scales) != 2 or kinds != ({"PER_CHANNEL"}, 8)):
        raise Refused("its int8 cache has no scale for each head and channel of both keys and values")
    if not options["scale"]:
        raise Refused("GroupQueryAttention has no scale of its own")
    return options


def _rewrite(model: ir.Model, node: ir.Node, options: dict[str, Any]) -> None:
    new = Builder(model, node).node(
        "Attention", list(node.inputs), f"{node.name}.native", INTERNAL, outputs=len(node.outputs), **options
    )
    for old, output in zip(node.outputs, new.outputs, strict=True):
        output.shape, output.type = old.shape, old.type
        replace(old, output)
