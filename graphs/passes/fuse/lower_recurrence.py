"""The internal Recurrence operator -> com.microsoft LinearAttention over a state."""

from __future__ import annotations

import math

import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.inputs import add_present_state, add_state
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, attributes, dims, nodes, producer, replace
from satchel.runtime.bundle.contract import RECURRENT

RULES = {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}
"""The operator's name for a recurrence, by whether it has decay and beta."""


@graph_pass
def lower_recurrence(model: ir.Model, report: Report) -> None:
    """Give each linear recurrence its state, and lower it to LinearAttention.

    before: query, key [batch, new, key_heads, key_dim], value [batch, new, heads, value_dim], decay, beta [batch, new,
            heads] -> satchel::Recurrence(layer, scale) -> [batch, new, heads, value_dim]
    after:  the same, heads * dim flat, past [batch, heads, key_dim, value_dim] -> LinearAttention -> Reshape -> y
                                                                                                  \\-> present
    refuses when: the number or width of the heads is not known, or the heads do not divide.
    """
    for node in nodes(model, "Recurrence", INTERNAL):
        with report.refusing(node):
            options = attributes(node, layer=None, scale=None)
            (heads, value_dim), (key_heads, key_dim) = _sizes(node.inputs[2]), _sizes(node.inputs[1])
            if _sizes(node.inputs[0]) != (key_heads, key_dim):
                raise Refused(f"its queries are {_sizes(node.inputs[0])} and its keys {(key_heads, key_dim)}")
            if heads % key_heads:
                raise Refused(f"{heads} value heads cannot be shared out over {key_heads} key heads")
            sizes = (key_heads, heads, key_dim, value_dim)
            _rewrite(model, node, int(options["layer"]), float(options["scale"]), sizes)
            report.count += 1


def _sizes(value: ir.Value | None) -> tuple[int, int]:
    """(heads, width) of a tensor [batch, new, heads, width].

    Raises:
        Refused: One of them is not known.
    """
    match dims(value):
        case [_, _, int(heads), int(width)]:
            return heads, width
    raise Refused("the number or width of its heads is not known")


def _rewrite(model: ir.Model, node: ir.Node, layer: int, scale: float, sizes: tuple[int, int, int, int]) -> None:
    key_heads, heads, key_dim, value_dim = sizes
    builder, name = Builder(model, node), f"recurrence.{layer}"
    query, key, value, decay, beta = (*node.inputs, None, None)[:5]
    past = add_state(model, RECURRENT, layer, (heads, key_dim, value_dim))
    flat = [
        None if v is None else _flat(builder, v, f"{name}.{part}")
        for part, v in (("query", query), ("key", key), ("value", value), ("decay", decay), ("beta", beta))
    ]
    fused = builder.node(
        "LinearAttention", [*flat[:3], past, *flat[3:]], name, MICROSOFT, outputs=2,
        q_num_heads=key_heads, kv_num_heads=heads, scale=scale, update_rule=RULES[decay is not None, beta is not None],
    )  # fmt: skip
    output = node.outputs[0]
    fused.outputs[0].shape = ir.Shape([*list(output.shape or ())[:2], heads * value_dim])
    fused.outputs[0].type = output.type
    apart = builder.value("Reshape", [fused.outputs[0], builder.shape(0, 0, heads, value_dim)], f"{name}.heads", output)
    replace(output, apart)
    add_present_state(model, RECURRENT, layer, fused.outputs[1], past)


def _flat(builder: Builder, value: ir.Value, name: str) -> ir.Value:
    """[batch, new, heads, width] -> [batch, new, heads * width]; of fewer axes as it is."""
    batch, new, *rest = dims(value) or []
    if len(rest) < 2:
        return value
    width = math.prod(size for size in rest if isinstance(size, int))
    reshape = producer(value, "Reshape")
    source = reshape.inputs[0] if reshape is not None else None
    if source is not None and dims(source) == [batch, new, width]:
        return source
    flat = builder.value("Reshape", [value, builder.shape(0, 0, width)], f"{name}.flat")
    flat.shape, flat.type = ir.Shape([batch, new, width]), value.type
    return flat
