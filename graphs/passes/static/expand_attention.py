"""The internal Attention operator -> standard operators over a shared KV cache, where nothing fused will do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.inputs import add_cache, add_present, graph_input, present_of
from satchel.graphs.ir.values import INTERNAL, Builder, attributes, heads_of, nodes, replace
from satchel.runtime.bundle.contract import POSITION_IDS


@graph_pass
def expand_attention(model: ir.Model, report: Report) -> None:
    """Give each attention layer its KV cache and lower it to opset 24's TensorScatter and Attention.

    Causality and the window become a boolean mask. A layer that share_caches has marked attends to its owner's present.

    before: query, key, value [batch, heads, new, head_dim] -> satchel::Attention -> [batch, new, heads, value_dim]
    after:  key, value, past_key_values.N -> TensorScatter at the first new position -> present.N
            query, present.N, mask [batch, 1, new, capacity] -> Attention(scale, softcap) -> Transpose -> [batch, new,
            heads, value_dim]
    refuses when: the number or width of the heads is not known, the heads do not divide, or an attribute is not known.
    Such a model cannot be exported.
    """
    for node in nodes(model, "Attention", INTERNAL):
        with report.refusing(node):
            options = attributes(node, layer=None, scale=None, window=0, chunk=0, softcap=0.0, owner=-1)
            if len(node.inputs) > 3 and node.inputs[3] is not None:
                raise Refused("attention sinks, which the standard operator does not have")
            (heads, _), (kv_heads, key_dim), (value_heads, value_dim) = map(heads_of, node.inputs[:3])
            if heads % kv_heads or kv_heads != value_heads:
                raise Refused(
                    f"{heads} query heads cannot be shared out over {kv_heads} key, {value_heads} value heads"
                )
            _rewrite(model, node, options, (kv_heads, key_dim, value_dim))
            report.count += 1


def _rewrite(model: ir.Model, node: ir.Node, options: dict[str, Any], sizes: tuple[int, int, int]) -> None:
    index, builder, name = int(options["layer"]), Builder(model, node), f"attention.{options['layer']}"
    query, key, value = node.inputs[:3]
    present, past = present_of(model, int(options["owner"])), None
    if len(present) != 2:
        past, first = add_cache(model, index, sizes), first_positions(model)
        present = tuple(
            builder.value("TensorScatter", [cache, new, first], f"{name}.{part}", axis=-2)
            for part, cache, new in (("keys", past[0], key), ("values", past[1], value))
        )
    mask = _mask(model, node, int(options["window"]), int(options["chunk"]))
    mixed = builder.value(
        "Attention", [query, *present, mask], name, scale=options["scale"], softcap=options["softcap"]
    )
    replace(
        node.outputs[0], builder.value("Transpose", [mixed], f"{name}.by_token", node.outputs[0], perm=[0, 2, 1, 3])
    )
    if past is not None:
        add_present(model, index, present, past)


def named(model: ir.Model, name: str) -> ir.Value | None:
    return next((n.outputs[0] for n in model.graph if n.name == name), None)


def first_positions(model: ir.Model) -> ir.Value:
    """The position of each row's first new token [batch], made once at the graph's start."""
    there = named(model, "cache.first")
    if there is not None:
        return there
    builder = Builder(model, next(iter(model.graph)))
    zero = builder.constant(np.asarray(0, np.int64), "zero")
    return builder.value("Gather", [graph_input(model, POSITION_IDS), zero], "cache.first", axis=1)


def _mask(model: ir.Model, before: ir.Node, window: int, chunk: int) -> ir.Value:
    """Which cached positions each new token sees: [batch, 1, new, capacity] bool, made once for each limit."""
    name = f"mask.chunk_{chunk}" if chunk else f"mask.window_{window}"
    there = named(model, name)
    if there is not None:
        return there
    builder = Builder(model, before)

    def number(value: int, called: str) -> ir.Value:
        return builder.constant(np.asarray(value, np.int64), called)

    past = next(v for v in model.graph.inputs if str(v.name).startswith("past_key_values."))
    axes = builder.constant(np.asarray([1, 3], np.int64), "axes.1_3")
    positions = graph_input(model, POSITION_IDS)
    queries = builder.value("Unsqueeze", [positions, axes], f"{name}.queries")  # [batch, 1, new, 1]
    shape = builder.value("Shape", [past], f"{name}.shape")
    capacity = builder.value("Gather", [shape, number(2, "two")], f"{name}.capacity", axis=0)
    keys = builder.value("Range", [number(0, "zero"), capacity, number(1, "one")], f"{name}.keys")
    if not window and not chunk:
        return builder.value("LessOrEqual", [keys, queries], name)
    causal = builder.value("LessOrEqual", [keys, queries], f"{name}.causal")
    if chunk:
        of_keys, of_queries = (
            builder.value("Div", [value, number(chunk, f"chunk.{chunk}")], f"{name}.{part}_chunk")
            for part, value in (("key", keys), ("query", queries))
        )
        return builder.value("And", [causal, builder.value("Equal", [of_keys, of_queries], f"{name}.own")], name)
    reach = builder.value("Sub", [queries, number(window, f"window.{window}")], f"{name}.reach")
    return builder.value("And", [causal, builder.value("Greater", [keys, reach], f"{name}.near")], name)
