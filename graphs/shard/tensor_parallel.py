"""Cuts a graph for ranks that share every layer: each keeps heads of attention, channels of MLPs, and tokens of the
vocabulary, and the ranks add what they have computed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.sweep import sweep
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, dims, nodes, producer, replace
from satchel.graphs.shard.adapters import is_optional
from satchel.graphs.shard.caches import RECURRENCE, head_counts, head_sizes
from satchel.graphs.shard.collectives import DOMAINS, Place, add_sum, fold_gathers, gather, gather_logits
from satchel.graphs.shard.experts import cut_experts
from satchel.graphs.shard.pipeline import SKIPPING
from satchel.graphs.shard.products import Product, add_after, product_of, take_residual
from satchel.graphs.shard.region import Padding, Region, attention_behind, mixing, mixing_behind, trace, unmixed
from satchel.graphs.shard.slices import NotCutError, Ranges, Slicer, common_block, width
from satchel.runtime.bundle.contract import LOGITS
from satchel.runtime.bundle.layouts import PANEL
from satchel.runtime.bundle.shares import Heads, ShareError, heads, spans


class HalfCutError(Exception):
    """A graph was changed in part when something could not be cut: it is of no use."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """What was done to a graph: names of layers that were cut, and of those that every rank has whole, with reasons."""

    layers: tuple[str, ...]
    whole: dict[str, str]


def cut_tensors(model: ir.Model, place: Place, uncut: Collection[str] = ()) -> Cut:
    """Cut a graph in place for one rank. Layers that read optional inputs of these names stay whole."""
    slicer, done, whole, fronts = Slicer(model), list[str](), dict[str, str](), set[ir.Node]()
    _slice_heads(model, place)
    cut_product = _cut_by_output if place.exact else _cut_by_input
    for product in reversed(_products(model)):
        if product.y.is_graph_output() or mixing(product.x) or fronts & set(product.nodes):
            continue
        if product.rows is None and not place.exact:
            continue
        try:
            region = cut_product(model, slicer, product, place, uncut)
            fronts.update(node for front in region.fronts for node in front.nodes)
            done.append(str(product.y.name))
        except (NotCutError, ShareError) as error:
            whole[str(product.y.name)] = str(error)
    for node in (*nodes(model, "MoE", MICROSOFT), *nodes(model, "QMoE", MICROSOFT)):
        try:
            done.append(cut_experts(model, slicer, node, place.shares, place.rank))
            _sum_up(model, node.outputs[0], [], place)
        except (NotCutError, ShareError) as error:
            whole[str(node.name)] = str(error)
    for cut_one in (_cut_head, _cut_embedding):
        try:
            done += cut_one(model, slicer, place)
        except (NotCutError, ShareError) as error:
            whole[cut_one.__name__.removeprefix("_cut_")] = str(error)
    _join_sums(model, DOMAINS[place.collectives])
    fold_gathers(model)
    sweep(model.graph)
    slicer.settle()
    return Cut(tuple(done), whole)


def _slice_heads(model: ir.Model, place: Place) -> None:
    """Put a Slice behind attentions whose key heads have query heads of several ranks: ONNX Runtime's operator wants as
    many query heads for each key head, of which the Slice will keep those of the rank."""
    for node in nodes(model, "GroupQueryAttention", MICROSOFT):
        with contextlib.suppress(ShareError):
            if all(each.projected == each.queries for each in heads(*head_counts(node), place.shares)):
                continue
            y, builder = node.outputs[0], Builder(model, _next(node))
            ends = [
                builder.constant(np.asarray([end], np.int64), f"heads.{end}") for end in (0, np.iinfo(np.int64).max)
            ]
            axis, readers = builder.constant(np.asarray([-1], np.int64), "axis.last"), list(y.uses())
            own = builder.value("Slice", [y, *ends, axis], f"{y.name}.own", y)
            for use in readers:
                use.node.replace_input_with(use.idx, own)


def rounds(model: ir.Model) -> bool:
    """Whether linear layers of a graph have quantized weights. Their inputs are rounded, too: then another order of a
    sum, which moves a number by a millionth, may move it by a whole step, and many such steps change a text."""
    return any(product.quantized for product in _products(model))


def _products(model: ir.Model) -> list[Product]:
    return [found for node in list(model.graph) for v in node.outputs if (found := product_of(v)) is not None]


def _check_adapters(product: Product, region: Region, uncut: Collection[str]) -> None:
    """Raise NotCutError where one of these layers reads one of these optional inputs."""
    for node in (node for layer in (product, *region.fronts) for node in layer.nodes):
        for value in node.inputs:
            if value is not None and value.name in uncut:
                raise NotCutError(f"{value.name} cannot be cut in all graphs alike")


def _cut_by_output(model: ir.Model, slicer: Slicer, product: Product, place: Place, uncut: Collection[str]) -> Region:
    """Cut a linear layer and those in front of it by output. Ranks hand each other what they have of its input and of
    its result: each number is computed by one rank, from the same numbers in the same order as in one process.

    Raises:
        NotCutError: What is in front needs all channels, or there are fewer channels than ranks.
        ShareError: There are fewer heads than ranks.
    """
    x, found = unmixed(product.x), functools.partial(_heads, place=place, unit=1)
    attention, readers = attention_behind(x), {use.node for use in x.uses()}
    inputs = _even(product.inputs, place) if attention is None else _head_spans(attention, product, place)
    outputs = _even(product.outputs, place) if attention is None else _beside(attention, product, place)
    region = trace(x, -1, (inputs[place.rank],), found, readers)
    if not region.fronts:
        raise NotCutError("no linear layer is in front of it")
    _check_adapters(product, region, uncut)
    try:
        for edit in region.edits:
            edit(slicer)
        residual = take_residual(product)
        product.columns(slicer, (outputs[place.rank],))
    except NotCutError as error:
        raise HalfCutError(f"{product.y.name}: {error}") from None
    _forget_shapes(region, product)
    sizes = product.y.shape
    if sizes is not None:
        product.y.shape = ir.Shape([*list(sizes)[:-1], len(outputs[place.rank])])
    _join(model, x, inputs)
    _join(model, product.y, outputs, residual)
    return region


def _join(model: ir.Model, own: ir.Value, parts: Sequence[range], residual: ir.Value | None = None) -> None:
    """Let the readers of a value read it of all ranks, with `residual` added."""
    node = own.producer()
    if node is None:
        raise NotCutError(f"{own.name} is an input of the graph")
    made_by = gather(Builder(model, _next(node)), own, parts, f"{own.name}.joined", residual)
    for use in list(own.uses()):
        if use.node is not made_by:
            use.node.replace_input_with(use.idx, made_by.outputs[0])


def _even(channels: int, place: Place) -> list[range]:
    """The channels of each rank: whole panels of weights, if there is one for each."""
    for unit in (math.gcd(channels, PANEL), 1):
        parts = spans(channels, place.shares, unit)
        if all(parts):
            return parts
    raise NotCutError(f"{channels} channels are fewer than ranks")


def _beside(attention: ir.Node, product: Product, place: Place) -> list[range]:
    """The outputs of the layer behind an attention: ranks with fewer heads get more, so that each reads its share of
    the weights of both; as many as `_even` gives where heads differ by more than that layer can make up for."""
    each = [_heads(attention, dataclasses.replace(place, rank=rank), unit=1) for rank in range(len(place.shares))]
    size, hidden = product.inputs // head_counts(attention)[0], product.outputs
    heads = [(len(own.queries) + 2 * len(own.keys)) * size * hidden for own in each]
    total, shares = sum(heads) + product.inputs * hidden, sum(place.shares)
    weights = [total * share / shares - own for share, own in zip(place.shares, heads, strict=True)]
    if min(weights) <= 0 or hidden % PANEL:
        return _even(hidden, place)
    parts = spans(hidden, weights, PANEL)
    return parts if all(parts) else _even(hidden, place)


def _cut_by_input(model: ir.Model, slicer: Slicer, product: Product, place: Place, uncut: Collection[str]) -> Region:
    """Cut a linear layer by input, and those in front of it by output. Ranks add what they have of its result.

    Raises:
        NotCutError: What is in front needs all channels.
        ShareError: There are fewer heads than ranks.
    """
    ranges, padding, found = _own_channels(product, place)
    inside = product.must == 1  # of a Hadamard transform that the layer does itself, its input is filled up
    asked = (padding.own,) if padding is not None and not inside else ranges
    region = trace(product.x, -1, asked, found, set(product.nodes), padding)
    if not region.fronts:
        raise NotCutError("no linear layer is in front of it")
    _check_adapters(product, region, uncut)
    if not width(ranges):
        _leave_out(model, product, region, place)
        return region
    try:
        for edit in region.edits:
            edit(slicer)
        if padding is not None and not inside:
            padding.pad(slicer, product.nodes[0])
        after = product.rows(slicer, ranges) if product.rows is not None else []
    except NotCutError as error:
        raise HalfCutError(f"{product.y.name}: {error}") from None
    _forget_shapes(region, product)
    _sum_up(model, product.y, after, place)
    return region


def _own_channels(product: Product, place: Place) -> tuple[Ranges, Padding | None, Callable[[ir.Node], Heads]]:
    """The inputs of a linear layer that a rank keeps, how they are filled up, and which heads of an attention they are.

    They end where groups of quantized weights end, if each rank gets some so. Otherwise groups are made smaller. Where
    a Hadamard transform mixes the inputs in blocks, a rank has all weights of the blocks in which its inputs lie, and
    zeros stand for those of others: the transform is linear, and so the sum over ranks is the same.

    Raises:
        ShareError: There are fewer heads than ranks.
    """
    attention, block = attention_behind(product.x), max(product.must, mixing_behind(product.x))
    found = functools.partial(_heads, place=place, unit=product.unit)
    if block > 1:
        whole = math.lcm(block, product.unit)
        parts = spans(product.inputs, place.shares, math.gcd(product.inputs, FINE))
        if attention is not None or product.inputs % whole or not all(parts):
            raise NotCutError("its input is mixed in blocks")
        own = parts[place.rank]
        cover = range(own.start // whole * whole, -(-own.stop // whole) * whole)
        return (cover,), Padding(own, cover) if own != cover else None, found
    for unit in dict.fromkeys((product.unit, 1)):
        found = functools.partial(_heads, place=place, unit=unit)
        with contextlib.suppress(*([] if unit == 1 else [ShareError])):
            if attention is not None:
                parts = _head_spans(attention, product, place, unit)
            else:
                parts = spans(product.inputs, place.shares, unit)
            if all(parts) or unit == 1:
                common_block(product.unit, tuple(parts))  # of all ranks, so that all decide alike
                return (parts[place.rank],), None, found
    raise ShareError(f"{product.inputs} channels cannot be divided")


def _head_spans(attention: ir.Node, product: Product, place: Place, unit: int = 1) -> list[range]:
    """The inputs of a linear layer behind an attention that are each rank's heads."""
    each = [_heads(attention, dataclasses.replace(place, rank=rank), unit) for rank in range(len(place.shares))]
    size = product.inputs // head_counts(attention)[0]
    return [range(own.queries.start * size, own.queries.stop * size) for own in each]


FINE = 64
"""Channels that stay together where nothing else says how many should: kernels take whole cache lines and panels."""


def _heads(node: ir.Node, place: Place, unit: int) -> Heads:
    (count, keys), (_, size) = head_counts(node), head_sizes(node)
    together = next(heads for heads in range(1, unit + 1) if heads * size % unit == 0)
    whole_groups = node.op_type == RECURRENCE
    return heads(count, keys, place.shares, together, whole_groups)[place.rank]


def _forget_shapes(region: Region, product: Product) -> None:
    for value, kept in region.kept.items():
        if value.shape is not None and len(value.shape) >= -kept.axis:
            sizes = list(value.shape)
            sizes[kept.axis] = width(kept.ranges)
            value.shape = ir.Shape(sizes)
    inner = {product.y}
    for node in (*product.nodes, *(node for front in region.fronts for node in front.nodes)):
        for value in node.outputs:
            if value not in region.kept and value not in inner and not value.is_graph_output():
                value.shape = None


def _sum_up(model: ir.Model, y: ir.Value, after: list[ir.Value], place: Place) -> None:
    """Let the readers of `y` read its sum over all ranks."""
    node = y.producer()
    if node is None:
        raise NotCutError(f"{y.name} is an input of the graph")
    following = _next(node)
    made_by = add_sum(Builder(model, following), y, f"{y.name}.sum", place)
    summed = made_by.outputs[0]
    result = summed if following is None else add_after(model, summed, after, following)
    for use in list(y.uses()):
        if use.node is not made_by:
            use.node.replace_input_with(use.idx, result)


def _next(node: ir.Node) -> ir.Node | None:
    graph = node.graph
    if graph is None:
        return None
    listed = list(graph)
    place = listed.index(node) + 1
    return listed[place] if place < len(listed) else None


def _leave_out(model: ir.Model, product: Product, region: Region, place: Place) -> None:
    """This rank has no channels of the layer: it adds zeros."""
    like = next((f.x for f in region.fronts if (dims(f.x) or [0])[-1] == product.outputs), None)
    node = product.y.producer()
    adapted = any(is_optional(value) for each in product.nodes for value in each.inputs)
    if like is None or node is None or adapted:
        raise NotCutError("there are fewer units of channels than ranks")
    after = [v for v in node.inputs[4:6] if v is not None] if node.domain == INTERNAL else []
    nothing = Builder(model, node).value("Sub", [like, like], f"{product.y.name}.nothing", product.y)
    replace(product.y, nothing)
    _sum_up(model, nothing, after, place)


def _join_sums(model: ir.Model, domain: str) -> None:
    """Reduce once where the results of two layers are added: x + sum(a) + sum(b) = x + sum(a + b)."""
    own_sum = functools.partial(_own, domain=domain, op_type="AllReduce")
    skipping = [node for kind in SKIPPING for node in nodes(model, kind, MICROSOFT)]  # they add their first two inputs
    for add in [*nodes(model, "Add"), *skipping]:
        sums = [own_sum(value) for value in add.inputs[:2]]
        if sums[0] is not None and sums[1] is not None and not add.domain:
            replace(add.outputs[0], _merge(model, sums[0], sums[1], add))
            continue
        place = next((i for i, found in enumerate(sums) if found is not None), None)
        inner = None if place is None else _own(add.inputs[1 - place], "", "Add")
        inner_sums = [] if inner is None else [own_sum(value) for value in inner.inputs]
        beside = next((i for i, found in enumerate(inner_sums) if found is not None), None)
        if place is None or inner is None or beside is None:
            continue
        first, second = inner_sums[beside], sums[place]
        if first is not None and second is not None:
            rest = inner.inputs[1 - beside]
            _merge(model, first, second, add)
            add.replace_input_with(1 - place, rest)


def _own(value: ir.Value | None, domain: str, op_type: str) -> ir.Node | None:
    """The node that makes a value for one reader, if it is of this operator."""
    node = producer(value, op_type, domain)
    return node if value is not None and len(value.uses()) == 1 and not value.is_graph_output() else None


def _merge(model: ir.Model, first: ir.Node, second: ir.Node, at: ir.Node) -> ir.Value:
    """Let the readers of `second` read the sum of what both sum, made in front of `at`."""
    builder = Builder(model, at)
    both = builder.value("Add", [first.inputs[0], second.inputs[0]], f"{second.name}.both", second.outputs[0])
    new = builder.value("AllReduce", [both], f"{second.name}.joint", second.outputs[0], second.domain)
    new.producer().attributes.update(second.attributes)  # type: ignore[union-attr]
    replace(second.outputs[0], new)
    return new


def _cut_head(model: ir.Model, slicer: Slicer, place: Place) -> list[str]:
    """Cut the head by tokens of the vocabulary, and gather the logits behind it."""
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    size = (dims(logits) or [0])[-1]
    if logits is None or not isinstance(size, int) or producer(logits, "Send", INTERNAL) is not None:
        return []
    parts = _even(size, place)
    own: Ranges = (parts[place.rank],)
    readers = list(logits.uses())
    inside = {use.node for use in readers}  # they will read all logits
    region = trace(logits, -1, own, functools.partial(_heads, place=place, unit=1), inside)
    for edit in region.edits:
        edit(slicer)
    shape, kind = logits.shape, logits.type
    made_by = logits.producer()
    whole = gather_logits(Builder(model, None if made_by is None else _next(made_by)), logits, parts, place)
    for use in readers:
        use.node.replace_input_with(use.idx, whole)
    for value, kept in region.kept.items():
        if value.shape is not None:
            sizes = list(value.shape)
            sizes[kept.axis] = width(kept.ranges)
            value.shape = ir.Shape(sizes)
    logits.name, whole.name = f"{LOGITS}.part", LOGITS
    whole.shape, whole.type = shape, kind
    model.graph.outputs[list(model.graph.outputs).index(logits)] = whole
    return [LOGITS]


def _cut_embedding(model: ir.Model, slicer: Slicer, place: Place) -> list[str]:
    """Cut the table of embeddings by tokens: a rank adds zeros for those that it does not have."""
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    for node in [use.node for use in ids.uses() if use.idx == 1]:
        table = node.inputs[0]
        quantized = (node.domain, node.op_type) == (MICROSOFT, "GatherBlockQuantized")
        if not quantized and (node.domain, node.op_type) != ("", "Gather"):
            continue
        if table is None or table.const_value is None or len(table.const_value.shape) != 2:
            continue
        count = table.const_value.shape.numpy()[0]
        own = _even(count, place)[place.rank]
        for index in (0, 2, 3)[: 3 if quantized else 1]:
            if index < len(node.inputs):
                slicer.use(node, index, 0, (own,))
        before = Builder(model, node)
        name = f"{node.outputs[0].name}.own"
        first = before.constant(np.asarray(own.start, np.int64), f"embedding.{own.start}")
        last = before.constant(np.asarray(len(own) - 1, np.int64), f"embedding.last_{len(own) - 1}")
        zero = before.constant(np.asarray(0, np.int64), "embedding.zero")
        moved = before.value("Sub", [ids, first], f"{name}.ids", ids)
        near = before.value("Clip", [moved, zero, last], f"{name}.near", ids)
        beyond = before.value("Sub", [moved, near], f"{name}.beyond", ids)
        elsewhere = before.value("Cast", [beyond], f"{name}.elsewhere", ids, to=ir.DataType.BOOL)  # not 0
        axis = before.constant(np.asarray([-1], np.int64), "axis.last")
        mask = before.value("Unsqueeze", [elsewhere, axis], f"{name}.mask")
        elsewhere.type = mask.type = ir.TensorType(ir.DataType.BOOL)
        node.replace_input_with(1, near)
        following = Builder(model, _next(node))
        looked_up = node.outputs[0]
        kind = (looked_up.dtype or ir.DataType.FLOAT).numpy()
        nothing = following.constant(np.asarray(0, kind), "embedding.nothing")
        readers = list(looked_up.uses())
        chosen = following.value("Where", [mask, nothing, looked_up], name, looked_up)
        for use in readers:
            use.node.replace_input_with(use.idx, chosen)
        _sum_up(model, chosen, [], dataclasses.replace(place, wire=32))
        return [str(looked_up.name)]
    return []


def check_alike(cuts: Sequence[Cut]) -> None:
    """Check that all ranks cut the same layers.

    Raises:
        NotCutError: They do not.
    """
    for rank, found in enumerate(cuts):
        differing = set(found.layers) ^ set(cuts[0].layers)
        if differing:
            reason = next((c.whole[name] for c in cuts for name in differing if name in c.whole), "")
            raise NotCutError(f"{sorted(differing)[0]} is cut on some ranks only (rank {rank}): {reason}")
