"""satchel's own operator for linear layers, `satchel::Linear`: its inputs and attributes, and how passes change a node.

It computes, in this order: the norm of x, the Hadamard transform, x rounded to int8 unless weights are in float16, the
matmul, the bias, the gate, the residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from satchel.graphs.ir.values import INTERNAL, Builder, nodes, only_user, producer

X, CODES, SCALES, ZERO_POINTS, BIAS, RESIDUAL, NORM_WEIGHT, ROW_OFFSETS = range(8)
WIDTHS, ADDED = 9, 10
"""The operator's inputs."""


def native_operator(
    builder: Builder,
    op_type: str,
    reads: Sequence[ir.Value | None],
    name: str,
    like: ir.Value,
    sizes: Mapping[str, int],
) -> ir.Value:
    """The result of a new node of one of satchel's own operators, with the dtype and shape of `like`."""
    node = builder.node(op_type, reads, name, INTERNAL)
    for key, size in sizes.items():
        node.attributes.add(ir.AttrInt64(key, size))
    result = node.outputs[0]
    result.shape, result.type = like.shape, like.type
    return result


def linears(model: ir.Model) -> Iterator[ir.Node]:
    """The model's Linear nodes."""
    return nodes(model, "Linear", INTERNAL)


def linear(value: ir.Value | None) -> ir.Node | None:
    """The Linear that computes `value`."""
    return producer(value, "Linear", INTERNAL)


def fusable(value: ir.Value | None) -> ir.Node | None:
    """The Linear that computes `value` for a single reader, if it has neither a residual nor a gate yet."""
    node = linear(value)
    if node is None or only_user(node.outputs[0]) is None or has_input(node, RESIDUAL) or node.attributes.get("gate"):
        return None
    return node


def has_input(node: ir.Node, index: int) -> bool:
    """Whether the node has that input."""
    return index < len(node.inputs) and node.inputs[index] is not None


def set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    """Set an input of the node, which may not have so many inputs yet."""
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def rounded_by_row(node: ir.Node) -> bool:
    """Whether the node rounds its input with one scale for a row: it rounds the only new token of a sequence twice."""
    return node.attributes.get_int("bits", 8) == 8 and not node.attributes.get_int("block", 0)


def width(node: ir.Node) -> tuple[int, int]:
    """(inputs, outputs) of the matmul of a Linear."""
    return node.attributes.get_int("inputs", 0), node.attributes.get_int("outputs", 0)
