"""Recurrences and causal convolutions by satchel's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, attributes, dims, nodes, replace

MAX_WIDTH, MAX_STATE_DIM, MIN_VALUE_DIM = 32, 4096, 8
"""What the operators take, and how many values a head has at least: a vector holds 16, and fewer would waste it."""

PAST = 3
"""Which input of both operators is the state."""


@graph_pass
def lower_states_native(model: ir.Model, report: Report) -> None:
    """Let satchel's own operators update the states of fixed size.

    before: query, key, value, past, decay, beta -> LinearAttention -> y, present
            x, weight, bias, past -> CausalConvWithState(channels_last) -> y, present
    after:  the same inputs -> satchel::LinearAttention, satchel::CausalConv -> y, present
    refuses when: an operator has an attribute that satchel's does not have, or no state in float32; a convolution is
    wider than 32 tokens or has its channels before its tokens; a recurrence has values narrower than 8.
    """
    for kind, name, read in (
        ("LinearAttention", "LinearAttention", _recurrence),
        ("CausalConvWithState", "CausalConv", _convolution),
    ):
        for node in nodes(model, kind, MICROSOFT):
            with report.refusing(node):
                _rewrite(model, node, name, read)
                report.count += 1


def _recurrence(node: ir.Node) -> dict[str, Any]:
    options = attributes(node, q_num_heads=0, kv_num_heads=0, scale=0.0, update_rule="gated_delta")
    match dims(node.inputs[PAST]):
        case [_, _, int(key_dim), int(value_dim)] if key_dim <= MAX_STATE_DIM and (
            MIN_VALUE_DIM <= value_dim <= MAX_STATE_DIM
        ):
            pass
        case shape:
            raise Refused(f"its state has the shape {shape}")
    if not options["scale"]:
        raise Refused("LinearAttention has no scale of its own")
    return options


def _convolution(node: ir.Node) -> dict[str, Any]:
    options = attributes(node, channels_last=0, activation="none")
    if not options.pop("channels_last"):
        raise Refused("its channels are not last")
    if options["activation"] not in ("none", "silu"):
        raise Refused(f"its activation is {options['activation']}")
    match dims(node.inputs[1]):
        case [_, _, int(width)] if 2 <= width <= MAX_WIDTH:
            pass
        case shape:
            raise Refused(f"its weight has the shape {shape}")
    return {"activation": "silu"} if options["activation"] == "silu" else {}


def _rewrite(model: ir.Model, node: ir.Node, name: str, read: Callable[[ir.Node], dict[str, Any]]) -> None:
    past = node.inputs[PAST] if len(node.inputs) > PAST else None
    if past is None or past.dtype != ir.DataType.FLOAT:
        raise Refused("it has no state in float32")
    options = read(node)
    new = Builder(model, node).node(
        name, list(node.inputs), f"{node.name}.native", INTERNAL, outputs=len(node.outputs), **options
    )
    for old, output in zip(node.outputs, new.outputs, strict=True):
        output.shape, output.type = old.shape, old.type
        replace(old, output)
