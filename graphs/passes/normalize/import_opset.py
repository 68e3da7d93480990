"""A graph says that it is of an earlier operator set, where that changes nothing."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, PassError, Report, graph_pass

FIRST = {"Attention": 24, "Swish": 24, "TensorScatter": 24, "RMSNormalization": 23, "RotaryEmbedding": 23}
"""Operators that came, or got other inputs, with these versions."""
ATTRIBUTES = {"round_mode": 24}
"""Attributes that came with these versions."""
LOWEST = 23
"""All other operators of `FIRST`'s time mean the same from this version on: only more types were added to them."""


def import_opset(version: int) -> GraphPass:
    """Import an earlier version of the standard operators.

    A provider's kernels are for versions: one that was not extended since an operator last changed is not found for a
    graph of a later version.

    before: opset 24
    after:  opset `version`
    refuses when: the graph is of that version or an earlier one (silently). An operator or attribute that came later is
    an error.

    Args:
        version: The version, 23 or more.

    Raises:
        ValueError: The version is earlier.
    """
    if version < LOWEST:
        raise ValueError(f"operators mean something else in version {version}: they have to be rewritten")

    def edit(model: ir.Model, report: Report) -> None:
        if model.graph.opset_imports.get("", version) <= version:
            return
        for node in model.graph:
            late = [name for name in node.attributes if ATTRIBUTES.get(name, 0) > version]
            if node.domain == "" and (late or FIRST.get(node.op_type, 0) > version):
                what = f"{node.op_type}'s attribute {late[0]}" if late else node.op_type
                raise PassError(f"{node.name}: {what} is not in version {version} of the standard operators")
            if node.domain == "":
                node.version = None
        model.graph.opset_imports[""] = version
        report.count += 1

    return graph_pass(edit, import_opset)
