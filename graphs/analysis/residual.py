"""Finds a model's residual stream: all that writes to it, and all that reads it through a norm."""

from __future__ import annotations

import dataclasses
from collections import Counter

import onnx_ir as ir

from satchel.graphs.ir.contract import Refused
from satchel.graphs.ir.values import MICROSOFT, attributes, constant, last_dim, producer, rank, scalar, weight
from satchel.graphs.ir.weights import LazyWeight, from_array

MOE, HEAD = f"{MICROSOFT}.MoE", f"{MICROSOFT}.FusedMatMul"
NORMS = {"RMSNormalization", "LayerNormalization"}
EXPERT_INPUT, EXPERT_OUTPUT = 2, 4
"""Where com.microsoft MoE takes its first matrices [experts, inner, hidden] and second [experts, hidden, inner]."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm of the stream.

    Attributes:
        gain: [size].
        bias: [size], or None.
        readers: What multiplies its result by constant weights: MatMul, Gemm with transB, MoE, and FusedMatMul with
            transB for a tied head.
    """

    node: ir.Node
    gain: LazyWeight
    bias: LazyWeight | None
    readers: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class Residual:
    """A residual stream [batch, new, size].

    Attributes:
        written: Initializers whose last axis is the stream: embedding tables, matrices [in, size], biases [size].
        experts: Initializers [experts, size, inner] of mixtures that write to it.
        norms: All that reads it.
    """

    size: int
    written: tuple[ir.Value, ...]
    experts: tuple[ir.Value, ...]
    norms: tuple[Norm, ...]


def find_residual(lookup: ir.Node) -> Residual:
    """The stream that begins at a Gather of an embedding table [vocabulary, size].

    Raises:
        Refused: Something writes to it that is not linear, reads it without a norm, or shares weights with others.
    """
    table = weight(lookup.inputs[0])
    if table is None or len(table.dims) != 2:
        raise Refused("what is looked up is not a table of constant weights")
    search = _Search(table.dims[1])
    search.walk(lookup.outputs[0])
    return search.result()


def vector(value: ir.Value | None, size: int) -> LazyWeight | None:
    """The constant vector [size] behind an initializer, or None."""
    lazy, array = weight(value), constant(value)
    if lazy is None and value is not None and array is not None:
        lazy = from_array(str(value.name), array, computed=True)
    return lazy if lazy is not None and lazy.dims == (size,) else None


class _Search:
    """Walks from value to value, against and along the edges, over all values that hold the stream or a part of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.written: Counter[ir.Value] = Counter()
        self.experts: Counter[ir.Value] = Counter()
        self.read: Counter[ir.Value] = Counter()
        self.tied: Counter[ir.Value] = Counter()
        self.norms: list[Norm] = []

    def walk(self, start: ir.Value) -> None:
        waiting, seen = [start], set[ir.Value]()
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.is_graph_output():
                raise Refused(f"the residual stream is an output of the graph: {value.name}")
            if last_dim(value) != self.size:
                raise Refused(f"{value.name} of the residual stream is not known to be {self.size} wide")
            waiting += self.made_from(value)
            for use in value.uses():
                waiting += self.read_by(use.node, use.idx)

    def result(self) -> Residual:
        """What was found, if the weights are read by nothing else."""
        for value in self.tied:
            if value not in self.written:
                raise Refused(f"the head reads {value.name}, which is not looked up for the residual stream")
        for value in {**self.written, **self.experts, **self.read}:
            roles = (self.written[value], self.experts[value], self.read[value])
            if sum(map(bool, roles)) > 1:
                raise Refused(f"{value.name} both reads the residual stream and writes to it")
            if len(value.uses()) != sum(roles) + self.tied[value] or self.read[value] > 1:
                raise Refused(f"{value.name} is read by more than one node: layers share their weights")
        return Residual(self.size, tuple(self.written), tuple(self.experts), tuple(self.norms))

    def made_from(self, value: ir.Value) -> list[ir.Value]:
        """Note the weights that make `value`, and give the values of the stream that it is made from."""
        node = value.producer()
        operands = list(node.inputs) if node is not None else []
        if node is None or None in operands[:2]:
            raise Refused(f"{value.name} of the residual stream has no linear layer that makes it")
        kind, (first, second) = _kind(node), (*operands, None)[:2]
        if kind == "Gather" and self._is_matrix(first) and attributes(node, axis=0)["axis"] == 0:
            return self._note(self.written, first)
        if kind == "MatMul" and self._is_matrix(second):
            return self._note(self.written, second)
        if kind == MOE:
            return self._note(self.experts, _expert_weights(node)[1])
        if kind == "Add":
            for operand, other in ((first, second), (second, first)):
                if vector(operand, self.size) is not None:
                    self._note(self.written, operand)
                    return [other] if other is not None else []
            return [v for v in (first, second) if v is not None]
        if kind == "Mul":
            for operand, other in ((first, second), (second, first)):
                if other is not None and _is_factor_of_rows(operand):
                    return [other]
        if kind == "Reshape" and first is not None:
            return [first]
        raise Refused(f"{node.name} ({node.op_type}) writes to the residual stream")

    def read_by(self, node: ir.Node, index: int) -> list[ir.Value]:
        """Note the norm that reads the stream, or give the value of the stream that is made from it."""
        if _kind(node) in ("Add", "Mul", "Reshape"):
            return [node.outputs[0]]
        if _kind(node) in NORMS and index == 0:
            self._note_norm(node)
        elif _kind(node) != "Shape":
            raise Refused(f"{node.name} ({node.op_type}) reads the residual stream without a norm")
        return []

    def _note_norm(self, node: ir.Node) -> None:
        options = attributes(node, axis=-1, epsilon=1e-5, stash_type=1)
        gain, bias = (vector(value, self.size) for value in (*node.inputs[1:], None, None)[:2])
        if options["axis"] not in (-1, (rank(node.inputs[0]) or 0) - 1) or any(v.uses() for v in node.outputs[1:]):
            raise Refused(f"{node.name} is not over the last axis alone, or gives more than the norm")
        if gain is None or (bias is None and len(node.inputs) > 2 and node.inputs[2] is not None):
            raise Refused(f"the norm weight or bias of {node.name} is not a constant vector over the last axis")
        self.norms.append(Norm(node, gain, bias, tuple(self._readers(node.outputs[0], bias is not None))))

    def _readers(self, value: ir.Value, biased: bool) -> list[ir.Node]:
        """The linear layers that read a normalized value; their weights are noted."""
        if value.is_graph_output():
            raise Refused(f"{value.name}, the norm of the residual stream, is an output of the graph")
        found = []
        for use in value.uses():
            node, kind = use.node, _kind(use.node)
            matrix = node.inputs[1] if len(node.inputs) > 1 else None
            if kind == "Reshape" and last_dim(node.outputs[0]) == self.size:
                found += self._readers(node.outputs[0], biased)
                continue
            if kind == "Shape":
                continue
            if use.idx == 0 and kind == HEAD and attributes(node, transB=0)["transB"] == 1:
                self._note(self.tied, matrix)
            elif use.idx == 0 and kind == "MatMul" and self._is_matrix(matrix, axis=0):
                self._note(self.read, matrix)
            elif use.idx == 0 and kind == "Gemm" and self._is_matrix(matrix) and not biased:
                _check_gemm(node)
                self._note(self.read, matrix)
            elif use.idx == 0 and kind == MOE and not biased:
                self._note(self.read, _expert_weights(node)[0])
            else:
                raise Refused(f"{node.name} ({node.op_type}) reads the norm of the residual stream")
            found.append(node)
        return found

    def _is_matrix(self, value: ir.Value | None, axis: int = 1) -> bool:
        """Whether this is a lazy weight of two dimensions, with the stream along `axis`."""
        lazy = weight(value)
        return lazy is not None and len(lazy.dims) == 2 and lazy.dims[axis] == self.size

    @staticmethod
    def _note(place: Counter[ir.Value], value: ir.Value | None) -> list[ir.Value]:
        if value is not None:
            place[value] += 1
        return []


def _kind(node: ir.Node) -> str:
    """The operator's name, with its domain in front where that is not the standard one."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _expert_weights(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The initializers [experts, inner, hidden] and [experts, hidden, inner] of a MoE that has no further ones."""
    matrices = [node.inputs[i] if len(node.inputs) > i else None for i in (EXPERT_INPUT, EXPERT_OUTPUT)]
    others = [v for i, v in enumerate(node.inputs) if i > 1 and i not in (EXPERT_INPUT, EXPERT_OUTPUT)]
    first, second = matrices
    if first is None or second is None or any(v is not None for v in others):
        raise Refused(f"{node.name} has expert weights or biases that are not known")
    if any(len(lazy.dims) != 3 if (lazy := weight(v)) is not None else True for v in matrices):
        raise Refused(f"{node.name} has expert weights that are not constants")
    return first, second


def _check_gemm(node: ir.Node) -> None:
    options = attributes(node, alpha=1.0, beta=1.0, transA=0, transB=0)
    if (options["alpha"], options["transA"], options["transB"]) != (1.0, 0, 1):
        raise Refused(f"{node.name} scales its result, or transposes in another way than by transB")


def _is_factor_of_rows(value: ir.Value | None) -> bool:
    """Whether this is one number, or one for each row: multiplying by it commutes with linear layers over the last
    axis."""
    total = producer(value, "ReduceSum")
    if total is not None and total.attributes.get_int("keepdims", 1) == 1 and len(total.inputs) > 1:
        return scalar(total.inputs[1]) == -1
    lazy = weight(value)
    return scalar(value) is not None or (lazy is not None and lazy.size == 1) or last_dim(value) == 1
