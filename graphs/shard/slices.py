"""Parts of weights: what a rank keeps of an initializer, read from the bundle when it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.values import Builder, producer
from satchel.graphs.ir.weights import LazyWeight
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.layouts import file_name

Ranges = tuple[range, ...]
"""Which entries of an axis a rank keeps, in this order."""

DERIVED = frozenset(map(file_name, Layout))
"""Files that no bundle has: a device makes them from the stored weights."""

MARK = "@part"
"""Stands in the names of new initializers until `settle` gives them those of the whole ones."""

KEY = "key"
"""Mark (`meta`) of a part: equal ones are the same bytes."""

EACH_ELEMENT = {"Cast", "Sub", "Identity"}
"""Operators between stored scales and the zero points that graphs make of them."""


class NotCutError(Exception):
    """A layer stays whole on every rank. The message says why."""


def width(ranges: Ranges) -> int:
    """How many entries there are."""
    return sum(map(len, ranges))


def shifted(ranges: Ranges, by: int) -> Ranges:
    """The same entries further back."""
    return tuple(range(part.start + by, part.stop + by) for part in ranges)


def scaled(ranges: Ranges, factor: int) -> Ranges:
    """The channels of groups of `factor`."""
    return tuple(range(part.start * factor, part.stop * factor) for part in ranges)


def taken(array: np.ndarray, axis: int, ranges: Ranges) -> np.ndarray:
    """The entries of an array."""
    parts = [array[(slice(None),) * axis + (slice(part.start, part.stop, part.step),)] for part in ranges]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


class Slicer:
    """Puts parts of initializers into the graph of one rank."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._graph = model.graph
        self._parts: dict[tuple[ir.Value, int, Ranges], ir.Value] = {}

    def use(self, node: ir.Node, index: int, axis: int, ranges: Ranges) -> None:
        """Let the node read a part of a constant input, along one axis; negative ones count from the last.

        Raises:
            NotCutError: The input is not a constant, or the axis has not so many entries.
        """
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return
        node.replace_input_with(index, self.part(value, axis, ranges))

    def sizes(self, node: ir.Node, index: int, array: np.ndarray, kind: str) -> None:
        """Let the node read other sizes, those of a Split or a Reshape."""
        name = f"{kind}." + "_".join(map(str, array.tolist()))
        node.replace_input_with(index, Builder(self.model, node).constant(array, name))

    def part(self, value: ir.Value, axis: int, ranges: Ranges) -> ir.Value:
        """As `use`; also of what the graph makes of constants element by element, whose nodes are made anew."""
        tensor, made_by = value.const_value, value.producer()
        if tensor is None and made_by is not None and made_by.op_type in EACH_ELEMENT:
            return self._made(value, made_by, axis, ranges)
        if tensor is None or value.is_graph_input():
            raise NotCutError(f"{value.name} is not a constant")
        dims = tensor.shape.numpy()
        axis += len(dims) if axis < 0 else 0
        if not 0 <= axis < len(dims) or any(part.stop > dims[axis] for part in ranges):
            raise NotCutError(f"{value.name} {list(dims)} has not so many entries along axis {axis}")
        return self.add(sliced(tensor, axis, ranges), str(value.name))

    def _made(self, value: ir.Value, node: ir.Node, axis: int, ranges: Ranges) -> ir.Value:
        """The part that a node makes, once: others read the whole, or another part."""
        key = (value, axis, ranges)
        if key not in self._parts:
            parts = [None if operand is None else self.part(operand, axis, ranges) for operand in node.inputs]
            name = f"{node.name}.part{len(self._parts)}"
            attributes = {each: attribute.value for each, attribute in node.attributes.items()}
            part = Builder(self.model, node).value(node.op_type, parts, name, domain=node.domain, **attributes)
            part.type = value.type
            self._parts[key] = part
        return self._parts[key]

    def remake(
        self, node: ir.Node, index: int, shape: tuple[int, ...], make: Callable[[np.ndarray], np.ndarray], key: Hashable
    ) -> None:
        """Let the node read what `make` makes of a constant input, of this shape; `key` says what it does.

        Raises:
            NotCutError: The input is not a constant.
        """
        value = node.inputs[index]
        tensor = None if value is None else value.const_value
        if value is None or tensor is None or value.is_graph_input():
            raise NotCutError(f"{node.name} has an input that is not a constant")

        def rows(start: int, stop: int) -> np.ndarray:
            return np.ascontiguousarray(make(tensor.numpy()).reshape(shape)[start:stop])

        part = LazyWeight(str(tensor.name), shape, ir.DataType(tensor.dtype), rows)
        part.meta[KEY] = (*key_of(tensor), key)
        node.replace_input_with(index, self.add(part, str(value.name)))

    def repeated(self, value: ir.Value, ranges: Ranges, block: int, finer: int) -> ir.Value:
        """Scales [groups of `block` inputs, outputs], or zero points, of these inputs in groups of `finer`."""
        starts = [start for part in ranges for start in range(part.start, part.stop, finer)]
        return self.part(value, 0, tuple(range(start // block, start // block + 1) for start in starts))

    def add(self, tensor: LazyWeight, name: str) -> ir.Value:
        """A new initializer for a tensor; one for the same bytes is used again."""
        name = name.partition(MARK)[0]
        for count in range(len(self._graph.initializers) + 1):
            called = f"{name}{MARK}{count}"
            there = self._graph.initializers.get(called)
            if there is None:
                break
            if isinstance(there.const_value, LazyWeight) and there.const_value.meta.get(KEY) == tensor.meta[KEY]:
                return there
        tensor.name = called
        value = ir.Value(name=called, shape=ir.Shape(tensor.dims), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def settle(self) -> None:
        """Give parts the names of the whole initializers, of which nothing is left; further ones get a number."""
        for value in [v for v in self._graph.initializers.values() if MARK in str(v.name)]:
            name, _, count = str(value.name).partition(MARK)
            free = name if name not in self._graph.initializers else f"{name}.part{count}"
            value.name = free
            if isinstance(value.const_value, LazyWeight):
                value.const_value.name = free


def sliced(tensor: ir.TensorProtocol, axis: int, ranges: Ranges) -> LazyWeight:
    """Some entries of a tensor along one axis, read when they are asked for."""
    dims = list(tensor.shape.numpy())
    dims[axis] = width(ranges)
    key = (*key_of(tensor), axis if axis else 0, ranges)

    def rows(start: int, stop: int) -> np.ndarray:
        array = tensor.numpy()
        return np.ascontiguousarray(taken(array, axis, ranges)[start:stop])

    part = LazyWeight(str(tensor.name), dims, ir.DataType(tensor.dtype), rows)
    part.meta[KEY] = key
    return part


def key_of(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    """What names the bytes of a tensor; tensors of other shapes over the same bytes have the same."""
    if isinstance(tensor, LazyWeight):
        return (tensor.meta[KEY],)
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.location), tensor.offset, tensor.length
    return (str(tensor.name), math.prod(tensor.shape.numpy()))


def is_derived(value: ir.Value | None) -> bool:
    """Whether a device makes the bytes of an initializer, so that no bundle has them."""
    tensor = value.const_value if value is not None else None
    return isinstance(tensor, ir.ExternalTensor) and str(tensor.location) in DERIVED


def matrix_size(value: ir.Value | None) -> tuple[int, int, int] | None:
    """(inputs, outputs, group of inputs that share a scale, or 1) of a constant matrix as MatMul reads it, or None."""
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        dims = value.const_value.shape.numpy()
        return (dims[0], dims[1], 1) if len(dims) == 2 and all(dims) else None
    cast, widened = producer(value, "Cast"), producer(value, "DequantizeLinear")
    if cast is not None:
        return matrix_size(cast.inputs[0])
    if widened is None or (size := matrix_size(widened.inputs[0])) is None:
        return None
    return (*size[:2], widened.attributes.get_int("block_size", 0) or 1)


def cut_matrix(slicer: Slicer, node: ir.Node, index: int, axis: int, ranges: Ranges) -> None:
    """Let a node read some inputs (`axis` 0) or outputs (1) of a constant matrix as `matrix_size` takes it."""
    value = node.inputs[index]
    made_by = value.producer() if value is not None else None
    if value is None or made_by is None:
        slicer.use(node, index, axis, ranges)
        return
    value.shape = None
    cut_matrix(slicer, made_by, 0, axis, ranges)
    if made_by.op_type == "Cast":
        return
    block = made_by.attributes.get_int("block_size", 0)
    if axis == 1:
        for place in (1, 2)[: len(made_by.inputs) - 1]:
            slicer.use(made_by, place, -1, ranges)
    elif block:
        finer = common_block(block, ranges)
        if stored_rank(made_by.inputs[1]) != 2:
            raise NotCutError(f"{made_by.name} has scales of another shape")
        for place in (1, 2)[: len(made_by.inputs) - 1]:
            operand = made_by.inputs[place]
            if operand is not None:
                made_by.replace_input_with(place, slicer.repeated(operand, ranges, block, finer))
        made_by.attributes.add(ir.AttrInt64("block_size", finer))


def stored_rank(value: ir.Value | None) -> int:
    """The number of axes of a constant, or of one that a Cast widens; 0 of any other value."""
    while (cast := producer(value, "Cast")) is not None:
        value = cast.inputs[0]
    return 0 if value is None or value.const_value is None else len(value.const_value.shape)


def common_block(block: int, ranges: Ranges) -> int:
    """The largest group that divides `block` and begins and ends where the ranges do: in such groups, with the scales
    repeated, weights are the same numbers.

    Raises:
        NotCutError: It is smaller than kernels take.
    """
    finer = math.gcd(block, *(edge for part in ranges for edge in (part.start, part.stop)))
    if finer < min(block, SMALLEST):
        raise NotCutError(f"ranges that end within groups of {block} need groups of {finer}")
    return finer


SMALLEST = 16
"""The smallest group of inputs with one scale that all kernels take."""
