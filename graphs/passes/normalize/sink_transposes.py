"""Norms of each head come before the heads are moved."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, nodes, only_user, producer, rank, replace

NORMS = ("RMSNormalization", "LayerNormalization")


@graph_pass
def sink_transposes(model: ir.Model, report: Report) -> None:
    """Move a Transpose behind a norm over the last axis, so that it meets the attention and goes away there.

    before: x [batch, new, heads, head_dim] -> Transpose(0, 2, 1, 3) -> RMSNormalization -> y
    after:  x -> RMSNormalization -> Transpose(0, 2, 1, 3) -> y
    refuses when: the Transpose moves the last axis, the norm is over more axes, or others read the transposed value
    (silently).
    """
    for op_type in NORMS:
        for norm in nodes(model, op_type):
            x, perm = _before_transposes(norm)
            if x is norm.inputs[0] or rank(norm.inputs[1]) != 1:
                continue
            if norm.attributes.get_int("axis", -1) not in (-1, len(perm) - 1):
                continue
            builder, y = Builder(model, norm), norm.outputs[0]
            options = {name: attribute.value for name, attribute in norm.attributes.items()}
            normed = builder.value(op_type, [x, *norm.inputs[1:]], f"{norm.name}.sunk", x, **options)
            replace(y, builder.value("Transpose", [normed], f"{norm.name}.moved", y, perm=perm))
            report.count += 1


def _before_transposes(norm: ir.Node) -> tuple[ir.Value | None, list[int]]:
    """(x, perm), where the norm reads Transpose(x, perm), of one or more Transposes that keep the last axis."""
    value, reader = norm.inputs[0], norm
    perm = list(range(rank(value) or 0))
    while (transpose := producer(value, "Transpose")) is not None and only_user(transpose.outputs[0]) is reader:
        moves = transpose.attributes.get_ints("perm")
        if moves is None or moves[-1] != len(moves) - 1 or len(moves) != len(perm):
            break
        perm = [moves[axis] for axis in perm]
        value, reader = transpose.inputs[0], transpose
    return value, perm
