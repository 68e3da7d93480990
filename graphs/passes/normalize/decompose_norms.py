"""Norms as arithmetic, for providers that have no operator for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, attributes, dims, nodes, rank, replace


@graph_pass
def decompose_norms(model: ir.Model, report: Report) -> None:
    """Write each norm over the last axis as its arithmetic.

    The square is a product of a value with itself, not a power: ONNX Runtime makes LayerNormalization out of the
    arithmetic with a power.

    before: x -> RMSNormalization(scale, eps) -> y
    after:  x / Sqrt(ReduceMean(x * x) + eps) * scale -> y
    before: x -> LayerNormalization(scale, bias, eps) -> y
    after:  d = x - ReduceMean(x);  d / Sqrt(ReduceMean(d * d) + eps) * scale + bias -> y
    refuses when: the norm is over more than the last axis, its mean or deviation is read too, or an attribute is not
    known.
    """
    for op_type in ("RMSNormalization", "LayerNormalization"):
        for node in nodes(model, op_type):
            with report.refusing(node):
                _spell(model, node)
                report.count += 1


def _spell(model: ir.Model, node: ir.Node) -> None:
    options = attributes(node, axis=-1, epsilon=1e-5, stash_type=1)
    (x, scale, bias), result = (*node.inputs, None)[:3], node.outputs[0]
    if x is None or scale is None or options["axis"] not in (-1, (rank(x) or 0) - 1):
        raise Refused("the norm is not over the last axis alone")
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise Refused("its mean or deviation is read, too")
    if x.dtype != ir.DataType.FLOAT:
        raise Refused(f"it is computed in {x.dtype}: a sum of squares wants float32")
    builder, name = Builder(model, node), str(node.name)
    narrow = [*(dims(x) or [])[:-1], 1]

    def make(op_type: str, inputs: list[ir.Value], part: str, shape: Any = None, **more: Any) -> ir.Value:
        value = builder.value(op_type, inputs, f"{name}.{part}", x, **more)
        if shape is not None:
            value.shape = ir.Shape(shape)
        return value

    def mean(value: ir.Value, part: str) -> ir.Value:
        axes = builder.constant(np.asarray([-1], np.int64), "axis.last")
        return make("ReduceMean", [value, axes], part, narrow, keepdims=1)

    if node.op_type == "LayerNormalization":
        x = make("Sub", [x, mean(x, "mean")], "centered")
    epsilon = builder.constant(np.asarray([options["epsilon"]], np.float32), f"epsilon.{options['epsilon']:.9g}")
    square = mean(make("Mul", [x, x], "square"), "mean_square")
    root = make("Sqrt", [make("Add", [square, epsilon], "variance", narrow)], "deviation", narrow)
    value = make("Mul", [make("Div", [x, root], "even"), scale], "scaled")
    if bias is not None:
        value = make("Add", [value, bias], "shifted")
    replace(result, value)
