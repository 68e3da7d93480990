"""From the tracer's operator set to version 17."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import Builder, attributes, constant, dims, replace

OPSET, IR_VERSION = 17, 8

UNCHANGED = frozenset(
    """
    Abs Add And Ceil Clip Concat Cos Div Equal Erf Exp Expand Flatten Floor Gather GatherElements Gemm Greater
    GreaterOrEqual LeakyRelu Less LessOrEqual Log MatMul Max Min Mul Neg Not Or Pow ReduceSum Relu Reciprocal Round
    Sigmoid Sign Sin Slice Softmax Softplus Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Unsqueeze Where
    """.split()  # noqa: SIM905
)
"""Operators that mean at 17 what they mean at the version of the tracer, attributes included."""

Rewrite = Callable[[ir.Model, ir.Node], bool]


@graph_pass
def lower_opset(model: ir.Model, report: Report) -> None:
    """Write every operator in its form of version 17, and import that version of the standard set alone.

    before: ReduceMean(x, axes)  Split(x, num_outputs)  Gelu(x)  Swish(x)  Cast(x, saturate)     opset 24, IR 10
    after:  ReduceMean(x; axes)  Split(x, sizes)  x * 0.5 * (1 + Erf(x / sqrt 2))  x * Sigmoid(x)  Cast(x)   17, IR 8
    refuses when: an operator has no such form here, or an attribute is not known. Then the model keeps its version.
    """
    if model.graph.opset_imports.get("") == OPSET:
        return
    for node in list(model.graph):
        with report.refusing(node):
            report.count += _lower(model, node)
    if report.refusals:
        return
    for node in model.graph:
        node.version = None
    model.graph.opset_imports.clear()
    model.graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    report.count += 1


def _lower(model: ir.Model, node: ir.Node) -> bool:
    """Rewrite one node; whether that changed it."""
    if node.domain != "":
        raise Refused(f"{node.domain}::{node.op_type} is not of the standard set")
    if node.op_type in REWRITES:
        return REWRITES[node.op_type](model, node)
    if node.op_type not in UNCHANGED:
        raise Refused(f"{node.op_type} has no form in operator set {OPSET} that is known here")
    return False


def _reduction(model: ir.Model, node: ir.Node) -> bool:
    options = attributes(node, keepdims=1, noop_with_empty_axes=0, axes=None)
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    axes = constant(node.inputs[1])
    if axes is None or options["noop_with_empty_axes"]:
        raise Refused(f"the axes of {node.op_type} are not constants")
    _again(model, node, [node.inputs[0]], keepdims=options["keepdims"], axes=axes.tolist())
    return True


def _split(model: ir.Model, node: ir.Node) -> bool:
    options = attributes(node, axis=0, num_outputs=None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return False
    axis, shape = int(options["axis"]), dims(node.inputs[0])
    width = None if shape is None else shape[axis]
    if not isinstance(width, int):
        raise Refused("the width that is split is not a number")
    each = math.ceil(width / len(node.outputs))
    sizes = np.asarray([min(each, width - i * each) for i in range(len(node.outputs))], np.int64)
    operand = Builder(model, node).constant(sizes, "sizes." + "_".join(map(str, sizes)))
    node.resize_inputs(2)
    node.replace_input_with(1, operand)
    node.attributes.pop("num_outputs", None)
    return True


def _cast(model: ir.Model, node: ir.Node) -> bool:
    attributes(node, to=None, saturate=1, round_mode="up")
    return any(node.attributes.pop(name, None) is not None for name in ("saturate", "round_mode"))


def _reshape(model: ir.Model, node: ir.Node) -> bool:
    attributes(node, allowzero=0)
    return False


def _gelu(model: ir.Model, node: ir.Node) -> bool:
    approximate = attributes(node, approximate="none")["approximate"]
    x, make, number = _tools(model, node)
    if approximate == "tanh":
        cube = make("Mul", [make("Mul", [x, x], "square"), x], "cube")
        inner = make("Add", [x, make("Mul", [cube, number(0.044715)], "bend")], "bent")
        bell = make("Tanh", [make("Mul", [inner, number(math.sqrt(2 / math.pi))], "inner")], "bell")
    else:
        bell = make("Erf", [make("Mul", [x, number(math.sqrt(0.5))], "inner")], "bell")
    gate = make("Mul", [make("Add", [bell, number(1.0)], "share"), number(0.5)], "gate")
    replace(node.outputs[0], make("Mul", [x, gate], "gelu"))
    return True


def _swish(model: ir.Model, node: ir.Node) -> bool:
    alpha = attributes(node, alpha=1.0)["alpha"]
    x, make, number = _tools(model, node)
    steep = x if alpha == 1.0 else make("Mul", [x, number(alpha)], "steep")
    replace(node.outputs[0], make("Mul", [x, make("Sigmoid", [steep], "share")], "swish"))
    return True


def _tools(model: ir.Model, node: ir.Node) -> tuple[Any, Callable[..., ir.Value], Callable[[float], ir.Value]]:
    """The node's input, a function that adds a node like it, and one for constants of its type."""
    x, builder = node.inputs[0], Builder(model, node)
    if x is None or x.dtype is None:
        raise Refused(f"the type of what {node.op_type} reads is not known")
    dtype = x.dtype.numpy()

    def make(op_type: str, inputs: list[ir.Value | None], part: str) -> ir.Value:
        return builder.value(op_type, inputs, f"{node.name}.{part}", x)

    def number(value: float) -> ir.Value:
        return builder.constant(np.asarray([value], dtype), f"{np.dtype(dtype).name}.{value:.9g}")

    return x, make, number


def _again(model: ir.Model, node: ir.Node, inputs: list[ir.Value | None], **options: Any) -> None:
    """The same operator with other inputs and attributes."""
    name, result = str(node.name), node.outputs[0]
    new = Builder(model, node).value(node.op_type, inputs, f"{name}.{OPSET}", result, **options)
    replace(result, new)


REWRITES: dict[str, Rewrite] = {
    "Cast": _cast,
    "Gelu": _gelu,
    "ReduceMax": _reduction,
    "ReduceMean": _reduction,
    "ReduceMin": _reduction,
    "ReduceProd": _reduction,
    "Reshape": _reshape,
    "Split": _split,
    "Swish": _swish,
}
