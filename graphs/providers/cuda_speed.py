"""CUDA rules on what runs but could run better: CUDA graphs, quantized linear layers, the KV cache."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from satchel.graphs.ir.values import producer
from satchel.graphs.providers.facts import VERSIONS
from satchel.graphs.providers.findings import Finding, GraphView, at, is_constant, number, of_type, operand

FLOW = ("If", "Loop", "Scan")
MATMULS = ("MatMul", "Gemm")
CACHE_RANK = 4
SCATTERS = ("ScatterND", "ScatterElements", "TensorScatter")
FEW_BITS = ("INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8")
BYTES = (ir.DataType.INT8, ir.DataType.UINT8)


def decode_has_fixed_shapes(view: GraphView) -> Iterator[Finding]:
    """The inputs of decode have static shapes, or dimensions that are fixed with the cache buffers."""
    if view.phase != "decode":
        return
    chosen = _sizes_of_caches(view)
    for value in view.model.graph.inputs:
        sizes = [str(size.value) for size in (value.shape or ()) if not isinstance(size, int)]
        growing = [size for size in sizes if size not in chosen]
        if growing or value.shape is None:
            yield Finding(f"input {value.name}: {', '.join(growing) or 'its shape'} may change from token to token")


def decode_has_no_control_flow(view: GraphView) -> Iterator[Finding]:
    """Decode has no branches or loops."""
    if view.phase == "decode":
        for node in of_type(view, *FLOW):
            yield at(node, "control flow")


def activations_in_float(view: GraphView) -> Iterator[Finding]:
    """Activations are not quantized, since CUDA computes no linear layer in int8."""
    for node in of_type(view, "QuantizeLinear"):
        if is_constant(operand(node, 0)):
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        if any(reader.op_type == "DequantizeLinear" for reader in readers):
            yield at(node, "activations are quantized, but the matmul runs in float")


def weights_are_fused(view: GraphView) -> Iterator[Finding]:
    """Every quantized weight has the form that is fused into MatMulNBits; others are dequantized in every run."""
    old = view.kernels is not None and view.kernels.name.endswith(VERSIONS[0])
    for node in of_type(view, "DequantizeLinear"):
        codes = operand(node, 0)
        if codes is not None and is_constant(codes) and codes.dtype is not None and codes.dtype.name in FEW_BITS:
            reason = _not_fused(node, old)
            if reason is not None:
                yield at(node, reason)


def cache_read_after_write(view: GraphView) -> Iterator[Finding]:
    """A cache that is written in place is read from the result of the write."""
    for node in of_type(view, *SCATTERS):
        past = operand(node, 0)
        if past is None or not past.is_graph_input():
            continue
        for use in past.uses():
            if use.node is not node:
                yield at(use.node, f"it reads {past.name}, which {node.name or node.op_type} writes in place")


def _sizes_of_caches(view: GraphView) -> set[str]:
    """Names of the symbolic dimensions of KV caches, [batch, heads, length, width], that an output matches."""
    graph = view.model.graph
    outputs = [value.shape for value in graph.outputs if value.shape is not None]
    caches = [value.shape for value in graph.inputs if value.shape is not None and len(value.shape) == CACHE_RANK]
    return {str(size.value) for shape in caches if shape in outputs for size in shape if not isinstance(size, int)}


def _not_fused(dequantize: ir.Node, old: bool) -> str | None:
    """Why a weight's DequantizeLinear is not fused into a MatMulNBits, or None.

    Args:
        dequantize: The node.
        old: Whether this is ONNX Runtime 1.24, which fuses only 4-bit weights with groups.
    """
    codes, scales, zeros = (operand(dequantize, index) for index in range(3))
    cast = producer(scales, "Cast")
    if cast is not None:  # folded before
        scales = cast.inputs[0]
    uses = dequantize.outputs[0].uses()
    if len(uses) != 1:
        return f"{len(uses)} nodes read it, but only one may"
    reader = next(iter(uses))
    if reader.node.op_type not in MATMULS or reader.idx != 1:
        return f"{reader.node.op_type} reads it, but the second input of a MatMul or Gemm must"
    if codes is None or scales is None or not is_constant(scales) or (zeros is not None and not is_constant(zeros)):
        return "its scales are computed"
    if len(codes.uses()) > 1 or len(scales.uses()) > 1:
        return "its values or scales are shared with another node"
    maker = None if reader.node.inputs[0] is None else reader.node.inputs[0].producer()
    if maker is not None and maker.op_type == "DequantizeLinear":
        return "the activations are quantized too"
    return _not_a_form(dequantize, codes, scales, old)


def _not_a_form(dequantize: ir.Node, codes: ir.Value, scales: ir.Value, old: bool) -> str | None:
    ranks = [None if value.shape is None else len(value.shape) for value in (codes, scales)]
    if ranks[0] != 2:
        return "the weight is not a matrix"
    block = number(dequantize, "block_size", 0)
    axis = number(dequantize, "axis", 1)
    if block:
        if axis % 2 != 0 or block < 16 or block & (block - 1):
            return f"group size {block} on axis {axis}: only group sizes 16, 32, 64, ... on axis 0 are fused"
        return "8-bit weights with groups are fused from ONNX Runtime 1.25 on" if old and codes.dtype in BYTES else None
    if old:
        return "per-channel and per-tensor scales are fused from ONNX Runtime 1.25 on"
    if ranks[1] == 1 and axis % 2 != 1 and scales.shape is not None and scales.shape[0] != 1:
        return "it has one scale per input"
    return None
