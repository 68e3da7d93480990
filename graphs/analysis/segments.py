"""Cuts a graph into pieces that can be run one after the other, each with few weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.values import SMALL, weight
from satchel.graphs.ir.weights import LazyWeight


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph, of which at most the first reads large weights.

    Attributes:
        nodes: The nodes, in the graph's order.
        reads: Names of the values that come from before: other segments' results and the graph's inputs.
        weights: Large weights by the name of the value that stands for them; whoever runs the segment feeds them.
        keeps: Names of its values that later segments, the graph's outputs asked for, or an observer read.
    """

    nodes: tuple[ir.Node, ...]
    reads: tuple[str, ...]
    weights: Mapping[str, LazyWeight]
    keeps: tuple[str, ...]

    @property
    def head(self) -> ir.Node:
        """The node that reads the large weights, if any does."""
        return self.nodes[0]


def split(model: ir.Model, wanted: Collection[str]) -> list[Segment]:
    """Cut a graph in front of each node that reads a weight larger than `SMALL` bytes.

    Args:
        model: The graph; it is not changed.
        wanted: Names of values to keep though no node reads them: outputs of the graph, or what an observer asks for.
    """
    groups: list[list[ir.Node]] = [[]]
    for node in model.graph:
        if _large(node) and groups[-1]:
            groups.append([])
        groups[-1].append(node)
    last_reader: dict[str, int] = {}
    for index, group in enumerate(groups):
        for node in group:
            last_reader |= {str(v.name): index for v in node.inputs if v is not None}
    segments = []
    for index, group in enumerate(groups):
        made = [str(v.name) for node in group for v in node.outputs if v.name]
        inside = set(made)
        read = {
            str(v.name): None
            for node in group
            for v in node.inputs
            if v is not None and not v.is_initializer() and v.name not in inside
        }
        keeps = [name for name in made if last_reader.get(name, -1) > index or name in wanted]
        segments.append(Segment(tuple(group), tuple(read), _large(group[0]), tuple(keeps)))
    return segments


def build(segment: Segment, dtypes: Mapping[str, np.dtype], opsets: Mapping[str, int]) -> ir.Model:
    """The segment as a model; `dtypes` are those of the values that it reads. Its large weights are inputs."""
    values: dict[str, ir.Value] = {}
    initializers = []
    for name in (*segment.reads, *segment.weights):
        dtype = ir.DataType.from_numpy(dtypes[name]) if name in dtypes else segment.weights[name].dtype
        values[name] = ir.Value(name=name, type=ir.TensorType(dtype))
    inputs = list(values.values())
    nodes = []
    for node in segment.nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.name not in values:
                array = np.asarray(value.const_value.numpy())  # type: ignore[union-attr]
                tensor = ir.Tensor(array, name=str(value.name))
                copy = ir.Value(
                    name=value.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
                )
                values[str(value.name)] = copy
                initializers.append(copy)
        outputs = [ir.Value(name=v.name, type=v.type) for v in node.outputs]
        read = [None if v is None else values[str(v.name)] for v in node.inputs]
        nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                read,
                list(node.attributes.values()),
                outputs=outputs,
                name=node.name,
                version=node.version,
            )
        )
        values |= {str(v.name): v for v in outputs if v.name}
    kept = [values[name] for name in segment.keeps]
    graph = ir.Graph(inputs, kept, nodes=nodes, initializers=initializers, opset_imports=dict(opsets), name="segment")
    return ir.Model(graph, ir_version=10)


def _large(node: ir.Node) -> dict[str, LazyWeight]:
    found = {}
    for value in node.inputs:
        lazy = weight(value)
        if value is not None and lazy is not None and lazy.nbytes > SMALL and not lazy.computed:
            found[str(value.name)] = lazy
    return found
