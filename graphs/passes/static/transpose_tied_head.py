"""A tied head reads the embedding table as it lies, by standard operators."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, dims, nodes, replace


@graph_pass
def transpose_tied_head(model: ir.Model, report: Report) -> None:
    """Multiply the table by the transposed rows in place of the rows by the transposed table.

    The look-up needs the table as it is, so the table is there once: in the file, and on a device that folds what is
    constant.

    before: x [1, tokens, hidden] -> FusedMatMul(W, transB) -> [1, tokens, vocabulary]
    after:  x -> Reshape [tokens, hidden] -> Transpose -> MatMul(W, .) [vocabulary, tokens] -> Transpose -> Reshape
            -> [1, tokens, vocabulary]      (one token needs no Transpose)
    refuses when: the linear layer scales or transposes in another way than by transB, or a shape is not a number.
    """
    for node in nodes(model, "FusedMatMul", MICROSOFT):
        x, table = node.inputs
        shape, height = dims(x), dims(table)
        match shape, height:
            case [1, int(tokens), int(hidden)], [int(vocabulary), int()] if set(node.attributes) == {"transB"}:
                pass
            case _:
                report.refuse(node, "it scales, transposes in another way than by transB, or has no number of rows")
                continue
        _rewrite(model, node, tokens, hidden, vocabulary)
        report.count += 1


def _rewrite(model: ir.Model, node: ir.Node, tokens: int, hidden: int, vocabulary: int) -> None:
    builder, name, (x, table) = Builder(model, node), str(node.name), node.inputs

    def make(op_type: str, inputs: list[ir.Value | None], part: str, shape: list[int], **options: Any) -> ir.Value:
        if op_type == "Reshape":
            inputs = [*inputs, builder.shape(*shape)]
        value = builder.value(op_type, inputs, f"{name}.{part}", **options)
        value.shape, value.type = ir.Shape(shape), node.outputs[0].type
        return value

    if tokens == 1:
        columns = make("Reshape", [x], "column", [hidden, 1])
    else:
        rows = make("Reshape", [x], "rows", [tokens, hidden])
        columns = make("Transpose", [rows], "columns", [hidden, tokens], perm=[1, 0])
    product = make("MatMul", [table, columns], "by_table", [vocabulary, tokens])
    if tokens > 1:
        product = make("Transpose", [product], "by_row", [tokens, vocabulary], perm=[1, 0])
    replace(node.outputs[0], make("Reshape", [product], "logits", [1, tokens, vocabulary]))
