"""Outliers in front of a linear layer that follows a gate are spread over blocks of channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.channels import check_unshared
from satchel.graphs.analysis.rotations import hadamard
from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, dims, nodes, only_user, producer, rank, replace, weight
from satchel.graphs.ir.weights import left_multiplied

EACH_ELEMENT = {
    "Add", "Cast", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "Mul", "Neg", "Pow", "Reciprocal", "Relu",
    "Reshape", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh",
}  # fmt: skip


def insert_hadamard(block: int) -> GraphPass:
    """Multiply the gated input of a linear layer by a Hadamard matrix H in blocks of `block` channels, and its weight
    by the inverse: the input of a feed-forward layer's down projection, and of the output projection behind the gate
    of a convolution, a recurrence or an attention (rotate_values cannot pass a gate).

    H is a plain tensor `const/hadamard.<block>`, not a lazy weight: what stores weights in fewer bits leaves it alone.

    before: x = act(gate) * up, or a Reshape of it -> MatMul(W) -> y
    after:  x -> Reshape [batch, new, k / block, block] -> MatMul(H) -> Reshape [batch, new, k] ->
            MatMul(blockdiag(H).T W) -> y
    refuses when: the width is not a multiple of `block`, x does not have three dimensions, or x or W are read
    elsewhere too.

    Args:
        block: Channels that are mixed with each other, a power of two.

    Raises:
        ValueError: `block` is not a power of two.

    Source: QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, in blocks.
    """
    matrix = hadamard(block)

    def edit(model: ir.Model, report: Report) -> None:
        shared: ir.Value | None = None
        for node in nodes(model, "MatMul"):
            with report.refusing(node):
                width = _gated_width(node)
                if width is None:
                    continue
                if width % block:
                    raise Refused(f"{width} channels are not a multiple of {block}")
                if rank(node.inputs[0]) != 3:
                    raise Refused("its input does not have three dimensions")
                shared = shared or Builder(model).constant(matrix, f"hadamard.{block}")
                _insert(model, node, matrix, shared)
                report.count += 1

    return graph_pass(edit, insert_hadamard)


def _gated_width(node: ir.Node) -> int | None:
    """The inputs of a linear layer behind a product of two values that both have a number for each channel, or None.

    Raises:
        Refused: It is one, and its input or weights are read by something else too.
    """
    matrix = weight(node.inputs[1])
    if node.domain != "" or matrix is None or len(matrix.dims) != 2:
        return None
    x = node.inputs[0]
    flat = producer(x, "Reshape")
    gated = producer(x if flat is None else flat.inputs[0], "Mul")
    if gated is None:
        return None
    shapes = [dims(value) for value in (*gated.inputs, gated.outputs[0])]
    if None in shapes or any(shape != shapes[-1] for shape in shapes):
        return None  # a factor for whole channels or tokens
    if _sources(gated.inputs[0]) & _sources(gated.inputs[1]):
        return None  # a square, or an activation such as x * sigmoid(x)
    for value in (gated.outputs[0], x):
        if value is not None and only_user(value) is None:
            raise Refused(f"{value.name} is read by more than one node")
    check_unshared(node.inputs[1])
    return int(matrix.dims[0])


def _sources(value: ir.Value | None) -> set[ir.Value]:
    """What a value is computed from by operators that work on each element alone; constants are left out."""
    found: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None and node.domain == "" and node.op_type in EACH_ELEMENT:
            waiting += node.inputs
        elif value is not None and (node is not None or value.is_graph_input()):
            found.add(value)
    return found


def _insert(model: ir.Model, node: ir.Node, matrix: np.ndarray, shared: ir.Value) -> None:
    x, down = node.inputs[0], weight(node.inputs[1])
    if x is None or x.shape is None or down is None or node.inputs[1] is None:
        return
    builder, name, block, width = Builder(model, node), str(node.name), len(matrix), down.dims[0]
    blocks = builder.shape(0, 0, width // block, block)
    split = builder.value("Reshape", [x, blocks], f"{name}.blocks")
    mixed = builder.value("MatMul", [split, shared], f"{name}.hadamard")
    for value in (split, mixed):
        value.shape, value.type = ir.Shape([*list(x.shape)[:-1], width // block, block]), x.type
    whole = builder.shape(0, 0, width)
    node.replace_input_with(0, builder.value("Reshape", [mixed, whole], f"{name}.mixed", x))
    replace(node.inputs[1], builder.initializer(left_multiplied(down, matrix.T, f"{down.name}.hadamard")))
