"""Invariants that hold after every pass."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import PassError


def signature(model: ir.Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the graph's inputs and outputs, in order."""
    return tuple(str(v.name) for v in model.graph.inputs), tuple(str(v.name) for v in model.graph.outputs)


def verify(model: ir.Model) -> None:
    """Check that names are unique, nodes are sorted, no value dangles and every domain is imported.

    Raises:
        PassError: One of these does not hold; the message says which and where.
    """
    graph = model.graph
    known: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
    names: set[str] = set()
    for value in known:
        _take_name(value, names)
    for initializer in graph.initializers.values():
        if initializer.const_value is None:
            raise PassError(f"initializer {initializer.name} has no value")
    for node in graph:
        if node.domain not in model.opset_imports:
            raise PassError(f"node {node.name} is of domain {node.domain!r}, which the model does not import")
        for read in node.inputs:
            if read is not None and read not in known:
                raise PassError(f"node {node.name} ({node.op_type}) reads {read.name}, which nothing before it makes")
        for value in node.outputs:
            if value.name == "" and not value.uses():
                continue  # an optional output that is not asked for
            _take_name(value, names)
            known.add(value)
    for value in graph.outputs:
        if value not in known:
            raise PassError(f"output {value.name} is made by nothing")


def _take_name(value: ir.Value, names: set[str]) -> None:
    if not value.name:
        raise PassError("a value has no name")
    if value.name in names:
        raise PassError(f"two values are called {value.name}")
    names.add(value.name)
