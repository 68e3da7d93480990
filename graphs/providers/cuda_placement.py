"""Predicts where ONNX Runtime with CUDA places the nodes of a graph, and which values are copied."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from satchel.graphs.providers.findings import GraphView, is_constant, number, operator
from satchel.graphs.providers.kernels import Match, type_name

REDUCTIONS = tuple(
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
)
HOST_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "Slice": (1, 2, 3, 4), "Split": (1,), "Pad": (1, 2, 3),
    "Squeeze": (1,), "Unsqueeze": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "TopK": (1,), "Clip": (1, 2),
    "CumSum": (1,), "OneHot": (1,), "Trilu": (1,), "If": (0,), "Loop": (0, 1),
    "com.microsoft::GroupQueryAttention": (6,), **dict.fromkeys(REDUCTIONS, (1,)),
}  # fmt: skip
"""Inputs that a CUDA kernel reads from host memory."""

HOST_OUTPUTS = ("Shape", "Size")
"""Operators whose CUDA kernel writes its result to host memory."""

SMALL = 100
"""A constant of at most this many elements can move to the host with its consumer."""

FLOAT8_AND_16 = ("float16", "bfloat16", "float8")


class Place(enum.Enum):
    """Where a node runs, and why."""

    DEVICE = enum.auto()
    HOST_PREFERRED = enum.auto()
    HOST_FALLBACK = enum.auto()


def excluded(node: ir.Node) -> str | None:
    """Why the provider excludes a node although a kernel matches, or None."""
    if node.op_type in ("ArgMax", "ArgMin") and node.domain == "" and number(node, "select_last_index", 0):
        return "select_last_index is not supported"
    if node.op_type == "Cast" and node.domain == "" and number(node, "to", 0) == ir.DataType.STRING.value:
        return "no cast to strings"
    return None


def placements(view: GraphView) -> dict[ir.Node, Place]:
    """Where each node runs.

    A node without a kernel falls back to the CPU. Nodes with a kernel that only work on values in host memory, as
    shape arithmetic after Shape and Size does, stay on the CPU. They are found node by node, as in
    GetCpuPreferredNodes in ONNX Runtime's fallback_cpu_capability.cc.
    """
    places = {
        node: Place.DEVICE
        if view.fits[node].match in (Match.FITS, Match.UNVERIFIED, Match.OF_LIBRARY) and excluded(node) is None
        else Place.HOST_FALLBACK
        for node in view.nodes
    }
    order = {node: index for index, node in enumerate(view.nodes)}
    on_host: set[ir.Value] = set()
    reached: set[ir.Node] = set()
    for node in view.nodes:
        if _gives_shape(node) and places[node] is Place.DEVICE:
            on_host.update(node.outputs)
            reached.update(_readers(node))
    for node in view.nodes:  # consumers come after their producers
        if node not in reached or node not in order:
            continue
        if places[node] is Place.DEVICE and _follows(node, on_host):
            places[node] = Place.HOST_PREFERRED
        if places[node] is not Place.DEVICE:
            on_host.update(node.outputs)
            reached.update(_readers(node))
    return places


def copies(view: GraphView, places: Mapping[ir.Node, Place]) -> Iterator[tuple[ir.Node, ir.Value, str]]:
    """Yield (node, value, direction) for each value copied between host and device for a correctly placed node.

    Copies around nodes that fall back to the CPU are not listed: they are a consequence of the fallback.
    """
    for node in view.nodes:
        if places[node] is Place.HOST_FALLBACK:
            continue
        for index, value in enumerate(node.inputs):
            maker = None if value is None else value.producer()
            if value is None or maker is None or is_constant(value) or places.get(maker) in (None, Place.HOST_FALLBACK):
                continue
            made_on_host = places[maker] is Place.HOST_PREFERRED or _gives_shape(maker)
            read_on_host = places[node] is Place.HOST_PREFERRED or index in HOST_INPUTS.get(operator(node), ())
            if made_on_host != read_on_host and not _gives_shape(node):
                yield node, value, "from host to device" if made_on_host else "from device to host"


def _follows(node: ir.Node, on_host: set[ir.Value]) -> bool:
    """Whether nothing ties a node that reads a value in host memory to the device."""
    host_inputs = HOST_INPUTS.get(operator(node), ())
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if value.dtype is not None and type_name(value.dtype).startswith(FLOAT8_AND_16):
            return False
        if value.is_graph_input() or _is_small_constant(value):
            continue
        if value not in on_host or index in host_inputs:
            return False
    return True


def _is_small_constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size <= SMALL


def _gives_shape(node: ir.Node) -> bool:
    """Shape and Size leave their result on the host, and read no values, so that nothing is copied for them."""
    return node.domain == "" and node.op_type in HOST_OUTPUTS


def _readers(node: ir.Node) -> list[ir.Node]:
    return [use.node for value in node.outputs for use in value.uses()]
