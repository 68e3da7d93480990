"""Names that a compiler may use as names of files."""

from __future__ import annotations

import re

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass

_OTHER = re.compile(r"[^A-Za-z0-9_.-]")


@graph_pass
def sanitize_names(model: ir.Model, report: Report) -> None:
    """Leave letters, digits, dots, hyphens and underscores in the names of nodes and values, and nothing else.

    before: const/shape.1_32_64
    after:  const.shape.1_32_64      (with a number behind it where that name is taken)
    refuses when: never.
    """
    values = [
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(v for node in model.graph for v in node.outputs),
    ]
    report.count += _rename(values) + _rename(list(model.graph))


def _rename(things: list[ir.Value] | list[ir.Node]) -> int:
    taken, count = {thing.name for thing in things}, 0
    for thing in things:
        name = str(thing.name)
        if thing.name is None or not _OTHER.search(name):
            continue
        plain = _OTHER.sub(".", name)
        new, number = plain, 1
        while new in taken:
            new, number = f"{plain}.{number}", number + 1
        taken.add(new)
        thing.name = new
        count += 1
    return count
