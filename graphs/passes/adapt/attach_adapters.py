"""What adapters add to linear layers, computed beside them from inputs of the graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

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
    """Add x @ A @ B + bias to linear layers that adapters change, A, B and bias as optional inputs of the graph.

    Their default values have rank 0, for which the product is zero, and a bias of 0: without an adapter, the linear
    layer gives what it gave.

    before: x -> MatMul(W) -> y
    after:  x -> MatMul(W) -> Add <- MatMul(B) <- MatMul(A) <- x;  Add -> y
    Where W is joined of several layers, what is added is a Concat of what each of them adds.
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


def _attach(builder: Builder, node: ir.Node, sizes: tuple[int, ...], changes: Iterable[Change]) -> None:
    x, result = node.inputs[0], node.outputs[0]
    parts, end = list[ir.Value](), 0
    for change in sorted(changes, key=lambda change: change.start):
        if change.start > end:
            parts.append(_nothing(builder, x, result, (sizes[0], change.start - end)))
        parts.append(_added(builder, x, result, sizes[0], change))
        end = change.stop
    if end < sizes[1]:
        parts.append(_nothing(builder, x, result, (sizes[0], sizes[1] - end)))
    whole = parts[0] if len(parts) == 1 else builder.value("Concat", parts, f"{node.name}.lora", result, axis=-1)
    total = builder.value("Add", [result, whole], f"{node.name}.adapted", result)
    replace(result, total)
    builder.graph.node(f"{node.name}.adapted").replace_input_with(0, result)  # it read its own result


def _added(builder: Builder, x: ir.Value | None, like: ir.Value, inputs: int, change: Change) -> ir.Value:
    """x @ A @ B + bias of one layer, as wide as the layer's outputs."""
    outputs, rank = change.stop - change.start, f"{change.layer}.rank"
    first_name, second_name, bias_name = lora_names(change.layer)
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
    bias = _input(builder, bias_name, (1, f"{change.layer}.outputs"), biases)
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


def _input(builder: Builder, name: str, shape: tuple[int | str, ...], tensors: Mapping[str, LazyWeight]) -> ir.Value:
    """The optional input of that name, with a default of rank 0, or of one 0 for a bias; made once for a layer."""
    there = builder.graph.initializers.get(name)
    if there is not None:
        return there
    least = 1 if shape[0] == 1 and isinstance(shape[1], str) else 0
    default = np.zeros([size if isinstance(size, int) else least for size in shape], np.float32)
    value = builder.initializer(ir.Tensor(default, name=name))
    value.shape = ir.Shape(shape)
    value.meta[TENSORS] = dict(tensors)
    builder.graph.inputs.append(value)
    return value
