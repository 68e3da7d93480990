"""Compute at export what depends on constants only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import SMALL, Builder, attributes, constant, replace, weight
from satchel.graphs.ir.weights import from_array, transposed

Arrays = Sequence[np.ndarray]


def _cast(node: ir.Node, inputs: Arrays) -> np.ndarray:
    to = ir.DataType(int(attributes(node, to=1, saturate=1)["to"]))
    return inputs[0].astype(to.numpy())


def _reshape(node: ir.Node, inputs: Arrays) -> np.ndarray:
    data, shape = inputs
    keep = attributes(node, allowzero=0)["allowzero"] == 0
    return data.reshape([data.shape[i] if d == 0 and keep else int(d) for i, d in enumerate(shape)])


def _slice(node: ir.Node, inputs: Arrays) -> np.ndarray:
    attributes(node)
    data, starts, ends, *rest = inputs
    axes = rest[0] if rest else np.arange(len(starts))
    steps = rest[1] if len(rest) > 1 else np.ones(len(starts), np.int64)
    index = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes.tolist(), starts.tolist(), ends.tolist(), steps.tolist(), strict=True):
        index[axis] = slice(start, end, step)
    return data[tuple(index)]


def _unsqueeze(node: ir.Node, inputs: Arrays) -> np.ndarray:
    attributes(node)
    return np.expand_dims(inputs[0], tuple(int(a) for a in inputs[1]))


def _squeeze(node: ir.Node, inputs: Arrays) -> np.ndarray:
    attributes(node)
    return np.squeeze(inputs[0], tuple(int(a) for a in inputs[1]) if len(inputs) > 1 else None)


def _transpose(node: ir.Node, inputs: Arrays) -> np.ndarray:
    perm = attributes(node, perm=None)["perm"]
    return np.transpose(inputs[0], perm)


def _elementwise(function: Callable[..., np.ndarray]) -> Callable[[ir.Node, Arrays], np.ndarray]:
    def evaluate(node: ir.Node, inputs: Arrays) -> np.ndarray:
        attributes(node)
        return np.asarray(function(*inputs)).astype(inputs[0].dtype)

    return evaluate


def _divide(dividend: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    if dividend.dtype.kind not in "iu":
        return np.asarray(dividend / divisor)
    inexact_negative = (dividend % divisor != 0) & ((dividend < 0) != (divisor < 0))
    return np.asarray(dividend // divisor + inexact_negative)  # ONNX rounds towards zero


EVALUATORS: dict[str, Callable[[ir.Node, Arrays], np.ndarray]] = {
    "Cast": _cast,
    "Reshape": _reshape,
    "Slice": _slice,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Identity": lambda node, inputs: inputs[0],
    "Concat": lambda node, inputs: np.concatenate(inputs, axis=int(attributes(node, axis=None)["axis"])),
    "Gather": lambda node, inputs: np.take(inputs[0], inputs[1], axis=int(attributes(node, axis=0)["axis"])),
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _elementwise(_divide),
    "Neg": _elementwise(np.negative),
    "Sqrt": _elementwise(np.sqrt),
    "Reciprocal": _elementwise(np.reciprocal),
}
"""Operators that are evaluated, with the arithmetic of their ONNX definition in the inputs' own dtype."""


@graph_pass
def fold_constants(model: ir.Model, report: Report) -> None:
    """Replace nodes whose inputs are small constants by their value, and the transpose of a large weight by a lazily
    transposed weight.

    before: [2] -> Cast -> Reshape -> shape       W -> Transpose -> MatMul
    after:  shape (initializer)                   W.T (lazy initializer) -> MatMul
    refuses when: an evaluated operator has an attribute that its evaluator does not know.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Constant" and node.domain == "":
            array = constant(node.outputs[0])
            if array is None or node.outputs[0].is_graph_output():
                continue
        elif _is_weight_transpose(node):
            _fold_transpose(model, node)
            report.count += 1
            continue
        else:
            array = _evaluate(node, report)
            if array is None:
                continue
        _put(model, node, array)
        report.count += 1


def _evaluate(node: ir.Node, report: Report) -> np.ndarray | None:
    if node.domain != "" or node.op_type not in EVALUATORS or node.outputs[0].is_graph_output() or None in node.inputs:
        return None
    inputs = [constant(value) for value in node.inputs]
    if not inputs or any(array is None for array in inputs):
        return None
    try:
        array = EVALUATORS[node.op_type](node, [a for a in inputs if a is not None])
    except Refused as refusal:
        report.refuse(node, str(refusal))
        return None
    return array if array.nbytes <= SMALL else None


def _put(model: ir.Model, node: ir.Node, array: np.ndarray) -> None:
    (output,) = node.outputs
    floats = array.dtype.kind == "f" and array.size > 1
    tensor: ir.TensorProtocol = (
        from_array(str(output.name), array, computed=True)
        if floats
        else ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=output.name)
    )
    name, output.name = str(output.name), f"{output.name}.folded"
    tensor.name = name
    replace(output, Builder(model).initializer(tensor))
    model.graph.remove(node, safe=True)


def _is_weight_transpose(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain != "" or set(node.attributes) - {"perm"}:
        return False
    lazy = weight(node.inputs[0])
    perm = node.attributes["perm"].value if "perm" in node.attributes else None
    return lazy is not None and len(lazy.dims) == 2 and tuple(perm or (1, 0)) == (1, 0)


def _fold_transpose(model: ir.Model, node: ir.Node) -> None:
    lazy = weight(node.inputs[0])
    if lazy is None:
        return
    name = f"{lazy.name}.T"
    there = model.graph.initializers.get(name)
    replace(node.outputs[0], there if there is not None else Builder(model).initializer(transposed(lazy, name)))
    model.graph.remove(node, safe=True)
