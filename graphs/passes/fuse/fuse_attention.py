"""The internal Attention operator -> com.microsoft GroupQueryAttention over a shared KV cache."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.inputs import add_cache, add_present, graph_input, present_of
from satchel.graphs.ir.values import (
    INTERNAL,
    MICROSOFT,
    Builder,
    attributes,
    dims,
    heads_of,
    last_dim,
    nodes,
    producer,
    replace,
)
from satchel.runtime.bundle.contract import ATTENTION_MASK, BATCH, POSITION_IDS

SINKS = 11
"""Which input of GroupQueryAttention the sinks are."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A matched attention layer.

    Attributes:
        query, key, value: [batch, heads, new, head_dim]; before their rotation, where the operator does it.
        rotary: The rotation's tables, where the operator does it.
        rows: The tables' rows for the new tokens [batch, new], where these are not the positions in the cache.
        interleaved: Which channels rotate together.
        sinks: A logit of each head for attending to nothing, [heads].
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    rotary: tuple[ir.Value, ir.Value] | None
    rows: ir.Value | None
    interleaved: bool
    heads: int
    kv_heads: int
    head_dim: int
    sinks: ir.Value | None


@graph_pass
def fuse_attention(model: ir.Model, report: Report) -> None:
    """Give each attention layer its KV cache and lower it to GroupQueryAttention.

    The rotation goes inside where query and key share it.

    before: query, key, value [batch, heads, new, head_dim], sinks -> satchel::Attention(layer, scale, window, chunk,
            softcap) -> [batch, new, heads, head_dim]
    after:  query, key, value [batch, new, heads * head_dim], past_key_values.N, sinks -> GroupQueryAttention ->
            Reshape -> [batch, new, heads, head_dim]
                                                                                      \\-> present.N
    A layer that share_caches has marked reads the present of its owner, and adds no tokens to it: key and value are
    [batch, 0, kv_heads * head_dim], and its rotation stays outside.
    refuses when: tokens see chunks, keys and values differ in width, the width is not a multiple of 8, the heads do
    not divide, or a size is not known. expand_attention takes those layers.
    """
    for node in nodes(model, "Attention", INTERNAL):
        with report.refusing(node):
            options = attributes(node, layer=None, scale=None, window=0, chunk=0, softcap=0.0, owner=-1)
            if options["chunk"]:
                raise Refused("its tokens see chunks, which GroupQueryAttention does not have")
            if not options["scale"]:
                raise Refused("GroupQueryAttention takes a scale of 0 for none given")
            layer = _match(model, node, report, options["owner"] >= 0)
            if options["owner"] >= 0:
                _attend_to_owner(model, node, layer, options)
            else:
                _rewrite(model, node, layer, options)
            report.count += 1


def _match(model: ir.Model, node: ir.Node, report: Report, shared: bool) -> Layer:
    query, key, value, *sinks = (v for v in node.inputs if v is not None)
    (heads, head_dim), (kv_heads, key_dim), (value_heads, value_dim) = map(heads_of, (query, key, value))
    if key_dim != value_dim:
        raise Refused(f"keys are {key_dim} wide and values {value_dim}: GroupQueryAttention wants them alike")
    if heads % kv_heads or kv_heads != value_heads:
        raise Refused(f"{heads} query heads cannot be shared out over {kv_heads} key and {value_heads} value heads")
    if head_dim % 8:
        raise Refused(f"heads are {head_dim} channels wide: GroupQueryAttention wants a multiple of 8")
    layer = Layer(query, key, value, None, None, False, heads, kv_heads, head_dim, sinks[0] if sinks else None)
    if shared:
        return layer
    try:
        return _with_rotation(model, layer)
    except Refused as refusal:
        report.refuse(node, f"its rotation stays outside: {refusal}")
        return layer


def _with_rotation(model: ir.Model, layer: Layer) -> Layer:
    """Move the rotation into the operator if query and key have the same one, by the graph's own positions or the rows
    that these have in a table of two blocks.

    Raises:
        Refused: The operator has no kernel for this width.
    """
    first, second = producer(layer.query, "RotaryEmbedding"), producer(layer.key, "RotaryEmbedding")
    if first is None or second is None or len(first.inputs) < 4:
        return layer
    positions = graph_input(model, POSITION_IDS)
    chosen = producer(first.inputs[3], "RotaryRows", INTERNAL)
    read = first.inputs[3] if chosen is None else chosen.inputs[0]
    if list(first.inputs[1:]) != list(second.inputs[1:]) or read is not positions:
        return layer
    options = [attributes(n, interleaved=0, rotary_embedding_dim=0, num_heads=0) for n in (first, second)]
    query, key, cos, sin = first.inputs[0], second.inputs[0], first.inputs[1], first.inputs[2]
    if options[0] != options[1] or query is None or key is None or cos is None or sin is None:
        return layer
    half = last_dim(cos)
    if layer.head_dim % 16 or half is None or half % 8:
        raise Refused(
            "GroupQueryAttention rotates heads and parts of heads of multiples of 16 channels, "
            f"not {2 * (half or 0)} of {layer.head_dim}"
        )
    rows = None if chosen is None else first.inputs[3]
    return dataclasses.replace(
        layer, query=query, key=key, rotary=(cos, sin), rows=rows, interleaved=bool(options[0]["interleaved"])
    )


def _rewrite(model: ir.Model, node: ir.Node, layer: Layer, options: dict[str, Any]) -> None:
    index, builder, name = int(options["layer"]), Builder(model, node), f"attention.{options['layer']}"
    flat = [
        _flat(builder, value, f"{name}.{part}")
        for part, value in (("query", layer.query), ("key", layer.key), ("value", layer.value))
    ]  # fmt: skip
    past = add_cache(model, index, (layer.kv_heads, layer.head_dim, layer.head_dim))
    lengths = _lengths(model)
    inputs: list[ir.Value | None] = [*flat, *past, *lengths, *(layer.rotary or ())]
    if layer.rows is not None:
        inputs.append(layer.rows)
    fused = _fused(builder, node, layer, options, inputs)
    add_present(model, index, (fused.outputs[1], fused.outputs[2]), past)


def _attend_to_owner(model: ir.Model, node: ir.Node, layer: Layer, options: dict[str, Any]) -> None:
    builder, name = Builder(model, node), f"attention.{options['layer']}"
    present = present_of(model, int(options["owner"]))
    if len(present) != 2 or any(producer(value, "GroupQueryAttention", MICROSOFT) is None for value in present):
        raise Refused("the layer whose cache it reads has another form")
    query = _flat(builder, layer.query, f"{name}.query")
    none = _no_tokens(model, builder, layer.kv_heads * layer.head_dim)
    _fused(builder, node, layer, options, [query, none, none, *present, *_lengths(model)])


def _no_tokens(model: ir.Model, builder: Builder, width: int) -> ir.Value:
    """Keys or values of no new tokens, [batch, 0, width]; made once."""
    name = f"no_tokens.{width}"
    for node in model.graph:
        if node.name == name:
            return node.outputs[0]
    batch = builder.value("Shape", [graph_input(model, ATTENTION_MASK)], f"{name}.batch", start=0, end=1)
    rest = builder.constant(np.asarray([0, width], np.int64), f"{name}.sizes")
    none = builder.value("ConstantOfShape", [builder.value("Concat", [batch, rest], f"{name}.shape", axis=0)], name)
    none.shape, none.type = ir.Shape([BATCH, 0, width]), ir.TensorType(ir.DataType.FLOAT)
    return none


def _fused(
    builder: Builder, node: ir.Node, layer: Layer, options: dict[str, Any], inputs: list[ir.Value | None]
) -> ir.Node:
    """The operator, whose first output takes the place of the node's."""
    name = f"attention.{options['layer']}"
    if layer.sinks is not None:
        inputs += [None] * (SINKS - len(inputs)) + [layer.sinks]
    fused = builder.node(
        "GroupQueryAttention", inputs, name, MICROSOFT, outputs=3,
        num_heads=layer.heads, kv_num_heads=layer.kv_heads, scale=options["scale"], softcap=options["softcap"] or None,
        local_window_size=options["window"] or None, do_rotary=int(layer.rotary is not None),
        rotary_interleaved=int(layer.interleaved) if layer.rotary else None,
    )  # fmt: skip
    output = node.outputs[0]
    fused.outputs[0].shape = ir.Shape([*list(output.shape or ())[:2], layer.heads * layer.head_dim])
    fused.outputs[0].type = output.type
    shape = builder.shape(0, 0, layer.heads, layer.head_dim)
    replace(output, builder.value("Reshape", [fused.outputs[0], shape], f"{name}.heads", output))
    return fused


def _flat(builder: Builder, value: ir.Value, name: str) -> ir.Value:
    """[batch, heads, new, head_dim] -> [batch, new, heads * head_dim].

    What spread the heads is taken back where it is there.
    """
    transpose = producer(value, "Transpose")
    spread = transpose.inputs[0] if transpose is not None else None
    if transpose is None or spread is None or transpose.attributes.get_ints("perm") != (0, 2, 1, 3):
        spread = builder.value("Transpose", [value], f"{name}.by_token", perm=[0, 2, 1, 3])
        batch, heads, new, head_dim = dims(value) or []
        spread.shape, spread.type = ir.Shape([batch, new, heads, head_dim]), value.type
    batch, _, new, _ = dims(value) or []
    width = math.prod(heads_of(value))
    reshape = producer(spread, "Reshape")
    if reshape is not None and dims(reshape.inputs[0]) == [batch, new, width]:
        flat = reshape.inputs[0]
        if flat is not None:
            return flat
    flat = builder.value("Reshape", [spread, builder.shape(0, 0, width)], f"{name}.flat")
    flat.shape, flat.type = ir.Shape([batch, new, width]), value.type
    return flat


def _lengths(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    """(index of each row's last token [batch], length of the mask), both int32; made once, at the graph's start."""
    for node in model.graph:
        if node.name == "total_sequence_length":
            before = next(n for n in model.graph if n.name == "seqlens_k")
            return before.outputs[0], node.outputs[0]
    builder = Builder(model, next(iter(model.graph)))
    mask = graph_input(model, ATTENTION_MASK)
    axis, one = builder.constant(np.asarray([1], np.int64), "axis.1"), builder.constant(np.asarray(1, np.int64), "one")
    count = builder.value("ReduceSum", [mask, axis], "mask.count", keepdims=0)
    last = builder.value("Sub", [count, one], "mask.last")
    seqlens = builder.value("Cast", [last], "seqlens_k", to=ir.DataType.INT32)
    size = builder.value("Shape", [mask], "mask.shape")
    total = builder.value("Gather", [size, one], "mask.total", axis=0)
    return seqlens, builder.value("Cast", [total], "total_sequence_length", to=ir.DataType.INT32)
