"""Look-ups by position become inputs."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.inputs import TABLE, block_start, cache_capacity, is_positions, static_input
from satchel.graphs.ir.values import attributes, constant, dims, nodes, producer, replace, weight
from satchel.graphs.ir.weights import LazyWeight


@graph_pass
def hoist_position_gathers(model: ir.Model, report: Report) -> None:
    """Take the rows of position tables as inputs, so that the graph knows no positions.

    The input carries its table, as the mark TABLE: one row for each position of the cache. A table that the text's
    length chooses rows of has two blocks: the rows of the first, and after them one for each position.

    before: Gather(table [positions, width], position_ids) -> [1, tokens, width]      (or position_ids + constant)
    after:  <table>.rows (input) [1, tokens, width]
    refuses when: the positions look up something other than rows of a table of rank 2, the table has fewer rows than
    the cache has positions, or shapes are not numbers.
    """
    for node in nodes(model, "Gather"):
        table, index = node.inputs[:2]
        lazy, offset, start = weight(table), _offset(model, index), 0 if index is None else block_start(index) or 0
        if lazy is None or offset is None:
            continue
        with report.refusing(node):
            rows = _input(model, node, lazy, offset, start)
            replace(node.outputs[0], rows)
            report.count += 1


def _offset(model: ir.Model, index: ir.Value | None) -> int | None:
    """What is added to the token's position; None where `index` does not come from positions."""
    if index is None:
        return None
    if is_positions(index) or block_start(index) is not None:
        return 0
    add = producer(index, "Add")
    if add is None:
        return None
    for value, other in (add.inputs, reversed(add.inputs)):
        known = constant(other)
        if value is not None and is_positions(value) and known is not None and known.size == 1:
            return int(known.reshape(()))
    return None


def _input(model: ir.Model, node: ir.Node, lazy: LazyWeight, offset: int, start: int) -> ir.Value:
    """The input for rows of a table; `start` is the first row of its second block, 0 for a table of one."""
    match dims(node.outputs[0]), lazy.dims:
        case [1, int(tokens), int(width)], (int(), int()) if attributes(node, axis=0)["axis"] == 0:
            capacity = cache_capacity(model)
        case _:
            raise Refused("what positions look up is not [1, tokens, width] out of [positions, width]")
    count = start + (capacity or 0)
    if capacity is None or offset < 0 or offset + count > lazy.dims[0]:
        raise Refused(f"the table {lazy.name} has {lazy.dims[0]} rows, too few for {capacity} positions")
    value = static_input(model, f"{lazy.name}.rows", lazy.dtype, (1, tokens, width))
    name = f"{lazy.name}.by_position"
    rows = LazyWeight(
        name, (count, width), lazy.dtype, lambda a, b: lazy.rows(offset + a, offset + b), computed=lazy.computed
    )
    value.meta[TABLE] = rows
    return value
