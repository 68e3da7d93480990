"""How many bytes a decode step has to read: the weights that it multiplies by, and the KV cache so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from satchel.runtime.bundle import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.manifest import CacheSpec
from satchel.runtime.onnx_wire import ENTRY_KEY, ENTRY_VALUE, GRAPH_INITIALIZER, MODEL_GRAPH, fields, varint
from satchel.runtime.onnx_wire import TENSOR_EXTERNAL_DATA as EXTERNAL

# Field numbers of onnx.proto3.
GRAPH_NODE = 1
NODE_INPUT, NODE_OPERATOR, NODE_ATTRIBUTE = 1, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_INT = 1, 3
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME = 1, 2, 8
TYPE_FLOAT16 = 10

# These take a row or a position out of a table: of an embedding or of rotary angles.
LOOKED_UP = ("Gather", "GatherND", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")
# These read `k` of the experts that their weights [experts, ...] hold.
EXPERTS = ("MoE", "QMoE")
FLOAT16_EXPANDED = 2
"""Float16 weights are float32 in memory: they are expanded at load."""


@dataclass
class _Tensor:
    """An initializer in weights.bin: its place there, so that one that has several names counts once."""

    name: str = ""
    dims: list[int] = field(default_factory=list)
    kind: int = 0
    place: dict[str, str] = field(default_factory=dict)


@dataclass
class _Node:
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    attributes: dict[str, int] = field(default_factory=dict)


def weight_bytes(bundle: Bundle, rows: int = 1) -> int:
    """The bytes of weights.bin that one decode step of `rows` sequences multiplies by.

    Tables that are only looked up are left out; a table that is the head's matrix as well counts once. Float16 weights
    count as the float32 that they are in memory. Of experts, as many count as the rows can choose at most. Raises
    BundleError when the decode graph cannot be read.
    """
    path = bundle.graph_path("decode")
    try:
        tensors, nodes = _read(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read ({error}): export the bundle again") from None
    read: dict[tuple[str, str], float] = {}
    for node in nodes:
        for name in node.inputs:
            tensor = tensors.get(name)
            if tensor is None or node.operator in LOOKED_UP:
                continue
            key = tensor.place.get("location", ""), tensor.place.get("offset", "0")
            size = int(tensor.place.get("length", "0")) * _factor(node, tensor, rows)
            read[key] = max(read.get(key, 0), size)
    return round(sum(read.values()))


def cache_bytes(spec: CacheSpec, positions: float) -> float:
    """The bytes of keys and values that `positions` positions of one sequence take."""
    widths = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in spec.layers)
    return positions * widths * np.dtype(spec.dtype).itemsize


def _factor(node: _Node, tensor: _Tensor, rows: int) -> float:
    if node.operator in EXPERTS and tensor.dims:
        return min(1.0, node.attributes.get("k", 1) * rows / tensor.dims[0])
    return FLOAT16_EXPANDED if node.operator == "Cast" and tensor.kind == TYPE_FLOAT16 else 1.0


def _read(model: bytes) -> tuple[dict[str, _Tensor], list[_Node]]:
    """The main graph's initializers in other files, by name, and its nodes. Raises ValueError."""
    tensors, nodes = {}, []
    for number, graph, _ in fields(model):
        if number != MODEL_GRAPH:
            continue
        for kind, body, _ in fields(graph):
            if kind == GRAPH_NODE:
                nodes.append(_node(body))
            elif kind == GRAPH_INITIALIZER:
                tensor = _tensor(body)
                if tensor.place:
                    tensors[tensor.name] = tensor
    return tensors, nodes


def _node(message: bytes) -> _Node:
    node = _Node()
    for number, content, _ in fields(message):
        if number == NODE_INPUT:
            node.inputs.append(content.decode())
        elif number == NODE_OPERATOR:
            node.operator = content.decode()
        elif number == NODE_ATTRIBUTE:
            values = {part: (inner, raw) for part, inner, raw in fields(content)}
            if ATTRIBUTE_INT in values:
                node.attributes[values[ATTRIBUTE_NAME][0].decode()] = next(_numbers(*values[ATTRIBUTE_INT]))
    return node


def _tensor(message: bytes) -> _Tensor:
    tensor = _Tensor()
    for number, content, raw in fields(message):
        if number == TENSOR_DIMS:
            tensor.dims.extend(_numbers(content, raw))
        elif number == TENSOR_TYPE:
            tensor.kind = next(_numbers(content, raw))
        elif number == TENSOR_NAME:
            tensor.name = content.decode()
        elif number == EXTERNAL:
            entry = {part: inner.decode() for part, inner, _ in fields(content)}
            tensor.place[entry.get(ENTRY_KEY, "")] = entry.get(ENTRY_VALUE, "")
    return tensor


def _numbers(content: bytes, raw: bytes) -> Iterator[int]:
    """The numbers of a field: several where they are packed, or the one that follows the tag."""
    position = 0
    if not content:
        _, position = varint(raw, 0)
        content = raw
    while position < len(content):
        number, position = varint(content, position)
        yield number
