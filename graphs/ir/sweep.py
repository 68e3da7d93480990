"""Takes out what nothing reads."""

from __future__ import annotations

import onnx_ir as ir


def sweep(graph: ir.Graph) -> int:
    """Remove nodes and initializers that no output depends on; returns how many.

    Graph inputs stay: they are the contract.
    """
    removed = 0
    for node in reversed(list(graph)):
        if all(not output.uses() and not output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
            removed += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
            removed += 1
    return removed
