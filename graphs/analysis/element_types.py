"""The element type of every value of a graph, where passes that made nodes left it unsaid."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from satchel.graphs.ir.values import MICROSOFT

Types = dict[ir.Value, ir.DataType | None]
"""Element types by value; None where it is not known."""

BOOL = {"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"}
INT64 = {"ArgMax", "ArgMin", "NonZero", "Shape", "Size"}
LIKE_INPUT = {"CastLike": 1, "DequantizeLinear": 1, "GatherBlockQuantized": 2, "OneHot": 2, "Where": 1}
"""Operators whose results have the type of another input than the first."""


def element_types(model: ir.Model) -> Types:
    """The element type of each graph input, initializer and result; a type that a value says itself is believed."""
    types: Types = {value: value.dtype for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph:
        for index, output in enumerate(node.outputs):
            types[output] = output.dtype if output.dtype is not None else _result(node, index, types)
    return types


def _result(node: ir.Node, index: int, types: Types) -> ir.DataType | None:
    """The type of one result by the operator's definition."""
    if node.op_type in BOOL:
        return ir.DataType.BOOL
    if node.op_type in INT64 or (node.op_type == "TopK" and index == 1):
        return ir.DataType.INT64
    special = SPECIAL.get(node.op_type)
    if special is not None:
        return special(node, index, types)
    place = LIKE_INPUT.get(node.op_type, 0)
    return _input(node, place, types)


def _input(node: ir.Node, index: int, types: Types) -> ir.DataType | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else types.get(value)


def _cast(node: ir.Node, index: int, types: Types) -> ir.DataType | None:
    return ir.DataType(node.attributes.get_int("to", 0))


def _constant(node: ir.Node, index: int, types: Types) -> ir.DataType | None:
    """Of Constant, whose number may be in an attribute of another name, and of ConstantOfShape, float if unsaid."""
    if "value" in node.attributes:
        return node.attributes["value"].as_tensor().dtype
    whole = {"value_int", "value_ints"} & set(node.attributes)
    return ir.DataType.INT64 if whole else ir.DataType.FLOAT


def _quantized(node: ir.Node, index: int, types: Types) -> ir.DataType | None:
    return _input(node, 2, types) or ir.DataType(node.attributes.get_int("output_dtype", ir.DataType.UINT8.value))


def _dynamic(node: ir.Node, index: int, types: Types) -> ir.DataType | None:
    return ir.DataType.FLOAT if index == 1 else ir.DataType.UINT8


def _attention(node: ir.Node, index: int, types: Types) -> ir.DataType | None:
    """GroupQueryAttention gives its cache back in the type in which it takes it."""
    return _input(node, 0 if index == 0 or node.domain != MICROSOFT else 2 + index, types)


SPECIAL: dict[str, Callable[[ir.Node, int, Types], ir.DataType | None]] = {
    "Cast": _cast,
    "Constant": _constant,
    "ConstantOfShape": _constant,
    "DynamicQuantizeLinear": _dynamic,
    "GroupQueryAttention": _attention,
    "MatMulInteger": lambda node, index, types: ir.DataType.INT32,
    "QuantizeLinear": _quantized,
}
"""Operators whose results have a type of their own."""
