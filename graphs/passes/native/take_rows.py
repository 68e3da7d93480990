"""One run for new tokens of several sequences, in one row."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.analysis.linear import ROW_OFFSETS as LINEAR_OFFSETS
from satchel.graphs.analysis.linear import linears, rounded_by_row, set_input
from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.inputs import POSITIONS, ROTARY_ROWS, graph_input
from satchel.graphs.ir.values import INTERNAL, Builder, nodes, producer, replace
from satchel.graphs.passes.adapt.attach_adapters import TENSORS
from satchel.graphs.passes.logits.slice_last_logits import NAME as LAST_TOKEN
from satchel.runtime.bundle.contract import ATTENTION_MASK, BLOCK_TABLE, INPUT_IDS, ROW_OFFSETS, TEXT_LENGTH

PAST, LENGTHS, OFFSETS, TABLE = (3, 4), (5, 6), 10, 11
"""Inputs of satchel::Attention."""

COUNTING = {"ReduceSum", "Shape", "Gather", "Sub", "Min", "Max", "Cast", "Greater", "Mul"}
"""Operators that make lengths and positions of the mask."""


@graph_pass
def take_rows(model: ir.Model, report: Report) -> None:
    """Let `input_ids` [1, tokens] be new tokens of several sequences, whose keys and values are in blocks.

    The inputs `row_offsets` and `block_table` are empty where a run is of whole rows, as before.

    before: attention_mask, input_ids -> sums and differences -> positions, and the row of the last token
    after:  attention_mask, input_ids, row_offsets -> satchel::Positions, satchel::LastToken
            and satchel::Linear reads row_offsets in front of the last token, satchel::Attention both inputs
    refuses when: a layer keeps something else than keys and values of satchel::Attention, the mask goes anywhere else,
    or the logits are not of the last token.
    """
    attends = list(nodes(model, "Attention", INTERNAL))
    if not attends:
        return
    with report.refusing(attends[0]):
        _check_inputs(model)
        last = _last_token(model)
        positions = [n for n in model.graph if n.op_type == "Add" and _is_positions(n)]
        _check_mask(graph_input(model, ATTENTION_MASK), {last, *positions})
        _rewrite(model, last, positions)
        report.count += 1


def _check_inputs(model: ir.Model) -> None:
    plain = {INPUT_IDS, ATTENTION_MASK, TEXT_LENGTH}
    for value in model.graph.inputs:
        if value.name in plain or TENSORS in value.meta:
            continue
        for use in value.uses():
            if (use.node.domain, use.node.op_type) != (INTERNAL, "Attention") or use.idx not in PAST:
                raise Refused(f"{value.name} is not the cache of satchel's own attention")


def _last_token(model: ir.Model) -> ir.Node:
    """The node that gathers the last token's row."""
    for node in nodes(model, "Unsqueeze"):
        gather = producer(node.inputs[0], "GatherND")
        if node.name == LAST_TOKEN and gather is not None:
            return gather
    raise Refused("the logits are not of the last token")


def _is_positions(node: ir.Node) -> bool:
    return node.name == POSITIONS or str(node.name).startswith(ROTARY_ROWS)


def _check_mask(value: ir.Value, ends: set[ir.Node]) -> None:
    for use in value.uses():
        attends = (use.node.domain, use.node.op_type) == (INTERNAL, "Attention") and use.idx in LENGTHS
        if attends or use.node in ends:
            continue
        if use.node.domain != "" or use.node.op_type not in COUNTING:
            raise Refused(f"{use.node.name} reads the mask")
        for output in use.node.outputs:
            _check_mask(output, ends)


def _rewrite(model: ir.Model, last: ir.Node, positions: list[ir.Node]) -> None:
    offsets = ir.val(ROW_OFFSETS, ir.DataType.INT32, ir.Shape(["offsets"]))
    table = ir.val(BLOCK_TABLE, ir.DataType.INT32, ir.Shape(["sequences", "blocks"]))
    model.graph.inputs.extend([offsets, table])
    for node in nodes(model, "Attention", INTERNAL):
        set_input(node, OFFSETS, offsets)
        set_input(node, TABLE, table)
    ids, mask = (graph_input(model, name) for name in (INPUT_IDS, ATTENTION_MASK))
    builder = Builder(model, next(iter(model.graph)))
    axis = builder.constant(np.asarray([1], np.int64), "axis.1")
    length = builder.value("ReduceSum", [mask, axis], "rows.length", keepdims=1)  # [sequences, 1]
    for node in positions:
        first = None if node.name == POSITIONS else node.inputs[1]
        reads = [ids, length, offsets, *([] if first is None else [first])]
        made = Builder(model, node).value("Positions", reads, f"{node.name}.rows", node.outputs[0], INTERNAL)
        replace(node.outputs[0], made)
    (squeezed,) = last.outputs
    (use,) = squeezed.uses()
    taken = Builder(model, use.node).value(
        "LastToken", [last.inputs[0], length, offsets], f"{LAST_TOKEN}.rows", use.node.outputs[0], INTERNAL
    )
    replace(use.node.outputs[0], taken)
    behind = _behind(taken)
    for node in linears(model):
        if node not in behind and rounded_by_row(node):
            set_input(node, LINEAR_OFFSETS, offsets)


def _behind(value: ir.Value) -> set[ir.Node]:
    """The nodes that a value reaches."""
    found, left = set[ir.Node](), [value]
    while left:
        for use in left.pop().uses():
            if use.node not in found:
                found.add(use.node)
                left.extend(use.node.outputs)
    return found
