"""CANN rules on what runs well: shapes, names, types, and the kernels available on the device."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from satchel.graphs.providers.facts import cann_facts
from satchel.graphs.providers.findings import Finding, GraphView, at, is_constant, known_rank, of_type, operand

NAME = re.compile(r"[A-Za-z0-9_.\-]+")
FLOAT16_MAX = 65504.0
READ = 1 << 20
"""Constants larger than this many bytes are not checked for their values."""

SHAPE_OPERANDS = {
    "Range": (0, 1, 2), "Expand": (1,), "Reshape": (1,), "Slice": (1, 2, 3, 4), "Tile": (1,), "ConstantOfShape": (0,)
}  # fmt: skip
"""Inputs that determine the shape of the result."""

FIXED_OPERANDS = {"Slice": (1, 2, 3, 4), "Split": (1,), "Expand": (1,), "Reshape": (1,)}
"""Inputs that must be constant for the toolkit's passes to choose a device kernel."""

BY_DATA = ("NonZero", "Compress", "Unique")
"""Operators with a data-dependent output shape."""

ARITHMETIC = (
    "Abs", "Add", "CumSum", "Div", "Expand", "Gemm", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Sub", "Sum",
)  # fmt: skip
INDEX_MOVES = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape")


def shapes_known(view: GraphView) -> Iterator[Finding]:
    """No output shape depends on data."""
    for node in of_type(view, *BY_DATA):
        yield at(node, "its output shape depends on data")
    for node in of_type(view, *SHAPE_OPERANDS):
        open_ones = _computed(node, SHAPE_OPERANDS[node.op_type])
        if open_ones:
            yield at(node, f"its output shape depends on {open_ones}")


def names_are_plain(view: GraphView) -> Iterator[Finding]:
    """Names of the graph and its inputs consist of letters, digits, dots, hyphens and underscores."""
    graph = view.model.graph
    for what, name in (("graph", graph.name), *(("input", value.name) for value in graph.inputs)):
        if not NAME.fullmatch(name or ""):
            yield Finding(f"{what} {name!r}")


def outputs_have_edges(view: GraphView) -> Iterator[Finding]:
    """A graph output that comes from a node with several outputs is also read inside the graph."""
    for node in view.nodes:
        if sum(bool(value.name) for value in node.outputs) < 2:
            continue
        for value in node.outputs:
            if value.is_graph_output() and not value.uses():
                yield at(node, f"output {value.name} is not read inside the graph")


def inputs_and_outputs_are_computed(view: GraphView) -> Iterator[Finding]:
    """No graph output is an input or a constant, and every graph input is read."""
    graph = view.model.graph
    for value in graph.outputs:
        if value.producer() is None:
            kind = "a constant" if is_constant(value) else "an input"
            yield Finding(f"output {value.name} is {kind} passed through")
    constants = set(graph.initializers.values())
    for value in graph.inputs:
        if not value.uses() and value not in constants and not value.is_graph_output():
            yield Finding(f"input {value.name} is not read")


def constants_are_finite(view: GraphView) -> Iterator[Finding]:
    """Constants such as masks are finite in float16."""
    for value in view.model.graph.initializers.values():
        if value.const_value is not None and _beyond_float16(value.const_value):
            yield Finding(f"constant {value.name} has values beyond +-65504")
    for node in of_type(view, "Constant", "ConstantOfShape"):
        for attribute in node.attributes.values():
            if _attribute_beyond_float16(attribute):
                yield at(node, "it has values beyond +-65504")


def no_bfloat16(view: GraphView) -> Iterator[Finding]:
    """No value is bfloat16."""
    yield from _of_dtype(view, ir.DataType.BFLOAT16)


def no_wide_types(view: GraphView) -> Iterator[Finding]:
    """No value is float64, and int64 is used only for ids, indices and shapes."""
    yield from _of_dtype(view, ir.DataType.DOUBLE)
    without = cann_facts().no_int64
    for node in of_type(view, *ARITHMETIC):
        data = operand(node, 0)
        if data is None or data.dtype != ir.DataType.INT64:
            continue
        rank = known_rank(node.outputs[0])
        if node.op_type in without:
            yield at(node, f"{data.name} is int64, which the device kernel does not support")
        elif rank is not None and rank > 1:
            yield at(node, f"int64 arithmetic on a tensor of rank {rank}")


def cache_written_by_where(view: GraphView) -> Iterator[Finding]:
    """The KV cache is written with Where, Concat or Pad, not with a scatter."""
    for node in of_type(view, "Scatter", "ScatterElements", "ScatterND"):
        yield at(node, "it may run on the device's own CPU")


def indices_stay_inside(view: GraphView) -> Iterator[Finding]:
    """No graph output consists of indices from TopK, ArgMax or ArgMin."""
    indices = [node.outputs[1] for node in of_type(view, "TopK") if len(node.outputs) > 1]
    indices += [node.outputs[0] for node in of_type(view, "ArgMax", "ArgMin")]
    waiting = list(indices)
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            yield Finding(f"output {value.name} holds indices, which the device returns as int32")
        for use in value.uses():
            if use.node.op_type in INDEX_MOVES and use.idx == 0:
                waiting.extend(use.node.outputs)


def operands_are_constant(view: GraphView) -> Iterator[Finding]:
    """The operands of Slice, Split, Expand and Reshape other than the data are constant."""
    for node in of_type(view, *FIXED_OPERANDS):
        open_ones = _computed(node, FIXED_OPERANDS[node.op_type])
        if open_ones:
            yield at(node, f"{open_ones} is computed")


def _computed(node: ir.Node, indices: tuple[int, ...]) -> str:
    """The names of the inputs at these indices that are not constant."""
    values = [operand(node, index) for index in indices]
    return ", ".join(str(value.name) for value in values if value is not None and not is_constant(value))


def _of_dtype(view: GraphView, dtype: ir.DataType) -> Iterator[Finding]:
    for value in view.values:
        if value.dtype != dtype:
            continue
        maker, text = value.producer(), f"{value.name} is {dtype.name.lower()}"
        yield Finding(text) if maker is None else at(maker, text)


def _attribute_beyond_float16(attribute: ir.Attr) -> bool:
    if attribute.is_ref():
        return False
    if attribute.type == ir.AttributeType.TENSOR:
        return _beyond_float16(attribute.as_tensor())
    if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        return bool(np.any(~(np.abs(np.asarray(attribute.value, np.float64)) <= FLOAT16_MAX)))
    return False


def _beyond_float16(tensor: ir.TensorProtocol) -> bool:
    # External data is not read: small constants are inside the graph by the time the provider gets it.
    if isinstance(tensor, ir.ExternalTensor) or tensor.nbytes > READ or not tensor.dtype.is_floating_point():
        return False
    values = tensor.numpy().astype(np.float64)
    return bool(np.any(~(np.abs(values) <= FLOAT16_MAX)))
