"""Cuts a graph into parts that run one after the other, each small enough to be one message with its weights inside."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from satchel.graphs.ir.sweep import sweep

INLINE_LIMIT = 2_000_000_000
"""Bytes of weights in one part: protobuf's messages end at 2**31, and nodes need some of them."""


class CutError(Exception):
    """A graph cannot be cut into parts that are small enough. The message says where it is too large."""


def cut(model: ir.Model, limit: int = INLINE_LIMIT) -> list[ir.Model]:
    """Cut a graph whose shapes are numbers into parts of at most `limit` bytes of weights each, as few as that takes.

    A part ends where few values cross, which is between two layers: there it is the residual stream, and what all
    layers read. A value that crosses is an output of the part that makes it and an input of those that read it, under
    its own name. What depends on weights alone is in each part that reads it.

    Args:
        model: The graph; it is not changed.
        limit: Of each part's weights as a session holds them: quantized values count as what they are folded into.

    Raises:
        CutError: One operator alone reads more.
    """
    return [_part(model, keep) for keep in _parts(model, limit)]


def inline_bytes(model: ir.Model) -> int:
    """Bytes of the weights once a session has folded what depends on constants alone."""
    moving = _moving(model)
    return _sizes([node for node in model.graph if any(v in moving for v in node.outputs)], moving)[-1]


def _parts(model: ir.Model, limit: int) -> list[list[ir.Node]]:
    """The nodes of each part, constant ones left out."""
    moving = _moving(model)
    nodes = [node for node in model.graph if any(v in moving for v in node.outputs)]
    parts, start, crossing = list[list[ir.Node]](), 0, _crossing(nodes)
    while start < len(nodes):
        sizes = _sizes(nodes[start:], moving)
        fitting = [count for count, size in enumerate(sizes, start=1) if size <= limit]
        if not fitting:
            raise CutError(f"{nodes[start].name} alone reads {sizes[0]:,} bytes of weights, and a part has {limit:,}")
        end = start + fitting[-1]
        if end < len(nodes):
            # In the second half, so that a place with few values at the very start does not make one more part.
            half = sizes[fitting[-1] - 1] / 2
            places = [start + n for n in fitting if sizes[n - 1] >= half and crossing[start + n] is not None]
            if not places:
                raise CutError(f"behind {nodes[start].name} there is no place to cut where all shapes are known")
            end = min(places, key=lambda place: (crossing[place] or 0, -place))
        parts.append(nodes[start:end])
        start = end
    return parts


def _moving(model: ir.Model) -> set[ir.Value]:
    """The values that depend on the graph's inputs."""
    moving = set(model.graph.inputs)
    for node in model.graph:
        if any(v in moving for v in node.inputs if v is not None):
            moving.update(node.outputs)
    return moving


def _crossing(nodes: Sequence[ir.Node]) -> list[int | None]:
    """For each place in front of a node: how many values are made before it and read from there on.

    None where one of them cannot be an output of a part: its shape or type is not known, or its node has several
    outputs, of which a compiler may lose those that it hands out alone.
    """
    places = {node: index for index, node in enumerate(nodes)}
    change, barred = [0] * (len(nodes) + 1), [0] * (len(nodes) + 1)
    for index, node in enumerate(nodes):
        for value in node.outputs:
            last = max((places[use.node] for use in value.uses() if use.node in places), default=index)
            fixed = value.shape is not None and value.shape.is_static() and value.dtype is not None
            for counts in (change,) if fixed and len(node.outputs) == 1 else (change, barred):
                counts[index + 1] += 1
                counts[last + 1] -= 1
    counted = zip(itertools.accumulate(change), itertools.accumulate(barred), strict=True)
    return [None if bars else count for count, bars in counted]


def _constants(node: ir.Node, moving: set[ir.Value]) -> Iterable[ir.Value]:
    return (v for v in node.inputs if v is not None and v not in moving)


def _sizes(nodes: Sequence[ir.Node], moving: set[ir.Value]) -> list[int]:
    """Bytes of weights of the first node, the first two, and so on; what several read counts once."""
    seen: set[ir.Value] = set()
    total, sizes = 0, []
    for node in nodes:
        for value in _constants(node, moving):
            if value not in seen:
                seen.add(value)
                total += _nbytes(value)
        sizes.append(total)
    return sizes


def _nbytes(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        raise CutError(f"the size of {value.name} is not known")
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)


def _part(model: ir.Model, keep: Sequence[ir.Node]) -> ir.Model:
    """A copy of the graph with these nodes, and what they need of constant ones, alone."""
    places = {node: index for index, node in enumerate(model.graph)}
    kept = {places[node] for node in keep}
    copy = model.clone()
    moving = _moving(copy)
    nodes = list(copy.graph)
    inside = {node for index, node in enumerate(nodes) if index in kept}
    made = {v for node in inside for v in node.outputs}
    taken: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        if node not in inside:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value not in moving or value in made or value.is_graph_input():
                continue
            if value not in taken:
                taken[value] = ir.Value(name=value.name, shape=value.shape, type=value.type)
            node.replace_input_with(index, taken[value])
    handed = [v for node in nodes if node in inside for v in node.outputs if _is_read_outside(v, inside)]
    outputs = [v for v in copy.graph.outputs if v in made]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend([*outputs, *(v for v in handed if v not in outputs)])
    for node in reversed(nodes):
        if node not in inside and any(v in moving for v in node.outputs):
            copy.graph.remove(node, safe=True)
    sweep(copy.graph)
    used = [v for v in copy.graph.inputs if v.uses()]
    copy.graph.inputs.clear()
    copy.graph.inputs.extend([*used, *taken.values()])
    return copy


def _is_read_outside(value: ir.Value, inside: set[ir.Node]) -> bool:
    return any(use.node not in inside for use in value.uses())
