"""Cuts the caches of keys and values: a rank keeps those of its heads, with their scales where they are in int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.values import constant, dims, producer
from satchel.graphs.shard.slices import NotCutError, Slicer

PAST, SCALES = 3, 12
"""Where attention takes past keys and values, and their scales if it reads them in int8."""
NEXT = {"GatherND": 0, "Mul": 0, "QuantizeLinear": 0, "TensorScatter": 1}
"""What rounds keys and values behind an attention that reads them in float, and the input that takes them."""


RECURRENCE = "LinearAttention"
"""The operator of a recurrence, which has a state [batch, heads of values, key width, value width]."""


def head_counts(node: ir.Node) -> tuple[int, int]:
    """The heads of queries and of keys of an attention; of a recurrence, those of values and of keys, which several of
    values share."""
    names = ("kv_num_heads", "q_num_heads") if node.op_type == RECURRENCE else ("num_heads", "kv_num_heads")
    queries, keys = (node.attributes.get_int(name, 0) for name in names)
    return queries, keys


def head_sizes(node: ir.Node) -> tuple[int, int]:
    """The widths of a head of keys and of one of values.

    Raises:
        NotCutError: They are not known.
    """
    if node.op_type == RECURRENCE:
        match dims(node.inputs[PAST]):
            case [_, _, int(key_size), int(value_size)]:
                return key_size, value_size
        raise NotCutError("the width of its heads is not known")
    found = []
    for part in range(2):
        buffers = (node.inputs[PAST + part], node.outputs[1 + part])
        sizes = [size for buffer in buffers for size in (dims(buffer) or [])[-1:] if isinstance(size, int)]
        if not sizes:
            raise NotCutError("the width of its heads is not known")
        found.append(sizes[0])
    return found[0], found[1]


def cut_cache(slicer: Slicer, node: ir.Node, keys: range) -> None:
    """Let an attention, and what reads and writes its cache, keep these heads of keys and values.

    A cache in int8 is read by the operator itself, with scales [1, heads, 1, width], or expanded in front of it and
    rounded again behind it.

    Raises:
        NotCutError: It is read or written in a form that is not known here.
    """
    for part in range(2):
        past, present = node.inputs[PAST + part], node.outputs[1 + part]
        _narrow(present, len(keys))
        if past is None:
            continue
        _narrow(past, len(keys))
        slicer.use(node, SCALES + part, 1, (keys,))
        if not past.is_graph_input():
            _cut_expanded(slicer, past, keys)
            _cut_rounded(slicer, present, keys)


def cut_state(past: ir.Value | None, present: ir.Value, axis: int, size: int) -> None:
    """Note how many heads or channels a state has."""
    for value in (past, present):
        if value is not None and value.shape is not None:
            sizes = list(value.shape)
            sizes[axis] = size
            value.shape = ir.Shape(sizes)


def _cut_expanded(slicer: Slicer, past: ir.Value, keys: range) -> None:
    """Past keys as floats: Slice -> Cast -> Mul by the scales."""
    scaled = producer(past, "Mul")
    wide = None if scaled is None else producer(scaled.inputs[0], "Cast")
    codes = None if wide is None else producer(wide.inputs[0], "Slice")
    stored = None if codes is None else codes.inputs[0]
    if scaled is None or stored is None or not stored.is_graph_input():
        raise NotCutError(f"{past.name} is no cache in a form that is known")
    slicer.use(scaled, 1, 1, (keys,))
    _narrow(stored, len(keys))


def _cut_rounded(slicer: Slicer, present: ir.Value, keys: range) -> None:
    """New keys among all: GatherND at their positions -> Mul -> QuantizeLinear -> TensorScatter into the cache."""
    value = present
    for kind, place in NEXT.items():
        uses = list(value.uses())
        node = uses[0].node if len(uses) == 1 and uses[0].idx == place else None
        if node is None or node.op_type != kind:
            raise NotCutError(f"{value.name} is not written in a form that is known")
        if kind == "GatherND":
            where = producer(node.inputs[1], "Expand")
            size = None if where is None else constant(where.inputs[1])
            if where is None or size is None:
                raise NotCutError(f"{node.name} has positions that are not known")
            slicer.sizes(where, 1, np.asarray([size[0], len(keys), *size[2:]], np.int64), "shape")
        elif kind == "Mul":
            slicer.use(node, 1, 1, (keys,))
        value = node.outputs[0]
        _narrow(value, len(keys))


def _narrow(value: ir.Value, heads: int) -> None:
    """Note how many heads a value [batch, heads, ...] has."""
    if value.shape is not None and len(value.shape) > 1:
        value.shape = ir.Shape([value.shape[0], heads, *list(value.shape)[2:]])
