"""Shapes that are known relative to the input become constants."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, constant, dims, nodes, replace, weight


@graph_pass
def simplify_shapes(model: ir.Model, report: Report) -> None:
    """Give each Reshape a constant target (0 keeps a dimension, one -1 is inferred), drop each Expand that changes
    nothing, and note the shape of each linear layer that the tracer left without one (where it adds a bias).

    before: x [batch, sequence, 64] -> Reshape(Concat(Shape(x)..., 4, 16)) -> y [batch, sequence, 4, 16]
    after:  x -> Reshape([0, 0, 4, 16]) -> y
    refuses when: two dimensions of the result are neither numbers nor those of the input at the same place (silently:
    such a Reshape is right as it is).
    """
    for node in nodes(model, "Reshape"):
        if constant(node.inputs[1]) is not None:
            continue
        target = _target(dims(node.inputs[0]), dims(node.outputs[0]))
        if target is None:
            continue
        node.replace_input_with(1, Builder(model).shape(*target))
        node.attributes.pop("allowzero", None)
        report.count += 1
    for node in nodes(model, "Expand"):
        before, after = dims(node.inputs[0]), dims(node.outputs[0])
        if before is not None and before == after and None not in before and node.inputs[0] is not None:
            replace(node.outputs[0], node.inputs[0])
            report.count += 1
    for node in nodes(model, "MatMul"):
        x, matrix, product = node.inputs[0], weight(node.inputs[1]), node.outputs[0]
        if product.shape is None and matrix is not None and len(matrix.dims) == 2 and x is not None and x.shape:
            product.shape, product.type = ir.Shape([*x.shape[:-1], matrix.dims[1]]), x.type
            report.count += 1


def _target(before: list[int | str | None] | None, after: list[int | str | None] | None) -> list[int] | None:
    if before is None or after is None:
        return None
    target: list[int] = []
    for index, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif size is not None and index < len(before) and before[index] == size:
            target.append(0)
        else:
            target.append(-1)
    # A literal 0 would be read as "keep": leave shapes with empty dimensions alone.
    return target if target.count(-1) <= 1 and 0 not in [d for d in after if isinstance(d, int)] else None
