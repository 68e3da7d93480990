"""Norms of each head come before the heads are moved."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.contract import Report, graph_pass
from satchel.graphs.values import Builder, nodes, only_user, producer, rank, replace

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
            transpose = producer(norm.inputs[0], "Transpose")
            if transpose is None or only_user(transpose.outputs[0]) is not norm or rank(norm.inputs[1]) != 1:
                continue
            perm, x = list(transpose.attributes["perm"].value), transpose.inputs[0]
            last = len(perm) - 1
            axis = norm.attributes["axis"].value if "axis" in norm.attributes else -1
            if perm[last] != last or axis not in (-1, last) or x is None:
                continue
            builder, y = Builder(model, norm), norm.outputs[0]
            options = {name: a.value for name, a in norm.attributes.items()}
            normed = builder.value(op_type, [x, *norm.inputs[1:]], f"{norm.name}.sunk", x, **options)
            replace(y, builder.value("Transpose", [normed], f"{norm.name}.moved", y, perm=perm))
            report.count += 1
