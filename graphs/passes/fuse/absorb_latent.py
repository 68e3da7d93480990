"""Latent attention -> attention over a cache of latents, which all heads share."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.inputs import add_cache, add_present, graph_input
from satchel.graphs.ir.values import (
    INTERNAL,
    MICROSOFT,
    Builder,
    attributes,
    constant,
    dims,
    heads_of,
    last_dim,
    nodes,
    producer,
    rank,
    replace,
    span,
    weight,
)
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.passes.static.expand_attention import first_positions, named
from satchel.runtime.bundle.contract import ATTENTION_MASK, POSITION_IDS

Part = tuple[ir.Value, int, int]
"""Channels of a value: the value, the first channel, and the one behind the last."""

UNSEEN = -1e30
"""What is added to the score of a position that a token does not see."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A matched layer.

    Attributes:
        query: [batch, heads, new, width].
        own, common: The channels of the query that meet the head's own part of a key, and those that meet the shared
            part.
        latent: [batch, new, latent] or [batch, 1, new, latent].
        shared: The part of a key that all heads share, [batch, 1, new, width]: most often the rotated one.
        matrix: What makes a head's keys and values of the latent, [latent, heads * (key + value channels)].
        keys, values: Which of a head's channels are keys and values.
    """

    query: ir.Value
    own: range
    common: range
    latent: ir.Value
    shared: ir.Value
    matrix: LazyWeight
    heads: int
    keys: range
    values: range

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of the latent and of the shared part."""
        return self.matrix.dims[0], last_dim(self.shared) or 0


def absorb_latent(always: bool = False) -> GraphPass:
    """A pass that lets latent attention keep the latent of each token in place of each head's keys and values.

    A head's keys and values are linear in the latent, so that queries are multiplied by the keys' half of the matrix,
    and what attention gives by the values' half. A token keeps [latent, shared part], which stands for keys and values
    at once: of what attention gives over it, the channels of the latent are taken.

    before: latent -> MatMul(W) -> heads -> key channels, shared part -> Concat -> satchel::Attention -> [batch, new,
            heads, value_dim]            -> value channels              /
    after:  latent, shared part -> Concat -> TensorScatter(past_key_values.N.key) -> present.N.key
            query -> MatMul(W's keys), Concat -> FusedMatMul(present) -> Softmax -> MatMul(present) -> MatMul(W's
            values) -> Transpose -> [batch, new, heads, value_dim]
    refuses when: the layer has a window, chunks, a softcap or sinks; key and value are not made of one matrix and one
    shared part as above; or a size is not known; or the latent is not smaller, unless `always`. Layers whose keys have
    no shared part are ignored.
    Source: DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1.2.

    Args:
        always: Whether to keep latents even where they are not smaller.
    """

    def edit(model: ir.Model, report: Report) -> None:
        for node in nodes(model, "Attention", INTERNAL):
            with report.refusing(node):
                if not _has_shared_part(node):
                    continue
                options = attributes(node, layer=None, scale=None, window=0, chunk=0, softcap=0.0, owner=-1)
                if options["owner"] >= 0:
                    raise Refused("it reads the cache of another layer")
                if options["window"] or options["chunk"] or options["softcap"] or any(node.inputs[3:]):
                    raise Refused("it has a window, chunks, a softcap or sinks")
                layer = _match(node)
                kept, expanded = sum(layer.widths), layer.heads * (_width(node, 1) + _width(node, 2))
                if kept >= expanded and not always:
                    raise Refused(f"its latent has {kept} numbers per token, its keys and values {expanded}")
                _rewrite(model, node, layer, options)
                report.count += 1

    return graph_pass(edit, absorb_latent)


def _width(node: ir.Node, index: int) -> int:
    return heads_of(node.inputs[index])[1]


def _has_shared_part(node: ir.Node) -> bool:
    """Whether the key is joined from channels of which some are copied to all heads."""
    try:
        found = _parts(node.inputs[1])
    except Refused:
        return False
    return len(found) > 1 and any(producer(source, "Expand") is not None for source, _, _ in found)


def _parts(value: ir.Value | None) -> list[Part]:
    """What a value's channels are, from the first to the last: seen through joins, slices and splits of channels."""
    width = last_dim(value)
    join, cut = producer(value, "Concat"), span(value)
    if join is not None and join.attributes.get_int("axis", 0) in (-1, (rank(value) or 0) - 1):
        return [part for operand in join.inputs for part in _parts(operand)]
    if cut is not None and cut[1].step == 1:
        return _cut(_parts(cut[0]), cut[1])
    if value is None or width is None:
        raise Refused("the number of its channels is not known")
    return [(value, 0, width)]


def _cut(parts: list[Part], channels: range) -> list[Part]:
    """Some of the channels that parts have together."""
    found, offset = list[Part](), 0
    for source, start, stop in parts:
        low, high = max(channels.start - offset, 0), min(channels.stop - offset, stop - start)
        if low < high:
            found.append((source, start + low, start + high))
        offset += stop - start
    return found


def _match(node: ir.Node) -> Layer:
    query, key, value = node.inputs[:3]
    (heads, width), (key_heads, key_width), (value_heads, _) = map(heads_of, (query, key, value))
    keys, values = _parts(key), _parts(value)
    spread = [index for index, (source, _, _) in enumerate(keys) if producer(source, "Expand") is not None]
    if len(keys) != 2 or len(spread) != 1 or len(values) != 1 or not heads == key_heads == value_heads:
        raise Refused("its keys are not channels of a linear layer beside channels that all heads share")
    expand = producer(keys[spread[0]][0], "Expand")
    (source, start, stop), (shared_part, first, last) = keys[1 - spread[0]], keys[spread[0]]
    shared = expand.inputs[0] if expand is not None else None
    if values[0][0] is not source or query is None or shared is None or width != key_width:
        raise Refused("its keys and values are not channels of one linear layer")
    if heads_of(shared) != (1, last - first) or heads_of(shared_part)[1] != last - first:
        raise Refused("the part of its keys that is copied to all heads is not one of a head")
    latent, matrix = _projection(source, heads)
    at = stop - start if spread[0] else last - first
    own, common = (range(at), range(at, width)) if spread[0] else (range(at, width), range(at))
    return Layer(query, own, common, latent, shared, matrix, heads, range(start, stop), range(*values[0][1:]))


def _projection(value: ir.Value, heads: int) -> tuple[ir.Value, LazyWeight]:
    """The latent and the matrix of which all heads' channels [batch, heads, new, channels] are made."""
    turn = producer(value, "Transpose")
    apart = producer(turn.inputs[0], "Reshape") if turn is not None else None
    product = producer(apart.inputs[0], "MatMul") if apart is not None else None
    if turn is None or product is None or turn.attributes.get_ints("perm") != (0, 2, 1, 3):
        raise Refused("its keys and values do not come straight from a linear layer")
    latent, lazy = product.inputs[0], weight(product.inputs[1])
    sizes, target = dims(latent) or [], constant(apart.inputs[1]) if apart is not None else None
    if lazy is None or latent is None or len(lazy.dims) != 2 or len(sizes) not in (3, 4) or lazy.dims[1] % heads:
        raise Refused("its keys and values do not come from a linear layer with constant weights")
    channels = lazy.dims[1] // heads
    if (len(sizes) == 4 and sizes[1] != 1) or target is None or target.tolist()[2:] != [heads, channels]:
        raise Refused("the outputs of the linear layer of its keys and values are not those of one head after another")
    return latent, lazy


def _joined(query: ir.Value, channels: range) -> ir.Value | None:
    """The operand of the join that makes the query which is exactly these channels, if there is one."""
    join, offset = producer(query, "Concat"), 0
    for operand in () if join is None else join.inputs:
        width = last_dim(operand) or 0
        if range(offset, offset + width) == channels:
            return operand
        offset += width
    return None


def _half(lazy: LazyWeight, heads: int, channels: range, name: str, turned: bool) -> LazyWeight:
    """[latent, heads * all channels] -> these channels of each head: [heads, latent, channels], or with the last two
    turned.
    """
    latent, width = lazy.dims[0], lazy.dims[1] // heads
    shape = (heads, len(channels), latent) if turned else (heads, latent, len(channels))

    def rows(start: int, stop: int) -> np.ndarray:
        block = lazy.columns(start * width, stop * width).reshape(latent, stop - start, width)
        return block[:, :, channels.start : channels.stop].transpose((1, 2, 0) if turned else (1, 0, 2))

    return LazyWeight(f"{lazy.name}.{name}", shape, lazy.dtype, rows)


@dataclasses.dataclass(frozen=True)
class Writer:
    """Adds the nodes of one layer: values of a known shape, in the type of `like`."""

    builder: Builder
    name: str
    like: ir.Value

    def make(self, op_type: str, inputs: list[ir.Value], part: str, shape: list[Any], **options: Any) -> ir.Value:
        domain = MICROSOFT if op_type == "FusedMatMul" else ""
        value = self.builder.value(op_type, inputs, f"{self.name}.{part}", domain=domain, **options)
        value.shape, value.type = ir.Shape(shape), self.like.type
        return value

    def reshape(self, value: ir.Value, part: str, target: tuple[int, ...], shape: list[Any]) -> ir.Value:
        return self.make("Reshape", [value, self.builder.shape(*target)], part, shape)

    def cut(self, value: ir.Value, channels: range, part: str) -> ir.Value:
        """Channels of [batch, heads, new, width]."""
        bounds = [self.numbers(n) for n in (channels.start, channels.stop, 3)]
        return self.make("Slice", [value, *bounds], part, [*(dims(value) or [])[:3], len(channels)])

    def numbers(self, *each: int) -> ir.Value:
        return self.builder.constant(np.asarray(each, np.int64), "axis." + "_".join(map(str, each)))


def _rewrite(model: ir.Model, node: ir.Node, layer: Layer, options: dict[str, Any]) -> None:
    index, heads, (latent, shared), like = int(options["layer"]), layer.heads, layer.widths, node.outputs[0]
    write = Writer(Builder(model, node), f"attention.{options['layer']}", like)
    batch, new = (dims(like) or [None, None])[:2]
    keys, values = (
        write.builder.shared(_half(layer.matrix, heads, channels, part, turned))
        for channels, part, turned in ((layer.keys, "keys", True), (layer.values, "values", False))
    )
    own, common = (
        _joined(layer.query, channels) or write.cut(layer.query, channels, part)
        for part, channels in (("own", layer.own), ("common", layer.common))
    )
    own = write.make("MatMul", [own, keys], "absorbed", [batch, heads, new, latent])
    query = write.make("Concat", [own, common], "query", [batch, heads, new, latent + shared], axis=-1)
    one = layer.latent
    if rank(one) == 3:
        one = write.make("Unsqueeze", [one, write.numbers(1)], "latent", [batch, 1, new, latent])
    past = add_cache(model, index, (1, latent + shared))
    token = write.make("Concat", [one, layer.shared], "token", [batch, 1, new, latent + shared], axis=-1)
    present = write.builder.value(
        "TensorScatter", [past[0], token, first_positions(model)], f"{write.name}.latents", axis=-2
    )
    mixed = write.cut(
        _attend(model, node, write, query, present, float(options["scale"])), range(latent), "latents_mixed"
    )
    result = write.make("MatMul", [mixed, values], "by_head", [batch, heads, new, len(layer.values)])
    replace(like, write.builder.value("Transpose", [result], f"{write.name}.by_token", like, perm=[0, 2, 1, 3]))
    add_present(model, index, [present], past)


def _attend(
    model: ir.Model, node: ir.Node, write: Writer, query: ir.Value, present: ir.Value, scale: float
) -> ir.Value:
    """Attention of the query [batch, heads, new, width] over keys [batch, 1, capacity, width], which are the values
    too.

    Heads are rows of one matrix, as they share the keys.
    """
    batch, heads, new, width = dims(query) or []
    bias, total = _seen(model, node)
    seen = write.make("Slice", [present, write.numbers(0), total, write.numbers(2)], "seen", [batch, 1, None, width])
    rows = write.reshape(query, "rows", (0, 1, -1, int(width or 0)), [batch, 1, None, width])
    products = write.make("FusedMatMul", [rows, seen], "products", [batch, 1, None, None], alpha=scale, transB=1)
    scores = write.reshape(products, "scores", (0, int(heads or 0), -1, 0), [batch, heads, new, None])
    masked = write.make("Add", [scores, bias], "masked", [batch, heads, new, None])
    shares = write.make("Softmax", [masked], "shares", [batch, heads, new, None], axis=-1)
    shares = write.reshape(shares, "shares_of_rows", (0, 1, -1, 0), [batch, 1, None, None])
    mixed = write.make("MatMul", [shares, seen], "mixed", [batch, 1, None, width])
    return write.reshape(mixed, "mixed_by_head", (0, int(heads or 0), -1, int(width or 0)), [batch, heads, new, width])


def _seen(model: ir.Model, before: ir.Node) -> tuple[ir.Value, ir.Value]:
    """What is added to scores [batch, 1, new, total], and the number of all tokens [1]; made once."""
    there, total = named(model, "seen.bias"), named(model, "seen.total")
    if there is not None and total is not None:
        return there, total
    builder = Builder(model, before)

    def number(value: Any, called: str) -> ir.Value:
        return builder.constant(np.asarray(value), called)

    total = builder.value("Shape", [graph_input(model, ATTENTION_MASK)], "seen.total", start=1, end=2)
    count = builder.value("Squeeze", [total], "seen.count")
    axes = number([1, 3], "axes.1_3")
    queries = builder.value("Unsqueeze", [graph_input(model, POSITION_IDS), axes], "seen.queries")
    keys = builder.value("Range", [number(0, "zero"), count, number(1, "one")], "seen.keys")
    causal = builder.value("LessOrEqual", [keys, queries], "seen.causal")
    none, hidden = number(np.float32(0), "float.0"), number(np.float32(UNSEEN), "unseen")
    return builder.value("Where", [causal, none, hidden], "seen.bias"), total
