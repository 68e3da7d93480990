"""What adapters add to linear layers, computed beside them from inputs of the graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.low_rank import Change, changes_of
from satchel.graphs.ir.values import Builder, nodes, replace, weight
from satchel.graphs.ir.weights import LazyWeight
from satchel.runtime.bundle.contract import lora_names

TENSORS = "tensors"
"""Mark (`meta`) of a graph input: the tensor of each adapter that has one, by the adapter's name, as `LazyWeight`s."""


@graph_pass
def attach_adapters(model: ir.Model, report: Report) -> None:
    """Add x @ A @ B + bias to linear layers that adapters change, A, B and bias as optional inputs of the graph; where
    an adapter has gains (DoRA), multiply the layer's own result by an input too.

    Their default values have rank 0, for which the product is zero, a bias of 0 and a gain of 1: without an adapter,
    the linear layer gives what it gave.

    before: x -> MatMul(W) -> y
    after:  x -> MatMul(W) -> (Mul(gain) ->) Add <- MatMul(B) <- MatMul(A) <- x;  Add -> y
    Where W is joined of several layers, what is added is a Concat of what each of them adds, and so are the gains.
    refuses when: no adapter changes W (silently).
    """
    following = [*model.graph, None]
    after = dict(itertools.pairwise(following))
    for node in nodes(model, "MatMul"):
        matrix = weight(node.inputs[1])
        changes = () if matrix is None else changes_of(matrix)
        if matrix is None or not changes or any(change.transposed for change in changes):
            continue
        _attach(Builder(model, after[node]), node, matrix.dims, changes)
        report.count += 1


def adapter_inputs(model: ir.Model) -> dict[str, Mapping[str, LazyWeight]]:
    """The tensors of each adapter for the inputs of a graph, by the inputs' names."""
    return {str(value.name): value.meta[TENSORS] for value in model.graph.inputs if TENSORS in value.meta}


def _attach(builder: Builder, node: ir.Node, sizes: tuple[int, ...], changes: Sequence[Change]) -> None:
    x, result = node.inputs[0], node.outputs[0]
    parts, gains, end = list[ir.Value](), list[ir.Value](), 0
    for change in (*sorted(changes, key=lambda change: change.start), None):
        start = sizes[1] if change is None else change.start
        if start > end:
            parts.append(_nothing(builder, x, result, (sizes[0], start - end)))
            gains.append(_ones(builder, start - end))
        if change is not None:
            parts.append(_added(builder, x, result, sizes[0], change))
            gains.append(_gain(builder, change))
            end = change.stop
    own = result
    if any(change.gains for change in changes):
        own = builder.value(
            "Mul", [result, _joined(builder, gains, f"{node.name}.lora_gain")], f"{node.name}.gained", result
        )
    total = builder.value("Add", [own, _joined(builder, parts, f"{node.name}.lora")], f"{node.name}.adapted", result)
    replace(result, total)
    reader = f"{node.name}.adapted" if own is result else f"{node.name}.gained"
    builder.graph.node(reader).replace_input_with(0, result)  # it read its own result


def _joined(builder: Builder, parts: Sequence[ir.Value], name: str) -> ir.Value:
    return parts[0] if len(parts) == 1 else builder.value("Concat", parts, name, axis=-1)


def _ones(builder: Builder, width: int) -> ir.Value:
    return builder.constant(np.ones((1, width), np.float32), f"ones.1_{width}")


def _gain(builder: Builder, change: Change) -> ir.Value:
    """The gain of each output of a layer, [1, outputs]: those of the input, or ones."""
    width = change.stop - change.start
    if not change.gains:
        return _ones(builder, width)
    name = lora_names(change.layer)[3]
    given = _input(builder, name, (1, f"{change.layer}.outputs"), change.gains, np.ones((1, 1), np.float32))
    return builder.value("Expand", [given, builder.shape(1, width)], f"{name}.wide")


def _added(builder: Builder, x: ir.Value | None, like: ir.Value, inputs: int, change: Change) -> ir.Value:
    """x @ A @ B + bias of one layer, as wide as the layer's outputs."""
    outputs, rank = change.stop - change.start, f"{change.layer}.rank"
    first_name, second_name, bias_name, _ = lora_names(change.layer)
    parts = {name: part for name, part in change.adapters.items() if part.first.size}
    biases = {name: part.bias for name, part in change.adapters.items() if part.bias is not None}
    if parts:
        first = _input(builder, first_name, (inputs, rank), {name: part.first for name, part in parts.items()})
        second = _input(builder, second_name, (rank, outputs), {name: part.second for name, part in parts.items()})
        added = _product(builder, x, like, (first, second), f"{change.layer}.lora")
    else:
        added = _nothing(builder, x, like, (inputs, outputs))
    if not biases:
        return added
    bias = _input(builder, bias_name, (1, f"{change.layer}.outputs"), biases, np.zeros((1, 1), np.float32))
    return builder.value("Add", [added, bias], f"{change.layer}.lora_biased", added)


def _nothing(builder: Builder, x: ir.Value | None, like: ir.Value, sizes: tuple[int, int]) -> ir.Value:
    """Zeros for outputs that no adapter changes: a product of rank 0."""
    shapes = (sizes[0], 0), (0, sizes[1])
    first, second = (builder.constant(np.zeros(s, np.float32), f"rank_0.{s[0]}_{s[1]}") for s in shapes)
    number = sum(node.op_type == "MatMul" for node in builder.graph)
    return _product(builder, x, like, (first, second), f"{like.name}.unchanged_{number}")


def _product(
    builder: Builder, x: ir.Value | None, like: ir.Value, matrices: tuple[ir.Value, ir.Value], name: str
) -> ir.Value:
    """x @ A @ B."""
    low = builder.value("MatMul", [x, matrices[0]], f"{name}_A")
    high = builder.value("MatMul", [low, matrices[1]], f"{name}_B")
    low.type = high.type = like.type
    if like.shape is not None:
        low.shape, high.shape = (
            ir.Shape([*list(like.shape)[:-1], list(matrix.shape or ())[-1]]) for matrix in matrices
        )
    return high


def _input(
    builder: Builder,
    name: str,
    shape: tuple[int | str, ...],
    tensors: Mapping[str, LazyWeight],
    default: np.ndarray | None = None,
) -> ir.Value:
    """The optional input of that name, by default of rank 0; made once for a layer."""
    there = builder.graph.initializers.get(name)
    if there is not None:
        return there
    if default is None:
        default = np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
    value = builder.initializer(ir.Tensor(default, name=name))
    value.shape = ir.Shape(shape)
    value.meta[TENSORS] = dict(tensors)
    builder.graph.inputs.append(value)
    return value
