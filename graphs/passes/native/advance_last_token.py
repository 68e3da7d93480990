"""What only the logits read is computed of the last token only."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.analysis.linear import ROW_OFFSETS
from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, nodes, rank, replace

BY_ROW = {
    (INTERNAL, "Linear"), ("", "MatMul"), ("", "Add"), ("", "Sub"), ("", "Mul"), ("", "RMSNormalization"),
    ("", "LayerNormalization"),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"), (MICROSOFT, "SkipLayerNormalization"),
}  # fmt: skip
"""Operators that compute each token's row of the same row of inputs, and of constants."""


@graph_pass
def advance_last_token(model: ir.Model, report: Report) -> None:
    """Take the last token ahead of the linear layers that nothing else reads, and of what adapters add to them: those
    behind the last layer's attention.

    before: attention -> Linear (+ x) -> h -> Linear -> Linear (+ h) -> LastToken -> logits
    after:  attention -> LastToken -> Linear (+ LastToken(x)) -> h -> Linear -> Linear (+ h) -> logits
    A row is then the only one of its sequence, as in decode, and row_offsets is not needed.
    refuses when: there is no linear layer between, or something else reads what it gives (silently).
    """
    for last in list(nodes(model, "LastToken", INTERNAL)):
        moved = _moved(last)
        if any(node.op_type == "Linear" for node in moved):
            _rewrite(model, last, moved)
            report.count += 1


def _moved(last: ir.Node) -> list[ir.Node]:
    """The nodes between that work on each row alone and that only `last` reads, the last one first."""
    found: list[ir.Node] = []
    left = [last.inputs[0]]
    while left:
        value = left.pop(0)
        node = None if value is None else value.producer()
        if node is None or node in found or (node.domain, node.op_type) not in BY_ROW or not _fits(node):
            continue
        readers = {use.node for output in node.outputs for use in output.uses()}
        if readers <= {last, *found} and not any(output.is_graph_output() for output in node.outputs):
            found.append(node)
            left.extend(node.inputs[index] for index in _rows(node))
    return found


def _rows(node: ir.Node) -> list[int]:
    """The inputs that have a row for each token."""
    return [
        index
        for index, value in enumerate(node.inputs)
        if value is not None and value.const_value is None and not (node.op_type == "Linear" and index == ROW_OFFSETS)
    ]


def _fits(node: ir.Node) -> bool:
    """Whether its inputs are rows [batch, tokens, n], or constants without a row for each token."""
    rows = _rows(node)
    fixed = [value for index, value in enumerate(node.inputs) if value is not None and index not in rows]
    whole = node.op_type in ("Linear", "MatMul") or all((rank(value) or 0) <= 1 for value in fixed)
    tokens = _tokens(node.outputs[0])
    return whole and bool(rows) and tokens is not None and all(_tokens(node.inputs[index]) == tokens for index in rows)


def _tokens(value: ir.Value | None) -> tuple[object, object] | None:
    """The first two of its three dimensions, or None if they are not known. Rows with others may serve all tokens."""
    shape = None if value is None else value.shape
    if shape is None or len(shape) != 3:
        return None
    batch, tokens = (dim if isinstance(dim, int) else dim.value for dim in (shape[0], shape[1]))
    return None if batch is None or tokens is None else (batch, tokens)


def _rewrite(model: ir.Model, last: ir.Node, moved: list[ir.Node]) -> None:
    taken: dict[ir.Value, ir.Value] = {}
    places = {node: place for place, node in enumerate(model.graph)}
    for node in sorted(moved, key=places.__getitem__):
        for index in _rows(node):
            value = node.inputs[index]
            if value is None or value.producer() in moved:
                continue
            if value not in taken:
                reads, name = [value, *last.inputs[1:]], f"{last.name}.{len(taken)}"
                taken[value] = Builder(model, node).value("LastToken", reads, name, value, INTERNAL)
                taken[value].shape = _single(value)
            node.replace_input_with(index, taken[value])
        if node.op_type == "Linear" and len(node.inputs) > ROW_OFFSETS:
            node.resize_inputs(ROW_OFFSETS)
    for node in moved:
        for output in node.outputs:
            output.shape = _single(output)
    result = last.inputs[0]
    if result is not None:
        replace(last.outputs[0], result)


def _single(value: ir.Value) -> ir.Shape | None:
    """Its shape with one token."""
    return None if value.shape is None else ir.Shape([value.shape[0], 1, *list(value.shape)[2:]])
