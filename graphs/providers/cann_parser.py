"""CANN rules on what its parser supports; the graph is parsed as a whole, at the first run."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from satchel.graphs.providers.facts import CannFacts, cann_facts, covers
from satchel.graphs.providers.findings import WARNING, Finding, GraphView, at, is_constant, of_type, operand

STANDARD = ("", "ai.onnx")
QUANTIZED = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul",
    "QLinearConv",
)  # fmt: skip
LOOPS = ("Loop", "Scan")
NATIVE = ("Constant",)
"""Operators that are parsed without an entry of their own."""

LARGEST = 1 << 31  # bytes


def opset_in_range(view: GraphView) -> Iterator[Finding]:
    """The parser supports the opset that the graph imports."""
    opset, (low, high) = _opset(view), cann_facts().opsets
    if not low <= opset <= high:
        yield Finding(f"opset {opset}, but the parser supports {low} to {high}")


def standard_domain(view: GraphView) -> Iterator[Finding]:
    """Every operator is in the ai.onnx domain."""
    for node in view.nodes:
        if node.domain not in STANDARD:
            yield at(node, f"domain {node.domain}")


def parser_entry(view: GraphView) -> Iterator[Finding]:
    """The parser has an entry for every operator at the graph's opset.

    If the parser does not support the opset, operators are checked at the recommended opset instead.
    """
    facts = cann_facts()
    opset = _parsed_opset(view, facts)
    for node in _others(view):
        if node.op_type in NATIVE or node.op_type == "LayerNormalization":
            continue
        master, released = facts.parser.get(node.op_type, ("", ""))
        if not covers(master, opset):
            known = f"only at opset {master}" if master else "at no opset"
            yield at(node, f"the parser supports it {known}, not at {opset}")
        elif not covers(released, opset):
            message = f"only the development branch of the open parser supports it at opset {opset}"
            yield at(node, message, severity=WARNING)


def no_quantized(view: GraphView) -> Iterator[Finding]:
    """No quantized operator remains after constants are folded."""
    for node in of_type(view, *QUANTIZED):
        what = "weights" if is_constant(operand(node, 0)) else "activations"
        yield at(node, f"it works on {what}, and the parser supports it at no opset")


def no_loops(view: GraphView) -> Iterator[Finding]:
    """There are no loops, and no branches, which enable_cann_subgraph leaves to the CPU."""
    for node in of_type(view, *LOOPS):
        yield at(node, "the parser does not support loops")
    for node in of_type(view, "If"):
        yield at(node, "with enable_cann_subgraph it runs on the CPU", severity=WARNING)


def whitelisted(view: GraphView) -> Iterator[Finding]:
    """Every operator is in the list that the provider applies with enable_cann_subgraph."""
    known = cann_facts().whitelist
    for node in _others(view):
        if node.op_type in NATIVE or node.op_type in ("If", "LayerNormalization"):
            continue
        if node.op_type not in known:
            yield at(node, "not in the provider's list: with enable_cann_subgraph it runs on the CPU")
        elif all(value is None or is_constant(value) for value in node.inputs):
            yield at(node, "all its inputs are constants: with enable_cann_subgraph it runs on the CPU")


def no_layer_normalization(view: GraphView) -> Iterator[Finding]:
    """There is no LayerNormalization."""
    for node in of_type(view, "LayerNormalization"):
        yield at(node, "only the parser's development branch supports it, at opsets 17 and 18")


def static_inputs(view: GraphView) -> Iterator[Finding]:
    """Every input has a static shape with at least one dimension, all of them positive."""
    constants = set(view.model.graph.initializers.values())
    for value in view.model.graph.inputs:
        if value in constants:
            continue
        if value.shape is None:
            yield Finding(f"input {value.name}: its shape is unknown")
            continue
        shape = [size if isinstance(size, int) else size.value for size in value.shape.dims]
        if not shape or not all(isinstance(size, int) and size >= 1 for size in shape):
            text = ", ".join("?" if size is None else str(size) for size in shape)
            yield Finding(f"input {value.name}: shape [{text}]")


def below_two_gigabytes(view: GraphView) -> Iterator[Finding]:
    """The graph including all weights is smaller than 2 GiB."""
    size = sum(v.const_value.nbytes for v in view.model.graph.initializers.values() if v.const_value is not None)
    for node in view.nodes:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                size += attribute.as_tensor().nbytes
    if size >= LARGEST:
        yield Finding(f"{size:,} bytes of weights, but the limit is {LARGEST - 1:,}")


def ir_version(view: GraphView) -> Iterator[Finding]:
    """The released wheel supports the file's IR version."""
    found, highest = view.model.ir_version, cann_facts().ir_version
    if found > highest:
        yield Finding(f"IR version {found}, but onnxruntime-cann supports up to {highest}")


def _others(view: GraphView) -> Iterator[ir.Node]:
    """The nodes that have no separate rule."""
    for node in view.nodes:
        if node.domain in STANDARD and node.op_type not in QUANTIZED + LOOPS:
            yield node


def _opset(view: GraphView) -> int:
    return view.model.graph.opset_imports.get("", 1)


def _parsed_opset(view: GraphView, facts: CannFacts) -> int:
    low, high = facts.opsets
    opset = _opset(view)
    return opset if low <= opset <= high else facts.recommended_opset
