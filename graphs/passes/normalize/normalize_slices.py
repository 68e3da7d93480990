"""Slices that take whole parts of a Concat read those parts."""

from __future__ import annotations

import itertools

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, constant, dims, nodes, producer, rank, replace


@graph_pass
def normalize_slices(model: ir.Model, report: Report) -> None:
    """Replace a slice of a Concat by the concatenated values that it covers.

    The tracer writes values into a new tensor piece by piece in this way.

    before: a [batch, sequence, 32], rest -> Concat(axis=-1) -> Slice(0, 32) -> y
    after:  a -> y
    refuses when: the slice is of another axis, has steps, or begins or ends in the middle of a part (silently).
    """
    for node in nodes(model, "Slice"):
        found = _parts(node)
        if found is None:
            continue
        parts, axis = found
        whole = parts[0]
        if len(parts) > 1:
            name, output = f"{node.name}.parts", node.outputs[0]
            whole = Builder(model, node).value("Concat", parts, name, output, axis=axis)
        replace(node.outputs[0], whole)
        report.count += 1


def _parts(node: ir.Node) -> tuple[list[ir.Value], int] | None:
    """The inputs of a Concat that the slice covers exactly, and its axis."""
    concat = producer(node.inputs[0], "Concat")
    given = [constant(value) for value in node.inputs[1:]]
    ndim = rank(node.inputs[0])
    if concat is None or ndim is None or len(given) < 3 or any(value is None or value.size != 1 for value in given):
        return None
    start, end, axis, *step = (int(value.reshape(())) for value in given if value is not None)
    if (concat.attributes["axis"].as_int() - axis) % ndim or step not in ([], [1]):
        return None
    shapes = [dims(value) for value in concat.inputs]
    sizes = [shape[axis] for shape in shapes if shape is not None]
    whole = [size for size in sizes if isinstance(size, int)]
    if len(whole) < len(shapes):
        return None
    bounds = [0, *itertools.accumulate(whole)]
    first, last, _ = slice(start, end).indices(bounds[-1])
    if first not in bounds or last not in bounds or first >= last:
        return None
    parts = concat.inputs[bounds.index(first) : bounds.index(last)]
    return [value for value in parts if value is not None], axis
