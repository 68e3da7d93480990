"""What lies between the linear layers that are cut by output and the one behind them that is cut by input.

A rank keeps some channels of each value there. Which ones is asked for from behind: the channels that the last linear
layer keeps are followed backward through each operator to the linear layers in front.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.linear import linear
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, constant, dims, only_user, producer, rank
from satchel.graphs.shard.caches import PAST, RECURRENCE, cut_cache, cut_state, head_counts, head_sizes
from satchel.graphs.shard.products import Product, product_of
from satchel.graphs.shard.slices import NotCutError, Ranges, Slicer, scaled, shifted, width
from satchel.runtime.bundle.shares import Heads

Edit = Callable[[Slicer], None]

ONE_BY_ONE = {
    "Sigmoid", "Tanh", "Relu", "Gelu", "Erf", "Neg", "Exp", "Softplus", "Sqrt", "Abs", "Cast", "Identity", "Log",
    "Reciprocal", "Sin", "Cos", "HardSwish", "Mish", "Elu", "LeakyRelu", "Swish", "QuickGelu", "FastGelu",
}  # fmt: skip
PAIRS = {"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "Clip"}
NORMS = {"RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization"}
ATTENTIONS = {(MICROSOFT, "GroupQueryAttention"), (INTERNAL, "Attention")}
RECURRENCES = {(MICROSOFT, RECURRENCE), (INTERNAL, RECURRENCE)}
CONVOLUTIONS = {(MICROSOFT, "CausalConvWithState"), (INTERNAL, "CausalConv")}
QUERY, KEY, VALUE = range(3)
DECAY, BETA = 4, 5
BIAS, SINK = 10, 11
MAX_NODES = 200


@dataclasses.dataclass(frozen=True)
class Kept:
    """The entries of one axis, counted from the last one, that a rank keeps."""

    axis: int
    ranges: Ranges


@dataclasses.dataclass(frozen=True)
class Padding:
    """Channels of a rank, `own`, that zeros in front and behind fill up to `cover`, whole blocks of a Hadamard
    transform."""

    own: range
    cover: range

    def pad(self, slicer: Slicer, node: ir.Node) -> None:
        """Let a node read its first input filled up."""
        x, builder = node.inputs[0], Builder(slicer.model, node)
        around = [self.own.start - self.cover.start, self.cover.stop - self.own.stop]
        pads = builder.constant(np.asarray(around, np.int64), f"pads.{around[0]}_{around[1]}")
        axis = builder.constant(np.asarray([-1], np.int64), "axis.last")
        node.replace_input_with(0, builder.value("Pad", [x, pads, None, axis], f"{node.name}.padded"))


@dataclasses.dataclass
class Region:
    """What was found behind a linear layer.

    Attributes:
        padding: What is to be filled up with zeros, if anything.
        kept: What a rank keeps of each value that is not whole.
        fronts: Linear layers that are cut by output.
        nodes: Operators in between.
        edits: What has to be done to the graph.
    """

    padding: Padding | None = None
    kept: dict[ir.Value, Kept] = dataclasses.field(default_factory=dict)
    fronts: list[Product] = dataclasses.field(default_factory=list)
    nodes: list[ir.Node] = dataclasses.field(default_factory=list)
    edits: list[Edit] = dataclasses.field(default_factory=list)

    def ask(self, value: ir.Value | None, axis: int, ranges: Ranges) -> None:
        """Keep some entries of a value.

        Raises:
            NotCutError: Others ask for other entries of it.
        """
        if value is None:
            return
        if self.kept.setdefault(value, Kept(axis, ranges)) != Kept(axis, ranges):
            raise NotCutError(f"{value.name} is needed in two ways")


def _pad(padding: Padding, node: ir.Node, slicer: Slicer) -> None:
    padding.pad(slicer, node)


def mixing(blocks: ir.Value) -> int:
    """The size of the blocks of a Hadamard transform that a value [..., blocks, size] goes into, or 0."""
    node = only_user(blocks)
    matrix = node.inputs[1].const_value if node is not None and node.op_type == "MatMul" and node.inputs[1] else None
    sizes = () if matrix is None else matrix.shape.numpy()
    shape = dims(blocks) or []
    return sizes[0] if len(sizes) == 2 and sizes[0] == sizes[1] and len(shape) > 3 and shape[-1] == sizes[0] else 0


def mixing_behind(value: ir.Value) -> int:
    """The size of the blocks of the Hadamard transform that a value comes out of, or 0."""
    whole = producer(value, "Reshape")
    mixed = producer(whole.inputs[0], "MatMul") if whole is not None else None
    return mixing(mixed.inputs[0]) if mixed is not None and mixed.inputs[0] is not None else 0


def unmixed(value: ir.Value) -> ir.Value:
    """What a Hadamard transform makes a value of; the value itself if none does."""
    if not mixing_behind(value):
        return value
    blocks = value.producer().inputs[0].producer().inputs[0]  # type: ignore[union-attr]
    split = producer(blocks, "Reshape")
    return value if split is None or split.inputs[0] is None else split.inputs[0]


def attention_behind(value: ir.Value) -> ir.Node | None:
    """The attention or recurrence that a value is computed from without a linear layer in between, or None."""
    seen, waiting = set[ir.Value](), [value]
    while waiting and len(seen) < MAX_NODES:
        value = waiting.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        if (node.domain, node.op_type) in ATTENTIONS | RECURRENCES:
            return node
        if product_of(value) is None:
            waiting += [each for each in node.inputs if each is not None]
    return None


def trace(
    value: ir.Value,
    axis: int,
    ranges: Ranges,
    heads: Callable[[ir.Node], Heads],
    readers: set[ir.Node],
    padding: Padding | None = None,
) -> Region:
    """Follow what a rank keeps of a value to the linear layers that it comes from.

    Args:
        value: Where to begin.
        axis: Counted from the last.
        ranges: What is kept of it.
        heads: Which heads of an attention the rank has.
        readers: The nodes that read `value` in part.
        padding: What is to be filled up in front of a Hadamard transform on the way.

    Raises:
        NotCutError: An operator on the way needs all entries.
    """
    region, last = Region(padding), value.producer()
    region.ask(value, axis, ranges)
    if last is None or last.graph is None:
        raise NotCutError(f"{value.name} is an input of the graph")
    order = {node: place for place, node in enumerate(last.graph)}
    waiting = {last}
    while waiting:
        node = max(waiting, key=order.__getitem__)
        waiting.remove(node)
        if len(region.nodes) > MAX_NODES:
            raise NotCutError("it goes back too far")
        before = set(region.kept)
        _step(region, node, heads)
        for found in region.kept.keys() - before:
            made_by = found.producer()
            if made_by is None:
                raise NotCutError(f"{found.name} is an input of the graph")
            waiting.add(made_by)
    _check_readers(region, value, readers)
    return region


def _check_readers(region: Region, start: ir.Value, readers: set[ir.Node]) -> None:
    inside = {*region.nodes, *readers}
    for value in region.kept:
        if value.is_graph_output() and value is not start:
            raise NotCutError(f"{value.name} is an output of the graph")
        outside = [use.node for use in value.uses() if use.node not in inside]
        if outside:
            raise NotCutError(f"{value.name} is read by {outside[0].name} too")


def _step(region: Region, node: ir.Node, heads: Callable[[ir.Node], Heads]) -> None:
    for output in node.outputs:
        kept = region.kept.get(output)
        product = product_of(output) if kept is not None and kept.axis == -1 else None
        if kept is not None and product is not None:
            _front(region, product, kept)
            return
    region.nodes.append(node)
    kind = (node.domain, node.op_type)
    first = region.kept.get(node.outputs[0])
    if kind in ATTENTIONS:
        _attention(region, node, heads(node), first)
    elif kind in RECURRENCES:
        _recurrence(region, node, heads(node), first)
    elif node.op_type == "Split" and not node.domain:
        _split(region, node)
    elif first is None:
        raise NotCutError(f"{node.name} ({node.op_type}) gives more than one value")
    elif (node.op_type in ONE_BY_ONE and node.domain in ("", MICROSOFT)) or kind == (INTERNAL, "LastToken"):
        _operand(region, node, 0, first)
    elif kind in CONVOLUTIONS:
        _convolution(region, node, first)
    elif node.op_type in PAIRS and not node.domain:
        for index in range(len(node.inputs)):
            _operand(region, node, index, first)
    elif node.op_type in ("Reshape", "Transpose", "Unsqueeze") and not node.domain:
        {"Reshape": _reshape, "Transpose": _transpose, "Unsqueeze": _unsqueeze}[node.op_type](region, node, first)
    elif node.op_type in NORMS and not node.domain and node.attributes.get_int("axis", -1) == -1 and first.axis < -1:
        region.ask(node.inputs[0], first.axis, first.ranges)
    elif node.op_type == "Slice" and not node.domain:
        _own_heads(region, node, heads, first)
    elif node.op_type == "RotaryEmbedding":
        _rotary(region, node, first)
    elif node.op_type == "MatMul" and not node.domain:
        _matmul(region, node, first)
    else:
        raise NotCutError(f"{node.name} ({node.op_type}) needs all channels")


def _front(region: Region, product: Product, kept: Kept) -> None:
    if kept.axis != -1:
        raise NotCutError(f"{product.y.name} is cut along another axis")
    if product not in region.fronts:
        region.fronts.append(product)
        region.edits.append(lambda slicer: product.columns(slicer, kept.ranges))
        region.nodes += product.nodes


def _operand(region: Region, node: ir.Node, index: int, kept: Kept) -> None:
    """An operand of an operator that works element by element: cut as the result, unless it is the same for all."""
    value = node.inputs[index]
    if value is None:
        return
    sizes = value.const_value.shape.numpy() if value.const_value is not None else dims(value)
    if sizes is not None and (len(sizes) < -kept.axis or sizes[kept.axis] == 1):
        return
    if value.const_value is not None:
        region.edits.append(lambda slicer: slicer.use(node, index, kept.axis, kept.ranges))
    else:
        region.ask(value, kept.axis, kept.ranges)


def _split(region: Region, node: ir.Node) -> None:
    found, sizes = [region.kept.get(output) for output in node.outputs], constant(node.inputs[1])
    axis, last = node.attributes.get_int("axis", 0), rank(node.inputs[0])
    if sizes is None or any(each is None for each in found) or axis not in (-1, (last or 0) - 1):
        raise NotCutError(f"{node.name} (Split) needs all channels")
    if found[0] is not None and found[0].axis < -1 and set(found) == {found[0]}:  # within each head
        region.ask(node.inputs[0], found[0].axis, found[0].ranges)
        return
    if any(each is None or each.axis != -1 for each in found):
        raise NotCutError(f"{node.name} (Split) is cut in two ways")
    parts = [each.ranges for each in found if each is not None]
    starts = np.cumsum([0, *sizes[:-1]])
    whole = tuple(part for ranges, start in zip(parts, starts, strict=True) for part in shifted(ranges, int(start)))
    region.ask(node.inputs[0], -1, whole)
    widths = [width(ranges) for ranges in parts]

    region.edits.append(lambda slicer: slicer.sizes(node, 1, np.asarray(widths, np.int64), "split"))


def _reshape(region: Region, node: ir.Node, kept: Kept) -> None:
    """[..., heads, width] <-> [..., heads * width]."""
    target, before, after = constant(node.inputs[1]), dims(node.inputs[0]), dims(node.outputs[0])
    if target is None or before is None or after is None:
        raise NotCutError(f"{node.name} (Reshape) has a shape that is not known")
    *_, heads, size = after if len(after) > len(before) else before
    if not (isinstance(heads, int) and isinstance(size, int)) or abs(len(after) - len(before)) != 1:
        raise NotCutError(f"{node.name} (Reshape) moves channels")
    flat = (before if len(after) > len(before) else after)[-1]
    if flat != heads * size:
        raise NotCutError(f"{node.name} (Reshape) moves channels")
    new = target.copy()
    if len(after) > len(before) and kept.axis == -2:
        own = scaled(kept.ranges, size)
        if region.padding is not None and mixing(node.outputs[0]) and own == (region.padding.cover,):
            own = (region.padding.own,)
            region.edits.append(functools.partial(_pad, region.padding, node))
        region.ask(node.inputs[0], -1, own)
        place, count = -2, width(kept.ranges)
    elif len(after) < len(before) and kept.axis == -1:
        if any(edge % size for part in kept.ranges for edge in (part.start, part.stop)):
            raise NotCutError(f"{node.name} (Reshape) cuts heads")
        region.ask(node.inputs[0], -2, tuple(range(r.start // size, r.stop // size) for r in kept.ranges))
        place, count = -1, width(kept.ranges)
    else:
        raise NotCutError(f"{node.name} (Reshape) moves channels")
    if new[place] > 0:
        new[place] = count

        region.edits.append(lambda slicer: slicer.sizes(node, 1, new, "shape"))
    elif new[place] == 0:
        raise NotCutError(f"{node.name} (Reshape) keeps an axis by its number")


def _transpose(region: Region, node: ir.Node, kept: Kept) -> None:
    order = node.attributes.get_ints("perm", [])
    if not order:
        raise NotCutError(f"{node.name} (Transpose) has no order")
    region.ask(node.inputs[0], order[len(order) + kept.axis] - len(order), kept.ranges)


def _unsqueeze(region: Region, node: ir.Node, kept: Kept) -> None:
    axes, last = constant(node.inputs[1]), rank(node.outputs[0])
    if axes is None or last is None:
        raise NotCutError(f"{node.name} (Unsqueeze) has axes that are not known")
    behind = [axis for axis in axes.reshape(-1) if (axis if axis < 0 else axis - last) > kept.axis]
    region.ask(node.inputs[0], kept.axis + len(behind), kept.ranges)


def _rotary(region: Region, node: ir.Node, kept: Kept) -> None:
    count = node.attributes.get_int("num_heads", 0)
    if kept.axis == -3:
        region.ask(node.inputs[0], -3, kept.ranges)
    elif kept.axis == -1 and count:
        size = (dims(node.inputs[0]) or [0])[-1]
        if not isinstance(size, int) or size % count:
            raise NotCutError(f"{node.name} has heads of unknown width")
        heads = width(kept.ranges) // (size // count)
        region.ask(node.inputs[0], -1, kept.ranges)
        region.edits.append(lambda slicer: node.attributes.add(ir.AttrInt64("num_heads", heads)))
    else:
        raise NotCutError(f"{node.name} rotates all channels")


def _matmul(region: Region, node: ir.Node, kept: Kept) -> None:
    """A constant matrix times columns, which tied heads of one row are: its rows are cut. Or the blocks of a Hadamard
    transform, each times the same matrix."""
    matrix = node.inputs[0]
    if kept.axis == -2 and matrix is not None and matrix.const_value is None and mixing(matrix):
        region.ask(matrix, -2, kept.ranges)
        return
    if matrix is None or matrix.const_value is None or kept.axis != -2 or len(matrix.const_value.shape) != 2:
        raise NotCutError(f"{node.name} (MatMul) needs all channels")
    region.edits.append(lambda slicer: slicer.use(node, 0, 0, kept.ranges))


def _attention(region: Region, node: ir.Node, own: Heads, kept: Kept | None) -> None:
    (heads, keys), (key_size, value_size) = head_counts(node), head_sizes(node)
    queries, cached = (own.projected,), (own.keys,)
    given = own.queries if node.domain == INTERNAL else own.projected
    if kept != Kept(-1, scaled((given,), value_size)) or any(v in region.kept for v in node.outputs[1:]):
        raise NotCutError(f"{node.name} is cut between its heads")
    if node.inputs[KEY] is None:
        key_start, value_start = heads * key_size, (heads + keys) * key_size
        parts = (
            *scaled(queries, key_size),
            *shifted(scaled(cached, key_size), key_start),
            *shifted(scaled(cached, value_size), value_start),
        )
        region.ask(node.inputs[QUERY], -1, parts)
    else:
        region.ask(node.inputs[QUERY], -1, scaled(queries, key_size))
        region.ask(node.inputs[KEY], -1, scaled(cached, key_size))
        region.ask(node.inputs[VALUE], -1, scaled(cached, value_size))
    if node.domain == MICROSOFT:
        for index in (BIAS, SINK)[: max(0, len(node.inputs) - BIAS)]:
            axis = -3 if index == BIAS else -1
            if node.inputs[index] is not None:
                _operand(region, node, index, Kept(axis, queries))

    def edit(slicer: Slicer) -> None:
        node.attributes.add(ir.AttrInt64("num_heads", len(own.projected)))
        node.attributes.add(ir.AttrInt64("kv_num_heads", len(own.keys)))
        cut_cache(slicer, node, own.keys)
        if node.domain == INTERNAL and own.projected != own.queries:
            node.attributes.add(ir.AttrInt64("first_head", own.queries.start - own.projected.start))
            node.attributes.add(ir.AttrInt64("own_heads", len(own.queries)))
            _leave_unread(node, own, key_size)

    region.edits.append(edit)


def _leave_unread(attention: ir.Node, own: Heads, size: int) -> None:
    """Let the Linear in front of an attention not compute query heads that only other ranks read; those at one end of
    what it projects, where there are some at both."""
    made_by = linear(attention.inputs[QUERY])
    if made_by is None or only_user(made_by.outputs[0]) is not attention or made_by.attributes.get("gate"):
        return
    start = own.projected.start
    ends = range(start, own.queries.start), range(own.queries.stop, own.projected.stop)
    unread = max(ends, key=len)
    made_by.attributes.add(ir.AttrInt64("unread", (unread.start - start) * size))
    made_by.attributes.add(ir.AttrInt64("unread_end", (unread.stop - start) * size))


def _own_heads(region: Region, node: ir.Node, heads: Callable[[ir.Node], Heads], kept: Kept) -> None:
    """A Slice behind an attention over all query heads of its key heads, which takes those of the rank."""
    attention = node.inputs[0].producer() if node.inputs[0] is not None else None
    if attention is None or (attention.domain, attention.op_type) not in ATTENTIONS:
        raise NotCutError(f"{node.name} (Slice) needs all channels")
    own, (_, size) = heads(attention), head_sizes(attention)
    if kept != Kept(-1, scaled((own.queries,), size)):
        raise NotCutError(f"{node.name} is cut between its heads")
    region.ask(node.inputs[0], -1, scaled((own.projected,), size))
    first = (own.queries.start - own.projected.start) * size

    def edit(slicer: Slicer) -> None:
        for index, edge in enumerate((first, first + width(kept.ranges)), start=1):
            slicer.sizes(node, index, np.asarray([edge], np.int64), "heads")

    region.edits.append(edit)


def _recurrence(region: Region, node: ir.Node, own: Heads, kept: Kept | None) -> None:
    (heads, keys), (key_size, value_size) = head_counts(node), head_sizes(node)
    values, past = (own.queries,), node.inputs[PAST]
    if kept != Kept(-1, scaled(values, value_size)):
        raise NotCutError(f"{node.name} is cut between its heads")
    if past is None or not past.is_graph_input():
        raise NotCutError(f"{node.name} has no state in a form that is known")
    asked = scaled((own.keys,), key_size)
    if node.inputs[KEY] is None:
        behind = shifted(scaled(values, value_size), 2 * keys * key_size)
        region.ask(node.inputs[QUERY], -1, (*asked, *shifted(asked, keys * key_size), *behind))
    else:
        region.ask(node.inputs[QUERY], -1, asked)
        region.ask(node.inputs[KEY], -1, asked)
        region.ask(node.inputs[VALUE], -1, scaled(values, value_size))
    for index in (DECAY, BETA)[: max(0, len(node.inputs) - DECAY)]:
        sizes = dims(node.inputs[index])
        if sizes is not None and (not isinstance(sizes[-1], int) or sizes[-1] % heads):
            raise NotCutError(f"{node.name} has no number for each head")
        if sizes is not None:
            _operand(region, node, index, Kept(-1, scaled(values, int(sizes[-1] or 0) // heads)))
        elif node.inputs[index] is not None:
            raise NotCutError(f"{node.name} has a decay of unknown width")

    def edit(slicer: Slicer) -> None:
        node.attributes.add(ir.AttrInt64("q_num_heads", len(own.keys)))
        node.attributes.add(ir.AttrInt64("kv_num_heads", len(own.queries)))
        cut_state(past, node.outputs[1], 1, len(own.queries))

    region.edits.append(edit)


def _convolution(region: Region, node: ir.Node, kept: Kept) -> None:
    """A causal convolution of each channel over tokens: x [batch, tokens, channels], weight [channels, 1, width]."""
    past = node.inputs[PAST] if len(node.inputs) > PAST else None
    last = node.domain == INTERNAL or node.attributes.get_int("channels_last", 0) == 1
    if kept.axis != -1 or not last or past is None or not past.is_graph_input():
        raise NotCutError(f"{node.name} is not cut by channels")
    region.ask(node.inputs[0], -1, kept.ranges)

    def edit(slicer: Slicer) -> None:
        slicer.use(node, 1, 0, kept.ranges)
        slicer.use(node, 2, -1, kept.ranges)
        cut_state(past, node.outputs[1], -1, width(kept.ranges))

    region.edits.append(edit)
