"""What adapters that are kept apart add to linear layers: x @ A @ B + bias, and gains. It is cut as the layer is.

A, B, biases and gains are optional inputs of the graph. Their tensors lie in files of their own, so that an input is
only marked with what a rank keeps of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.values import constant, dims, last_dim, producer, replace
from satchel.graphs.shard.slices import NotCutError, Ranges, Slicer, shifted, width

KEPT = "kept"
"""Mark (`meta`) of an optional input: the axis along which it is cut, and what the rank keeps of it."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What is added to neighboring outputs, of one layer of the checkpoint: MatMul by A, MatMul by B, Add of a bias."""

    first: ir.Node
    second: ir.Node
    biased: ir.Node | None
    outputs: int

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes."""
        return (self.first, self.second) if self.biased is None else (self.first, self.second, self.biased)


@dataclasses.dataclass(frozen=True)
class Added:
    """What adapters add to a linear layer's result: one part after another along the last axis."""

    parts: tuple[Part, ...]
    nodes: tuple[ir.Node, ...]

    @property
    def by_input(self) -> bool:
        """Whether `rows` can be called."""
        return len(self.parts) == 1 or all(part.biased is None for part in self.parts)

    def columns(self, slicer: Slicer, ranges: Ranges) -> None:
        """Keep some outputs. Raises NotCutError."""
        for part, own in zip(self.parts, _shared_out(ranges, [part.outputs for part in self.parts]), strict=True):
            _cut(slicer, part.second, 1, own)
            if part.biased is not None:
                _cut(slicer, part.biased, 1, own)

    def rows(self, slicer: Slicer, ranges: Ranges) -> list[ir.Value]:
        """Keep some inputs; returns the biases, which are to be added to the sum over all ranks."""
        biases = []
        for part in self.parts:
            _cut(slicer, part.first, 0, ranges)
            if part.biased is not None:
                biases.append(part.biased.inputs[1])
                replace(part.biased.outputs[0], part.second.outputs[0])
        return [bias for bias in biases if bias is not None]


@dataclasses.dataclass(frozen=True)
class Gains:
    """Factors of a linear layer's outputs: one piece after another along the last axis, given or ones."""

    multiplied: ir.Node
    pieces: tuple[tuple[ir.Node, int, int], ...]
    """A node, which of its inputs the piece is, and how many outputs."""
    nodes: tuple[ir.Node, ...]

    def columns(self, slicer: Slicer, ranges: Ranges) -> None:
        """Keep some outputs. Raises NotCutError."""
        for (node, index, _), own in zip(self.pieces, _shared_out(ranges, [p[2] for p in self.pieces]), strict=True):
            made_by = producer(node.inputs[index], "Expand")
            if made_by is None:
                slicer.use(node, index, -1, own)
            else:
                _cut(slicer, made_by, 1, own, index=0)
                slicer.sizes(made_by, 1, np.asarray([1, width(own)], np.int64), "shape")


def is_optional(value: ir.Value | None) -> bool:
    """Whether a value is an optional input of a graph, for adapters."""
    return value is not None and value.is_graph_input() and value.const_value is not None


def kept(model: ir.Model) -> dict[str, tuple[int, Ranges]]:
    """What a rank keeps of those optional inputs of a graph that are cut: (axis, entries)."""
    return {str(value.name): value.meta[KEPT] for value in model.graph.inputs if KEPT in value.meta}


def kept_differently(models: Sequence[ir.Model]) -> set[str]:
    """The optional inputs of which these graphs keep different parts. One file has an adapter's tensors for all."""
    cuts = [kept(model) for model in models]
    return {name for each in cuts for name in each if any(other.get(name) != each[name] for other in cuts)}


def added_by(value: ir.Value | None, x: ir.Value | None) -> Added | None:
    """What `value` is made of, if it is what adapters add to a linear layer of `x`; else None."""
    joined = producer(value, "Concat")
    parts = [_part(each, x) for each in ([value] if joined is None else joined.inputs)]
    found = tuple(part for part in parts if part is not None)
    if len(found) < len(parts) or not any(is_optional(node.inputs[1]) for part in found for node in part.nodes):
        return None
    return Added(found, tuple(node for part in found for node in part.nodes) + (() if joined is None else (joined,)))


def _part(value: ir.Value | None, x: ir.Value | None) -> Part | None:
    biased = producer(value, "Add")
    second = producer(value if biased is None else biased.inputs[0], "MatMul")
    first = None if second is None else producer(second.inputs[0], "MatMul")
    if second is None or first is None or first.inputs[0] is not x or x is None:
        return None
    operands = [node.inputs[1] for node in (first, second, *(() if biased is None else (biased,)))]
    nothing = constant(second.inputs[1])
    right = all(map(is_optional, operands[:2])) or (nothing is not None and not len(nothing))
    outputs = last_dim(second.inputs[1]) if nothing is None else nothing.shape[-1]
    if not right or outputs is None or not all(map(is_optional, operands[2:])):
        return None
    return Part(first, second, biased, outputs)


def gained_by(node: ir.Node | None) -> Gains | None:
    """The factors that a Mul takes of adapters, or None."""
    if node is None or (node.domain, node.op_type) != ("", "Mul"):
        return None
    joined = producer(node.inputs[1], "Concat")
    reader, indices = (node, range(1, 2)) if joined is None else (joined, range(len(joined.inputs)))
    pieces, nodes = [], [node] if joined is None else [node, joined]
    for index in indices:
        value = reader.inputs[index]
        made_by = producer(value, "Expand")
        given = made_by is not None and is_optional(made_by.inputs[0])
        sizes = constant(made_by.inputs[1]) if made_by is not None and given else None
        ones = constant(value)
        size = sizes[-1] if sizes is not None else ones.shape[-1] if ones is not None and ones.ndim == 2 else None
        if size is None:
            return None
        nodes += [made_by] if made_by is not None else []
        pieces.append((reader, index, int(size)))
    return Gains(node, tuple(pieces), tuple(nodes)) if any(n.op_type == "Expand" for n in nodes) else None


def _shared_out(ranges: Ranges, sizes: list[int]) -> list[Ranges]:
    """The entries of each part of an axis, counted from the part's first."""
    if any(one.stop > other.start for one, other in itertools.pairwise(ranges)):
        raise NotCutError("its outputs are in another order")
    found, start = [], 0
    for size in sizes:
        inside = (range(max(own.start, start), min(own.stop, start + size)) for own in ranges)
        found.append(shifted(tuple(own for own in inside if own), -start))
        start += size
    if not all(found):
        raise NotCutError("a rank has no outputs of a layer that adapters change")
    return found


def _cut(slicer: Slicer, node: ir.Node, axis: int, ranges: Ranges, index: int = 1) -> None:
    value = node.inputs[index]
    if value is None or not is_optional(value):
        slicer.use(node, index, axis, ranges)
        return
    mark = (axis, ranges)
    if value.meta.setdefault(KEPT, mark) != mark:
        raise NotCutError(f"{value.name} is needed in two ways")
    sizes = dims(value) or []
    if isinstance(sizes[axis], int):  # of A and B; biases and gains have a default for any number of outputs
        sizes[axis] = width(ranges)
        default = [size if isinstance(size, int) else 0 for size in sizes]
        value.shape, value.const_value = ir.Shape(sizes), ir.Tensor(np.zeros(default, np.float32), name=value.name)
