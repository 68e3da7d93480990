"""The KV cache in 8 bits: decode attends to the quantized values, prefill in float to what they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.inputs import graph_input
from satchel.graphs.ir.values import MICROSOFT, Builder, attributes, dims, heads_of, nodes
from satchel.graphs.quant.quantized import KVScales
from satchel.runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, TOTAL, past_names

PAST, SCALES, KNOWN_INPUTS = 3, 12, 10
"""Where GroupQueryAttention takes past key and value and their scales, and how many inputs this pass understands."""


@dataclasses.dataclass(frozen=True)
class Written:
    """Positions that all layers share, int64.

    Attributes:
        past: How many positions the longest row has written before, [1].
        first: Where each row's new tokens begin, [batch].
        new: The positions of the new tokens, [batch, 1, new, 1].
    """

    past: ir.Value
    first: ir.Value
    new: ir.Value


def quantize_kv_cache(scales: Mapping[int, KVScales], phase: str) -> GraphPass:
    """Store keys and values as int8, round(x / scale) within -128 .. 127, with a scale for each head and channel.

    In decode the fused operator reads and writes the quantized values. Its kernel is slow for many tokens, so the
    other phases attend in float: to new keys and values as they are, and to past ones as their quantized values say.

    before: past.N float32 -> GroupQueryAttention -> present.N
    after:  decode: past.N int8, scales -> GroupQueryAttention(PER_CHANNEL) -> present.N int8
            others: past.N int8 -> Slice(the written) -> Cast -> Mul(scale) -> GroupQueryAttention -> GatherND(the new)
            -> Mul(1 / scale) -> QuantizeLinear -> TensorScatter(past.N) -> present.N int8
    refuses when: a layer has no scales, or of another shape, or some that are not finite or not above 0; its attention
    is not GroupQueryAttention, or has an attribute or an input that is not known to mean the same over quantized
    values.

    Args:
        scales: For each layer, by its number in the names of the cache.
        phase: "decode", or another graph of a bundle.
    """

    def edit(model: ir.Model, report: Report) -> None:
        found = []
        for node in nodes(model, "TensorScatter"):
            past = node.inputs[0]
            if past is not None and past.is_graph_input() and past.dtype == ir.DataType.FLOAT:
                report.refuse(node, "its cache is written by TensorScatter, not by GroupQueryAttention")
        for node in nodes(model, "GroupQueryAttention", MICROSOFT):
            with report.refusing(node):
                layer = _layer(node)
                if layer is not None:
                    found.append((node, layer, _checked(node, scales.get(layer))))
        written = _written(model) if found and phase != "decode" else None
        for node, layer, own in found:
            if written is None:
                _attend_to_codes(model, node, layer, own)
            else:
                _attend_in_float(model, node, layer, own, written)
            report.count += 1

    return graph_pass(edit, quantize_kv_cache)


def _layer(node: ir.Node) -> int | None:
    """The number of the layer whose cache the operator reads in float; None where that is done already."""
    past = [v for v in node.inputs[PAST : PAST + 2] if v is not None]
    if len(past) < 2 or any(not v.is_graph_input() or v.dtype != ir.DataType.FLOAT for v in past):
        return None
    names = tuple(str(v.name) for v in past)
    number = names[0].split(".")[1] if "." in names[0] else ""
    if not number.isdecimal() or names != past_names(int(number)):
        raise Refused(f"its cache is called {names[0]} and {names[1]}")
    return int(number)


def _checked(node: ir.Node, scales: KVScales | None) -> KVScales:
    """The layer's scales, if they and the operator are such as the pass can carry over; Refused otherwise."""
    attributes(
        node, num_heads=0, kv_num_heads=0, scale=0.0, softcap=0.0, local_window_size=-1, do_rotary=0,
        rotary_interleaved=0,
    )  # fmt: skip
    if any(value is not None for value in node.inputs[KNOWN_INPUTS:]):
        raise Refused("GroupQueryAttention has an input that this pass does not know")
    if scales is None:
        raise Refused("there are no scales for its cache")
    for past, (part, scale) in zip(node.inputs[PAST:], _parts(scales), strict=False):
        wanted = heads_of(past)
        if scale.shape != wanted or scale.dtype != np.float32:
            raise Refused(f"its {part} scales are {scale.dtype} {list(scale.shape)}, not float32 {list(wanted)}")
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise Refused(f"one of its {part} scales is not finite or not above 0")
    return scales


def _parts(scales: KVScales) -> tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]:
    return ("key", scales.key), ("value", scales.value)


def _factor(builder: Builder, layer: int, part: str, scale: np.ndarray) -> ir.Value:
    """The scales as [1, kv_heads, 1, head_dim]: spread over rows and positions."""
    return builder.constant(scale[None, :, None, :], f"kv_cache.{layer}.{part}_scale")


def _store_codes(past: ir.Value | None, present: ir.Value) -> None:
    """Make a buffer, as the graph takes it and as it gives it back, int8 of the shape that it has."""
    if past is not None:
        # New type objects: the clone shares those of the model that it was made from.
        past.type, present.type = ir.TensorType(ir.DataType.INT8), ir.TensorType(ir.DataType.INT8)
        present.shape = past.shape


def _attend_to_codes(model: ir.Model, node: ir.Node, layer: int, scales: KVScales) -> None:
    node.resize_inputs(SCALES + 2)
    for index, (part, scale) in enumerate(_parts(scales)):
        node.replace_input_with(SCALES + index, _factor(Builder(model, node), layer, part, scale))
        node.attributes.add(ir.AttrString(f"{part[0]}_quant_type", "PER_CHANNEL"))
        _store_codes(node.inputs[PAST + index], node.outputs[1 + index])
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))


def _attend_in_float(model: ir.Model, node: ir.Node, layer: int, scales: KVScales, written: Written) -> None:
    order = list(model.graph)
    behind = order[order.index(node) + 1 :]
    before, after = Builder(model, node), Builder(model, behind[0] if behind else None)
    zero, axis = (before.constant(np.asarray([i], np.int64), f"axis.{i}") for i in (0, 2))
    step = before.constant(np.asarray(1, np.float32), "one.float32")
    middle = before.constant(np.asarray(0, np.int8), "zero.int8")
    for index, (part, scale) in enumerate(_parts(scales)):
        past, present, name = node.inputs[PAST + index], node.outputs[1 + index], f"kv_cache.{layer}.{part}"
        batch, heads, _, width = dims(past) or []
        factor = _factor(before, layer, part, scale)

        codes = before.value("Slice", [past, zero, written.past, axis], f"{name}.codes")
        wide = before.value("Cast", [codes], f"{name}.float", to=ir.DataType.FLOAT)
        node.replace_input_with(PAST + index, before.value("Mul", [wide, factor], f"{name}.past"))

        output, present.name = present.name, f"{name}.present"  # float, and all of it: past and new
        present.shape = ir.Shape([batch, heads, TOTAL, width])
        each = after.constant(np.asarray([1, heads, 1, 1], np.int64), f"shape.1_{heads}_1_1")
        where = after.value("Expand", [written.new, each], f"{name}.where")
        new = after.value("GatherND", [present, where], f"{name}.new", batch_dims=2)
        # By the reciprocal, like the fused operator: a division would round some values to the other side.
        inverse = before.constant(np.float32(1) / scale[None, :, None, :], f"{name}_steps")
        steps = after.value("Mul", [new, inverse], f"{name}.steps")
        rounded = after.value("QuantizeLinear", [steps, step, middle], f"{name}.rounded")
        scattered = after.value("TensorScatter", [past, rounded, written.first], str(output), axis=2)
        _store_codes(past, scattered)
        model.graph.outputs[list(model.graph.outputs).index(present)] = scattered


def _written(model: ir.Model) -> Written:
    """Which positions are there and which are new, at the graph's start. Rows may be padded in a first prompt."""
    builder = Builder(model, next(iter(model.graph)))
    ids, mask = (graph_input(model, n) for n in (INPUT_IDS, ATTENTION_MASK))
    zero, one = (builder.constant(np.asarray(i, np.int64), n) for i, n in ((0, "zero"), (1, "one")))
    axis, spread = (
        builder.constant(np.asarray(a, np.int64), n) for a, n in (([1], "axis.1"), ([1, 2, 3], "axes.1_2_3"))
    )

    def positive(name: str, length: ir.Value, new: ir.Value) -> ir.Value:
        return builder.value("Max", [builder.value("Sub", [length, new], f"{name}.signed"), zero], name)

    new = builder.value("Gather", [builder.value("Shape", [ids], "kv_cache.ids"), axis], "kv_cache.new", axis=0)
    total = builder.value("Gather", [builder.value("Shape", [mask], "kv_cache.mask"), axis], "kv_cache.total", axis=0)
    count = builder.value("ReduceSum", [mask, axis], "kv_cache.count", keepdims=0)
    first = positive("kv_cache.first", count, new)
    steps = builder.value("Range", [zero, builder.value("Squeeze", [new], "kv_cache.end"), one], "kv_cache.range")
    corner = builder.value("Unsqueeze", [first, spread], "kv_cache.corner")
    down = builder.value("Unsqueeze", [steps, builder.constant(np.asarray([1], np.int64), "axis.1")], "kv_cache.down")
    return Written(
        past=positive("kv_cache.past", total, new),
        first=first,
        new=builder.value("Add", [corner, down], "kv_cache.rows"),
    )
