"""Counts the bytes that a decode step reads: weights of linear layers, and the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from satchel.runtime.bundle.dtypes import FLOAT16
from satchel.runtime.bundle.onnx_wire import MODEL_GRAPH, Tensor, all_tensors, external_tensors, fields, numbers
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError

# Field numbers of onnx.proto3.
GRAPH_NODE = 1
NODE_INPUT, NODE_OPERATOR, NODE_ATTRIBUTE = 1, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_INT = 1, 3

# These read single rows or positions of a lookup table: an embedding or rotary angles.
LOOKED_UP = ("Gather", "GatherND", "GatherBlockQuantized", "GroupQueryAttention", "Attention", "RotaryEmbedding")
# These read `k` of the experts in their weights [experts, ...].
EXPERTS = ("MoE", "QMoE")
FLOAT16_EXPANDED = 2
"""Float16 weights are converted to float32 at load."""


@dataclass
class _Node:
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    attributes: dict[str, int] = field(default_factory=dict)


def weight_bytes(bundle: Bundle, rows: int = 1) -> int:
    """The bytes of weights that one decode step of `rows` sequences reads, in the layout in which decode runs.

    All parts of a static graph count. Lookup tables are left out; one that is also the weight of the head counts once.
    Float16 weights count as the float32 that they are in memory. The max number of experts that the rows can choose
    counts. Raises BundleError if the decode graph cannot be read.
    """
    static = bundle.manifest.static
    if static is not None:
        return sum(_graph_bytes(bundle, part.file, rows, all_tensors) for part in static.decode.parts)
    variant = None if bundle.specialized is None else bundle.specialized.variant("decode")
    return _graph_bytes(bundle, bundle.manifest.graph(variant or "decode").file, rows, external_tensors)


def cache_positions(bundle: Bundle, length: float) -> float:
    """Positions of the cache that a decode step at this length reads; a static graph always reads all."""
    static = bundle.manifest.static
    return length if static is None else static.capacity


def norm_width(model: bytes) -> int | None:
    """The width of an ONNX model's first norm, that of the residual stream; None without one. Raises ValueError."""
    tensors = all_tensors(model)
    for node in _nodes(model):
        weights = [tensors[name] for name in node.inputs[1:] if name in tensors]  # behind what is added before, if any
        if "Normalization" in node.operator and weights:
            return weights[0].dims[-1]
    return None


def _graph_bytes(bundle: Bundle, file: str, rows: int, weights: Callable[[bytes], dict[str, Tensor]]) -> int:
    """`weights` finds the weights among the initializers, which static graphs may have inside."""
    try:
        model = bundle.read(file)
        tensors, nodes = weights(model), _nodes(model)
    except ValueError as error:
        raise BundleError(f"{bundle.folder / file}: cannot be read ({error}): export the bundle again") from None
    read: dict[tuple[str, ...], float] = {}
    for node in nodes:
        for name in node.inputs:
            tensor = tensors.get(name)
            if tensor is None or node.operator in LOOKED_UP:
                continue
            key = (tensor.place.get("location", ""), tensor.place.get("offset", "0")) if tensor.place else (name,)
            size = tensor.nbytes * _factor(node, tensor, rows)
            read[key] = max(read.get(key, 0), size)
    return round(sum(read.values()))


def _factor(node: _Node, tensor: Tensor, rows: int) -> float:
    if node.operator in EXPERTS and tensor.dims:
        return min(1.0, node.attributes.get("k", 1) * rows / tensor.dims[0])
    return FLOAT16_EXPANDED if node.operator == "Cast" and tensor.dtype == FLOAT16.onnx else 1.0


def _nodes(model: bytes) -> list[_Node]:
    """The main graph's nodes. Raises ValueError."""
    graphs = [graph for number, graph, _ in fields(model) if number == MODEL_GRAPH]
    return [_node(body) for graph in graphs for kind, body, _ in fields(graph) if kind == GRAPH_NODE]


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
                node.attributes[values[ATTRIBUTE_NAME][0].decode()] = next(numbers(*values[ATTRIBUTE_INT]))
    return node
