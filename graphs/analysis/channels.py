"""Which channels of which linear layer a value is: what passes share that change a linear layer's outputs one by
one."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from satchel.graphs.analysis.matmul import product
from satchel.graphs.ir.contract import Refused
from satchel.graphs.ir.values import last_dim, only_user, producer, span, weight
from satchel.graphs.ir.weights import LazyWeight


@dataclasses.dataclass(frozen=True)
class Channels:
    """Outputs `start` to `stop` of a linear layer with constant weights.

    Attributes:
        matrix: The initializer [in, out].
        bias: The initializer [out], if the linear layer has one.
    """

    matrix: ir.Value
    bias: ir.Value | None
    start: int
    stop: int


def channels(value: ir.Value | None) -> Channels | None:
    """The channels that a value is: all of a linear layer, or one part of its Split; None if something else makes it.

    Raises:
        Refused: They cannot be changed for one reader alone, since something else reads them, or the weights.
    """
    if value is None:
        return None
    cut = span(value) if producer(value, "Split") is not None else None
    source, part = cut or (value, range(last_dim(value) or 0))
    found = product(source)
    if found is None or not part:
        return None
    for read in (value, source):
        if only_user(read) is None:
            raise Refused(f"{read.name} is read by more than one node")
    matrix = _operand(found.value, found.matrix)
    bias = _operand(found.value, found.bias) if found.bias is not None else None
    for weights in (matrix, bias):
        check_unshared(weights)
    return Channels(matrix, bias, part.start, part.stop)


def gated_input(node: ir.Node) -> Channels | None:
    """For the down projection of a gated feed-forward layer, x = act(gate) * up: the channels that are `up`.

    None for any other node.

    Raises:
        Refused: It is one, and its input or weights are read by something else too.
    """
    gated = producer(node.inputs[0], "Mul") if node.op_type == "MatMul" and node.domain == "" else None
    matrix = weight(node.inputs[1]) if gated is not None else None
    if gated is None or matrix is None or len(matrix.dims) != 2:
        return None
    for value in reversed(gated.inputs):
        up = channels(value)
        if up is not None and up.stop - up.start == matrix.dims[0]:
            if only_user(gated.outputs[0]) is not node:
                raise Refused(f"{gated.outputs[0].name} is read by more than one node")
            check_unshared(node.inputs[1])
            return up
    return None


def check_unshared(value: ir.Value | None) -> None:
    """Refuse an initializer that more than one node reads."""
    if value is not None and only_user(value) is None:
        raise Refused(f"{value.name} is read by more than one node: layers share their weights")


def marked(value: ir.Value | None, mark: str) -> bool:
    """Whether the lazy weight behind an initializer carries `.mark` in its name: a pass has changed it already."""
    lazy = weight(value)
    return lazy is not None and mark in lazy.name.split(".")


def _operand(value: ir.Value, lazy: LazyWeight) -> ir.Value:
    """The initializer with that weight among the inputs of the MatMul, or MatMul and Add, that make `value`."""
    node = value.producer()
    waiting = list(node.inputs) if node is not None else []
    for read in waiting:
        if weight(read) is lazy and read is not None:
            return read
        inner = producer(read, "MatMul")
        waiting.extend(inner.inputs if inner is not None else ())
    raise Refused(f"{lazy.name} is not read by the linear layer that makes {value.name}")
