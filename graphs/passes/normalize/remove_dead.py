"""Drop what no output depends on."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.sweep import sweep


@graph_pass
def remove_dead(model: ir.Model, report: Report) -> None:
    """Drop nodes and initializers that no output depends on.

    before: x -> A -> y (output)      x -> B -> z (read by nothing)
    after:  x -> A -> y
    refuses when: never.
    """
    report.count += sweep(model.graph)
