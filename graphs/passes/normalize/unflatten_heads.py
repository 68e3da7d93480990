"""Heads stay apart from tokens where a model flattens both into rows."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, constant, dims, nodes, rank

EACH_ELEMENT = ("Add", "Cast", "Div", "Mul", "Neg", "Pow", "Reciprocal", "Sigmoid", "Sqrt", "Sub", "Tanh")
ALONG_THE_LAST = ("ReduceMean", "ReduceSum")


@graph_pass
def unflatten_heads(model: ir.Model, report: Report) -> None:
    """Let what works on each head alone work on [batch, new, heads, head_dim] instead of on rows of heads.

    before: x [batch, new, heads * head_dim] or [batch, new, heads, head_dim] -> Reshape -> [batch * new * heads,
            head_dim] -> norm, gate -> Reshape -> [batch, new, heads * head_dim]
    after:  x -> Reshape([0, 0, heads, head_dim]) -> norm, gate -> Reshape([0, 0, heads * head_dim])
    refuses when: something between works on other axes, or a row comes from elsewhere (silently).
    """
    for reshape in nodes(model, "Reshape"):
        shape = _flattened(reshape)
        region = None if shape is None else _region(reshape, shape)
        if shape is None or region is None:
            continue
        starts, inner, ends = region
        for start in starts:
            start.replace_input_with(1, Builder(model).shape(0, 0, *shape[2:]))  # type: ignore[arg-type]
            start.attributes.pop("allowzero", None)
            start.outputs[0].shape = ir.Shape(shape)
        for output in (output for node in inner for output in node.outputs):
            rows = dims(output)
            output.shape = None if rows is None else ir.Shape([*shape[:3], rows[-1]])
        for end in ends:
            after = dims(end.outputs[0]) or []
            end.replace_input_with(1, Builder(model).shape(0, 0, *(d for d in after[2:] if isinstance(d, int))))
            end.attributes.pop("allowzero", None)
        report.count += 1


def _flattened(node: ir.Node) -> list[int | str | None] | None:
    """[batch, new, heads, head_dim], where a Reshape makes rows of head_dim of several heads of each token."""
    match dims(node.inputs[0]), dims(node.outputs[0]):
        case [batch, new, int(heads), int(width)], [rows, int(head_dim)] if width == head_dim:
            pass
        case [batch, new, int(width)], [rows, int(head_dim)] if width % head_dim == 0 and width > head_dim:
            heads = width // head_dim
        case _:
            return None
    return None if any(isinstance(size, int) for size in (batch, new, rows)) else [batch, new, heads, head_dim]


def _region(first: ir.Node, shape: list[int | str | None]) -> tuple[list[ir.Node], list[ir.Node], list[ir.Node]] | None:
    """(Reshapes into rows, operators on rows, Reshapes back) around a first Reshape; None if anything else is there."""
    starts, inner, ends = [first], list[ir.Node](), list[ir.Node]()
    waiting, seen = [first], {first}

    def visit(node: ir.Node | None) -> None:
        if node is not None and node not in seen:
            seen.add(node)
            waiting.append(node)

    while waiting:
        node = waiting.pop()
        if node is first:
            pass
        elif node.op_type == "Reshape" and _flattened(node) == shape:
            starts.append(node)
        elif node.op_type == "Reshape" and _restores(node, shape):
            ends.append(node)
            continue  # what made the rows is in the region
        elif node.domain == "" and (node.op_type in EACH_ELEMENT or _along_the_last(node)):
            inner.append(node)
            for value in node.inputs:
                if value is None or rank(value) in (0, 1):
                    continue  # one number, or one for each channel
                if value.producer() is None:
                    return None
                visit(value.producer())
        else:
            return None
        if any(output.is_graph_output() for output in node.outputs):
            return None
        for output in node.outputs:
            for use in output.uses():
                visit(use.node)
    return (starts, inner, ends) if ends else None


def _along_the_last(node: ir.Node) -> bool:
    axes = constant(node.inputs[1]) if node.op_type in ALONG_THE_LAST and len(node.inputs) > 1 else None
    return axes is not None and axes.tolist() == [-1] and node.attributes.get_int("keepdims", 1) == 1


def _restores(node: ir.Node, shape: list[int | str | None]) -> bool:
    """Whether a Reshape gives rows their tokens back: [batch, new, heads * head_dim] or with heads apart."""
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if before is None or after is None or len(before) != 2 or after[:2] != shape[:2]:
        return False
    heads, width = shape[2], before[1]
    if not isinstance(heads, int) or not isinstance(width, int):
        return False
    return after[2:] in ([heads * width], [heads, width])
