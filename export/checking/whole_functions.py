"""Keeps function operators from being expanded while ONNX Runtime optimizes a graph for another provider than the CPU.

ONNX Runtime expands an operator that ONNX defines by others, such as Softmax, if the CPU has no kernel for its type. A
provider with such a kernel gets the operator itself. So, during optimization, such a node is wrapped in casts to
float32, which the CPU has a kernel for; the casts are removed afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir

from satchel.export.checking.installed_kernels import cpu_kernels
from satchel.graphs.providers.cpu_rules import CASTS
from satchel.graphs.providers.findings import GraphView
from satchel.graphs.providers.kernels import Match, type_name

MARK = "satchel.whole/"
NARROW = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}


def wrap(proto: onnx.ModelProto, view: GraphView) -> bool:
    """Wrap the nodes that would be expanded in casts; `view` is the typed graph. Returns whether there were any."""
    opset = view.model.graph.opset_imports.get("", 1)
    outer = {id(node) for node in view.model.graph}
    found = {node.outputs[0].name: _types(node) for node in view.nodes if id(node) in outer and _expands(node, opset)}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        types = found.get(node.output[0])
        if types is None:
            nodes.append(node)
            continue
        after = []
        for index, name in enumerate(node.input):
            if name in types:
                node.input[index] = f"{MARK}{node.output[0]}/{index}"
                nodes.append(_cast(name, node.input[index], onnx.TensorProto.FLOAT))
        for index, name in enumerate(node.output):
            if name in types:
                node.output[index] = f"{MARK}{name}"
                after.append(_cast(node.output[index], name, NARROW[types[name]]))
        nodes += [node, *after]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return bool(found)


def unwrap(proto: onnx.ModelProto) -> None:
    """Remove the casts that `wrap` inserted."""
    into = {node.output[0]: node.input[0] for node in proto.graph.node if _is_ours(node, node.output)}
    out_of = {node.input[0]: node.output[0] for node in proto.graph.node if _is_ours(node, node.input)}
    kept = [n for n in proto.graph.node if not (_is_ours(n, n.output) or _is_ours(n, n.input))]
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = into.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = out_of.get(name, name)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)


def _expands(node: ir.Node, opset: int) -> bool:
    if node.domain != "" or not onnx.defs.has(node.op_type, opset):
        return False
    schema: Any = onnx.defs.get_schema(node.op_type, opset)  # its type stub is incomplete
    if not (schema.has_function or schema.has_context_dependent_function):
        return False
    table = cpu_kernels()
    casts = {**CASTS, "bfloat16": "float"}
    return table.fit(node, opset).match is Match.NO_TYPE and table.fit(node, opset, casts).match is Match.FITS


def _types(node: ir.Node) -> Mapping[str, str]:
    """The 16-bit float types of the values of a node, by name."""
    named = {str(v.name): type_name(v.dtype) for v in (*node.inputs, *node.outputs) if v is not None and v.dtype}
    return {name: kind for name, kind in named.items() if kind in NARROW}


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], f"{MARK}{target}", to=to)


def _is_ours(node: onnx.NodeProto, side: list[str]) -> bool:
    return node.op_type == "Cast" and any(name.startswith(MARK) for name in side)
