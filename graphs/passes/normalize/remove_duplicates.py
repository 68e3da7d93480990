"""One node for computations that are the same."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, constant, replace, weight
from satchel.graphs.quant.quantized import LAYOUT

RANDOM = {
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"
}  # fmt: skip

KNOWN = ("", MICROSOFT, INTERNAL)
"""Domains whose operators are known to give equal results for equal inputs."""


@graph_pass
def remove_duplicates(model: ir.Model, report: Report) -> None:
    """Let nodes of the same operator, attributes and inputs be one node, and equal small constants one initializer.

    before: x -> Shape -> a      x -> Shape -> b
    after:  x -> Shape -> a, b
    refuses when: the operator is random or of a domain of a user's own, has a subgraph, or an attribute that does not
    compare; or the constant is one that a device makes, by its name (silently: these are no duplicates).
    """
    seen_constants: dict[Hashable, ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        lazy = weight(value)
        array = None if lazy is not None and LAYOUT in lazy.meta else constant(value)
        if array is None or value.is_graph_output():
            continue
        key = (array.dtype.name, array.shape, array.tobytes())
        first = seen_constants.setdefault(key, value)
        if first is not value and value.uses():
            ir.convenience.replace_all_uses_with(value, first)
            report.count += 1
    seen: dict[Hashable, ir.Node] = {}
    for node in list(model.graph):
        attributes = _attributes_key(node)
        if attributes is None or node.op_type in RANDOM or node.domain not in KNOWN:
            continue
        node_key = (node.domain, node.op_type, attributes, tuple(map(id, node.inputs)), len(node.outputs))
        first_node = seen.setdefault(node_key, node)
        if first_node is node or any(o.is_graph_output() for o in node.outputs):
            continue
        for old, new in zip(node.outputs, first_node.outputs, strict=True):
            replace(old, new)
        model.graph.remove(node, safe=True)
        report.count += 1


def _attributes_key(node: ir.Node) -> Hashable | None:
    parts: list[Hashable] = []
    for name, attribute in sorted(node.attributes.items()):
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            array = np.asarray(value.numpy())
            value = (array.dtype.name, array.shape, array.tobytes())
        elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return None
        try:
            hash(value)
        except TypeError:
            value = tuple(value)
        parts.append((name, attribute.type.name, value))
    return tuple(parts)
