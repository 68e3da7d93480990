"""Channels stay last: transposes around convolutions move together and go away."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, constant, dims, producer, replace, weight
from satchel.graphs.ir.weights import transposed

SWAP = (0, 2, 1)
EACH_ELEMENT = ("Add", "Div", "Mul", "Neg", "Sigmoid", "Softplus", "Sub")


@graph_pass
def sink_channels(model: ir.Model, report: Report) -> None:
    """Move a Transpose of [batch, new, channels] behind what works on each token alone.

    before: x -> Transpose(0, 2, 1) -> Split(axis=1) -> a, b -> Mul -> Transpose(0, 2, 1) -> y
    after:  x -> Split(axis=2) -> a, b -> Mul -> Transpose -> Transpose -> y      (a pair that remove_identity drops)
    A matrix product with the weight on the left becomes one with its transpose on the right.
    refuses when: an operand beside the transposed ones is neither transposed nor one number (silently).
    """
    for node in list(model.graph):
        if node.domain == "" and node.graph is not None and _sink(model, node):
            report.count += 1


def _sink(model: ir.Model, node: ir.Node) -> bool:
    builder = Builder(model, node)
    if node.op_type == "Split":
        source = _before(node.inputs[0])
        if source is None or node.attributes.get_int("axis", 0) not in (1, -2):
            return False
        count, name = len(node.outputs), f"{node.name}.last"
        parts = builder.node("Split", [source, *node.inputs[1:]], name, outputs=count, axis=2)
        for part, old in zip(parts.outputs, node.outputs, strict=True):
            _put_back(builder, part, old)
        return True
    if node.op_type == "MatMul":
        matrix, source = weight(node.inputs[0]), _before(node.inputs[1])
        if matrix is None or len(matrix.dims) != 2 or source is None:
            return False
        right = builder.shared(transposed(matrix, f"{matrix.name}.T"))
        _put_back(builder, builder.value("MatMul", [source, right], f"{node.name}.last"), node.outputs[0])
        return True
    if node.op_type in EACH_ELEMENT:
        operands = [_before(value) or (value if _is_number(value) else None) for value in node.inputs]
        if None in operands or all(map(_is_number, node.inputs)):
            return False
        options = {name: attribute.value for name, attribute in node.attributes.items()}
        _put_back(builder, builder.value(node.op_type, operands, f"{node.name}.last", **options), node.outputs[0])
        return True
    return False


def _before(value: ir.Value | None) -> ir.Value | None:
    """x, where the value is Transpose(x) with the last two of three axes swapped."""
    transpose = producer(value, "Transpose")
    return transpose.inputs[0] if transpose is not None and transpose.attributes.get_ints("perm") == SWAP else None


def _is_number(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.size == 1


def _put_back(builder: Builder, made: ir.Value, old: ir.Value) -> None:
    """Let the readers of `old` read the transpose of what was made in its place."""
    shape = dims(old)
    made.type = old.type
    made.shape = None if shape is None else ir.Shape([shape[axis] for axis in SWAP])
    replace(old, builder.value("Transpose", [made], f"{made.name}.swapped", old, perm=SWAP))
