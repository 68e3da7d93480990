"""Attention by satchel's own kernel."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, attributes, nodes, replace

KNOWN_INPUTS, PAST = 10, slice(3, 5)
"""How many inputs the operator has, those of GroupQueryAttention in its order, and which are its past."""


@graph_pass
def lower_attention_native(model: ir.Model, report: Report) -> None:
    """Let satchel's own operator attend.

    before: query, key, value, past, lengths, rotation -> GroupQueryAttention -> y, present
    after:  query, key, value, past, lengths, rotation -> satchel::Attention -> y, present
    refuses when: GroupQueryAttention has an attribute or an input that the operator does not have, no scale, a cache
    that is not in float32, or that of another layer.
    """
    for node in nodes(model, "GroupQueryAttention", MICROSOFT):
        with report.refusing(node):
            options = _options(node)
            _rewrite(model, node, options)
            report.count += 1


def _options(node: ir.Node) -> dict[str, Any]:
    options = attributes(
        node, num_heads=0, kv_num_heads=0, scale=0.0, softcap=0.0, local_window_size=-1, do_rotary=0,
        rotary_interleaved=0,
    )  # fmt: skip
    if any(value is not None for value in node.inputs[KNOWN_INPUTS:]):
        raise Refused("GroupQueryAttention has an input that the operator does not have")
    if any(value is not None and not value.is_graph_input() for value in node.inputs[PAST]):
        raise Refused("it reads the cache of another layer")
    if any(value is None or value.dtype != ir.DataType.FLOAT for value in node.inputs[PAST]):
        raise Refused("its cache is not in float32")
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
