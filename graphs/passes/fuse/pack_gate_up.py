"""One linear layer for the gate and the up projection of a feed-forward layer."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.analysis.matmul import Product, product
from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import nodes
from satchel.graphs.quant.joining import join

ACTIVATIONS = {"Sigmoid", "Gelu", "Relu", "Tanh", "Erf", "HardSigmoid", "Elu", "Softplus", "Mul", "Add", "Div", "Pow"}
"""Elementwise operators of which an activation may be written."""


@graph_pass
def pack_gate_up(model: ir.Model, report: Report) -> None:
    """Join the two linear layers of a gated feed-forward layer.

    before: x -> MatMul(gate) -> activation -> Mul <- MatMul(up) <- x
    after:  x -> MatMul(gate|up) -> Split -> activation -> Mul
    refuses when: only one of the two has a bias.
    """
    for mul in nodes(model, "Mul"):
        for index in (0, 1):
            up = product(mul.inputs[index])
            gate = _gate(mul.inputs[1 - index], up) if up is not None else None
            if up is None or gate is None:
                continue
            with report.refusing(mul):
                join(model, [gate, up], "gate_up_proj")
                report.count += 1
            break


def _gate(value: ir.Value | None, up: Product) -> Product | None:
    """The linear layer over the same input from which `value` is computed element by element."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        found = product(value)
        if found is not None:
            return found if found.x is up.x and found.value is not up.value and found.width == up.width else None
        node = value.producer()
        if node is None or node.op_type not in ACTIVATIONS or len(seen) > 32:
            continue
        waiting.extend(node.inputs)
    return None
