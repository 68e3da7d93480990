"""Cuts a graph between its layers into stages, each of which hands the next one what crosses the border."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.sweep import sweep
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, dims, last_dim
from satchel.graphs.shard.adapters import is_optional
from satchel.graphs.shard.layers import CACHED, RESULTS, Border, Layered, width_of
from satchel.runtime.bundle.contract import INPUT_IDS
from satchel.runtime.bundle.shares import ShareError, stages

SKIPPING = {"SkipSimplifiedLayerNormalization": "RMSNormalization", "SkipLayerNormalization": "LayerNormalization"}
"""Operators that add and normalize, and those that only normalize."""
SUM = 3
"""Which of their outputs is the sum."""
FIRST_RMS_OPSET = 23


class StageError(ValueError):
    """A graph cannot be cut into stages. The message says why."""


@dataclasses.dataclass(frozen=True)
class Weighed:
    """A piece of a model that no border divides: following layers, of which most have one, with the bytes of its
    weights and those of them that a token reads."""

    layers: range
    bytes: int
    read: int


def divide(models: Mapping[str, ir.Model], count: int, shares: Sequence[float]) -> list[range]:
    """The layers of each of `count` stages, all graphs alike.

    The embedding is in the first stage, the final norm and the head in the last. No stage has a larger part of all
    bytes, or of those that a token reads, than needed; `shares` are the parts that stages should have, in proportion.

    Raises:
        StageError: There are fewer places to cut than stages.
    """
    pieces = weigh(models)
    if count > len(pieces):
        layers = pieces[-1].layers.stop
        joined = "" if len(pieces) == layers else ", of which some need what only others compute,"
        raise StageError(f"{layers} layers{joined} make {len(pieces)} stages at most, and {count} are asked for")
    try:
        found = stages([piece.bytes for piece in pieces], count, [piece.read for piece in pieces], shares)
    except ShareError as error:
        raise StageError(str(error)) from None
    return [range(pieces[span[0]].layers.start, pieces[span[-1]].layers.stop) for span in found]


def weigh(models: Mapping[str, ir.Model]) -> list[Weighed]:
    """The pieces of a model, which all graphs can be cut between; bytes are those of the first graph.

    The graphs are of no other use then.

    Raises:
        StageError: The graphs have other numbers of layers, or none.
    """
    layered = [Layered(model) for model in models.values()]
    count = layered[0].count if layered else 0
    if count < 1 or any(each.count != count for each in layered):
        raise StageError("its graphs do not show the same layers")
    for model in models.values():
        open_norms(model, range(1, count))
    layered = [Layered(model) for model in models.values()]
    borders: dict[int, Border] = {}
    for layer in range(1, count):
        found = [each.border(layer) for each in layered]
        if found[0] is not None and all(each is not None and each.width == found[0].width for each in found):
            borders[layer] = found[0]
    starts, before, pieces = [0, *borders], frozenset[ir.Node](), []
    for start, end in zip(starts, [*borders, count], strict=True):
        reached = borders[end].before if end in borders else layered[0].bound
        sizes = [_sizes(node, layered[0].bound) for node in reached - before]
        pieces.append(Weighed(range(start, end), sum(s[0] for s in sizes), sum(s[1] for s in sizes)))
        before = reached
    return pieces


def _sizes(node: ir.Node, made: frozenset[ir.Node]) -> tuple[int, int]:
    """The bytes of a node's weights, and of those that a token reads: the experts that it chooses, a row of a table.

    Weights are also those that it reads through nodes which are not among those that are `made` of tokens.
    """
    total, waiting, experts = 0, list(dict.fromkeys(node.inputs)), 1
    while waiting:
        value = waiting.pop()
        if value is None:
            continue
        maker = value.producer()
        if value.const_value is not None:
            total += value.const_value.nbytes
            experts = max(experts, 1, *value.const_value.shape.numpy()[:1])
        elif maker is not None and maker not in made and len(value.uses()) == 1:
            waiting += maker.inputs
    if any(value is not None and value.name == INPUT_IDS for value in node.inputs):
        return total, 0
    if node.op_type in ("MoE", "QMoE"):
        return total, total * node.attributes.get_int("k", 1) // experts
    return total, total


def open_norms(model: ir.Model, starts: Sequence[int]) -> None:
    """Take apart the norms in front of these layers that add two values, so that their sum crosses and not both."""
    layered = Layered(model)
    found: dict[ir.Node, None] = {}
    for start in starts:
        border = layered.border(start)
        crossing = set(border.crossing) if border is not None and len(border.crossing) > 1 else set()
        for node in (use.node for value in crossing for use in value.uses()):
            makers = [value.producer() for value in node.inputs[:2] if value is not None]
            if node.op_type in SKIPPING and not any(layered.is_behind(maker, start) for maker in makers):
                found[node] = None
    for node in found:
        _open(model, node)


def _open(model: ir.Model, node: ir.Node) -> None:
    given = [value for value in node.inputs[2:] if value is not None]
    most = 1 if node.op_type == "SkipSimplifiedLayerNormalization" else 2
    if node.domain != MICROSOFT or len(given) > most or model.graph.opset_imports.get("", 0) < FIRST_RMS_OPSET:
        return
    name, builder = str(node.name), Builder(model, node)
    total = builder.value("Add", node.inputs[:2], f"{name}.sum", node.inputs[0])
    normed = builder.value(
        SKIPPING[node.op_type], [total, *given], f"{name}.opened", node.outputs[0],
        axis=-1, epsilon=node.attributes.get_float("epsilon", 1e-5),
    )  # fmt: skip
    for place, new in ((0, normed), (SUM, total)):
        for use in list(node.outputs[place].uses()) if place < len(node.outputs) else ():
            use.node.replace_input_with(use.idx, new)
    model.graph.remove(node, safe=True)


def cut_stage(model: ir.Model, layers: range) -> None:
    """Cut a graph in place: keep these layers, with the embedding if they are the first, and the head if the last.

    Raises:
        StageError: It cannot be cut there.
    """
    whole = Layered(model)
    starts = [start for start in (layers.start, layers.stop) if 0 < start < whole.count]
    open_norms(model, starts)
    whole = Layered(model)
    borders = {start: whole.border(start) for start in starts}
    entry, out = borders.get(layers.start), borders.get(layers.stop)
    if any(border is None for border in borders.values()):
        raise StageError(f"its layers {layers.start} to {layers.stop - 1} need more of others than hidden states")
    own = (out.before if out is not None else whole.bound) - (entry.before if entry is not None else frozenset())
    results = [value for value in model.graph.outputs if value.name in RESULTS]
    if len(results) != 1 or any(not CACHED.match(str(v.name)) and v not in results for v in model.graph.outputs):
        raise StageError("a graph of it has other results than logits or hidden states")
    names = {str(value.name) for value in model.graph.outputs if value.producer() in own or value in results}
    received = {value: value for value in out.crossing} if out is not None else {}
    if entry is not None:
        received |= _receive(model, entry)
    if out is not None:
        _send(model, [received[value] for value in out.crossing], results[0])
    kept = [value for value in model.graph.outputs if str(value.name) in names]
    model.graph.outputs[:] = kept
    sweep(model.graph)
    of_layers = (v for v in model.graph.inputs if CACHED.match(str(v.name)) or is_optional(v))
    unread = {v for v in of_layers if not v.uses()}
    model.graph.inputs[:] = [v for v in model.graph.inputs if v not in unread]
    left = [node for node in model.graph if node in whole.bound and node not in own]
    if left:
        raise StageError(f"its layers {layers.start} to {layers.stop - 1} need {left[0].name} of others")


def _receive(model: ir.Model, entry: Border) -> dict[ir.Value, ir.Value]:
    """Let the nodes behind a border read what the stage before sends; returns what stands for each value now."""
    ids = next(value for value in model.graph.inputs if value.name == INPUT_IDS)
    readers = {value: [use for use in value.uses() if use.node not in entry.before] for value in entry.crossing}
    builder = Builder(model, next(iter(model.graph)))
    whole = builder.value("Receive", [ids], "stage.received", None, INTERNAL, width=entry.width)
    whole.type, parts = entry.crossing[0].type, [whole]
    widths = [width_of(value) for value in entry.crossing]
    if len(widths) > 1:
        sizes = builder.constant(np.asarray(widths, np.int64), "split." + "_".join(map(str, widths)))
        parts = list(builder.node("Split", [whole, sizes], "stage.parts", outputs=len(widths), axis=2).outputs)
    found = {}
    for index, (value, part) in enumerate(zip(entry.crossing, parts, strict=True)):
        sizes_behind = [size for size in (dims(value) or [])[2:] if isinstance(size, int)]
        if len(sizes_behind) > 1:
            part = builder.value("Reshape", [part, builder.shape(0, 0, *sizes_behind)], f"stage.part{index}")
        part.shape, part.type = value.shape, value.type
        for use in readers[value]:
            use.node.replace_input_with(use.idx, part)
        found[value] = part
    return found


def _send(model: ir.Model, values: Sequence[ir.Value], result: ir.Value) -> None:
    """Send values to the next stage; what does so takes the place of the graph's result."""
    ids, builder, flat = next(v for v in model.graph.inputs if v.name == INPUT_IDS), Builder(model), []
    for index, value in enumerate(values):
        if len(dims(value) or []) > 3:
            value = builder.value("Reshape", [value, builder.shape(0, 0, width_of(value))], f"stage.flat{index}")
        flat.append(value)
    joined = flat[0] if len(flat) == 1 else builder.value("Concat", flat, "stage.joined", axis=2)
    sizes, rows = dims(result), dims(ids)
    if sizes is None or rows is None or len(sizes) != 3 or last_dim(result) is None:
        raise StageError("the shape of its result is not known")
    like = next(
        (v for v in model.graph.inputs if v.dtype == ir.DataType.INT64 and (dims(v) or [])[:1] == sizes[:1]), ids
    )
    sent = builder.value(
        "Send", [joined, like], "stage.sent", result, INTERNAL, width=sizes[2], each=int(sizes[1] == rows[1])
    )
    name, result.name = result.name, f"{result.name}.whole"
    sent.name = name
    model.graph.outputs[list(model.graph.outputs).index(result)] = sent
