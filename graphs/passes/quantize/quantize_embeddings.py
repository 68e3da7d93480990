"""Embedding tables as quantized values, which a tied head reads too."""

from __future__ import annotations

from collections.abc import Container, Mapping

import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.two_parts import in_two_parts
from satchel.graphs.ir.values import MICROSOFT, Builder, attributes, rank, replace, weight
from satchel.graphs.ir.weights import LazyWeight, reshaped
from satchel.graphs.quant.quantized import FLOAT_PRODUCTS, INT8_PRODUCTS, QuantizedWeight


def quantize_embeddings(
    weights: Mapping[str, QuantizedWeight], accuracy_level: int = INT8_PRODUCTS, exact: Container[str] = ()
) -> GraphPass:
    """Look up rows of quantized values, and let a tied head multiply by the same ones.

    Both operators read the same bytes, each in a shape of its own. An id outside the table, an error to Gather, gives
    a row of zeros here: whoever feeds the graph has to check the ids.

    before: ids -> Gather(W) ...  x -> FusedMatMul(W, transB) -> logits
    after:  ids -> GatherBlockQuantized(codes, scales) ...  x -> MatMulNBits(codes, scales) -> logits
    refuses when: the quantized values have another shape than the table or no groups, whose size both operators want
    as a power of two; something else reads the table; the lookup is not along its first axis; or the linear layer has
    other attributes than transB.

    Args:
        weights: Quantized weights by the name of the float initializer, tables [vocabulary, hidden]. Those that nothing
            looks up are left alone.
        accuracy_level: How the head's linear layer takes its input: rounded to 8 bits group by group, or 0, as it is.
        exact: Names of weights whose head loses nothing of its input: of 4 bits, it multiplies in float, and of 8 bits,
            for which that is slow, it takes its input in two parts (`in_two_parts`).
    """

    def edit(model: ir.Model, report: Report) -> None:
        for table in list(model.graph.initializers.values()):
            quantized = weights.get(str(table.name))
            readers = [use.node for use in table.uses()]
            lazy = weight(table)
            if quantized is None or lazy is None or not any(node.op_type == "Gather" for node in readers):
                continue
            with report.refusing(readers[0]):
                _check(table, lazy, quantized)
                fine = quantized.name in exact
                if fine and quantized.grid.scheme.bits == 4:
                    _rewrite(model, readers, quantized, FLOAT_PRODUCTS, False)
                else:
                    _rewrite(model, readers, quantized, accuracy_level, fine)
                report.count += 1

    return graph_pass(edit, quantize_embeddings)


def _check(table: ir.Value, lazy: LazyWeight, quantized: QuantizedWeight) -> None:
    """Raise Refused where one of the table's readers cannot read quantized weights: then none does, as floats are
    there anyway."""
    if lazy.dims != quantized.codes.shape:
        raise Refused(f"{table.name} is quantized in another shape")
    if quantized.grid.scheme.block is None:
        raise Refused(f"{table.name} is quantized per row: its operators need groups")
    if table.is_graph_output():
        raise Refused(f"{table.name} is an output of the graph")
    for use in table.uses():
        node, place = use.node, (use.node.domain, use.node.op_type, use.idx)
        if place == ("", "Gather", 0):
            if attributes(node, axis=0)["axis"] not in (0, -2):
                raise Refused("the lookup is not along the table's first axis")
        elif place == (MICROSOFT, "FusedMatMul", 1):
            if attributes(node, transB=0)["transB"] != 1:
                raise Refused("the matmul reads the table as it is, not transposed")
        else:
            raise Refused(f"{table.name} is read by {node.name} ({node.op_type}), too")


def _rewrite(
    model: ir.Model, readers: list[ir.Node], quantized: QuantizedWeight, accuracy_level: int, parts: bool
) -> None:
    scheme, (outputs, inputs) = quantized.grid.scheme, quantized.codes.shape
    codes, scales, points = quantized.rows()
    whole = Builder(model)
    grid = [whole.initializer(scales), None if points is None else whole.initializer(points)]
    by_row = whole.initializer(codes)
    by_block: ir.Value | None = None
    for node in readers:
        builder, (first, second), like = Builder(model, node), node.inputs, node.outputs[0]
        name = f"{node.name}.codes"
        if node.op_type == "Gather":
            new = builder.value(
                "GatherBlockQuantized", [by_row, second, *grid], name, like, MICROSOFT,
                bits=scheme.bits, block_size=scheme.block, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
            replace(like, new)
            continue
        if by_block is None:
            shape = (outputs, scales.dims[1], codes.dims[1] // scales.dims[1])
            by_block = whole.initializer(reshaped(codes, shape, f"{codes.name}.blocks"))
        head, axes = [by_block, *grid], rank(first)

        def multiply(rows: ir.Value | None, called: str, builder: Builder = builder, head: list[ir.Value | None] = head,
                     like: ir.Value | None = None) -> ir.Value:  # fmt: skip
            return builder.value(
                "MatMulNBits", [rows, *head], called, like, MICROSOFT,
                bits=scheme.bits, block_size=scheme.block, K=inputs, N=outputs, accuracy_level=accuracy_level or None,
            )  # fmt: skip

        if parts and first is not None and scheme.block is not None and axes is not None and axes > 1:
            new = in_two_parts(builder, name, first, (axes, inputs, scheme.block), multiply, like)
        else:
            new = multiply(first, name, like=like)
        replace(like, new)
