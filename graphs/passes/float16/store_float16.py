"""Weights are stored in half precision and computed with in single precision."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import PassError, Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, Builder, replace, weight
from satchel.graphs.ir.weights import LazyWeight, mapped

TABLE = 1
"""The input of satchel::TableLinear."""


@graph_pass
def store_float16(model: ir.Model, report: Report) -> None:
    """Store each float32 weight as float16, with a Cast to float32 in front of its readers; what is looked up is cast
    after the look-up.

    satchel's own operator reads a table as it is.

    before: W float32 -> MatMul          ids -> Gather(E float32) -> x          x -> satchel::TableLinear(E float32)
    after:  W float16 -> Cast -> MatMul  ids -> Gather(E float16) -> Cast -> x  x -> satchel::TableLinear(E float16)
    refuses when: the weight has no dimensions, or no checkpoint holds it, as a rotary table (silently). Writing
    fails if a value is beyond float16's largest, 65,504.
    """
    for value in list(model.graph.initializers.values()):
        lazy = weight(value)
        if lazy is None or lazy.computed or lazy.dtype != ir.DataType.FLOAT or not lazy.dims:
            continue
        store_half(model, value, lazy)
        report.count += 1


def store_half(model: ir.Model, value: ir.Value, lazy: LazyWeight) -> None:
    """Store one weight as float16, with a Cast for its readers that do not take float16."""
    readers = [use.node for use in value.uses()]
    half = Builder(model).initializer(halved(lazy, "export with --precision fp32"))
    for node in readers:
        if (node.domain, node.op_type) == (INTERNAL, "TableLinear"):
            node.replace_input_with(TABLE, half)
        elif node.op_type == "Gather":
            node.replace_input_with(0, half)
            output = node.outputs[0]
            float32 = Builder(model, _first(model, output)).value(
                "Cast", [output], f"{node.name}.float32", to=ir.DataType.FLOAT
            )
            float32.shape, float32.type, output.type = (
                output.shape,
                ir.TensorType(ir.DataType.FLOAT),
                ir.TensorType(ir.DataType.FLOAT16),
            )
            for use in list(output.uses()):
                if use.node is not float32.producer():
                    use.node.replace_input_with(use.idx, float32)
    if value.uses():
        first = _first(model, value)
        replace(value, Builder(model, first).value("Cast", [half], f"{lazy.name}.float32", value, to=ir.DataType.FLOAT))


def halved(lazy: LazyWeight, advice: str) -> LazyWeight:
    """The weight in float16, under the name `NAME.fp16`.

    Args:
        lazy: The weight in float32.
        advice: What to do where a value is beyond float16; reading the weight then raises PassError.
    """
    half = mapped(lazy, lambda array: _round(lazy.name, array, advice), f"{lazy.name}.fp16", ir.DataType.FLOAT16)
    half.computed = lazy.computed
    return half


def _first(model: ir.Model, value: ir.Value) -> ir.Node:
    """The first node in the graph's order that reads the value."""
    readers = {id(node) for node in value.consumers()}
    return next(node for node in model.graph if id(node) in readers)


def _round(name: str, array: np.ndarray, advice: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.isinf(half).any() and not np.isinf(array).any():
        raise PassError(f"{name} has a value of {np.abs(array).max():.4g}, beyond float16's 65504: {advice}")
    return half
