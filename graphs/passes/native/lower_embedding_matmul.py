"""A head that is the embedding table, by satchel's own operator."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from satchel.graphs.analysis.linear import native_operator
from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, attributes, last_dim, nodes, replace, weight
from satchel.graphs.quant.quantized import INT8_PRODUCTS, QuantizedWeight, TableWeight
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.layouts import ROWS

MATRIX = 4
"""Inputs of MatMulNBits that are the matrix: x, quantized values, scales and zero points."""


def lower_embedding_matmul(weights: Mapping[str, QuantizedWeight]) -> GraphPass:
    """Let satchel's own operator multiply by a second copy of the table that the embedding looks up, in panels.

    The panels are made on the device (TableWeight.derived). Lookups read the bundle's table, of which only the rows
    that they read are ever in memory.

    before: ids -> GatherBlockQuantized(codes, scales) ...  x -> MatMulNBits(codes, scales) -> logits
    after:  ids -> GatherBlockQuantized(codes, scales) ...  x -> satchel::Linear(panels, scales) -> logits
    refuses when: the quantized values have a form that the operator does not take (QuantizedWeight.fits_panels); the
    linear layer has a bias or another input, or takes x in another way than rounded to int8. A linear layer over
    something else than a table is left alone (silently).

    Args:
        weights: Quantized weights by the name of the float initializer.
    """
    tables = {f"{each.name}{ROWS[each.grid.scheme.bits]}": each for each in weights.values()}

    def edit(model: ir.Model, report: Report) -> None:
        for node in nodes(model, "MatMulNBits", MICROSOFT):
            codes = weight(node.inputs[1])
            table = tables.get(codes.base.name) if codes is not None else None
            if table is None:
                continue
            with report.refusing(node):
                _check(node, table)
                builder, (outputs, inputs), scheme = Builder(model, node), table.codes.shape, table.grid.scheme
                panels = [builder.shared(made) for made in TableWeight(table.name, table).derived(Layout.PANELS)]
                sizes = {"inputs": inputs, "outputs": outputs, "bits": scheme.bits, "block": scheme.block or 0}
                product = native_operator(
                    builder, "Linear", [node.inputs[0], *panels], f"{node.name}.linear", node.outputs[0], sizes
                )
                replace(node.outputs[0], product)
                report.count += 1

    return graph_pass(edit, lower_embedding_matmul)


def _check(node: ir.Node, table: QuantizedWeight) -> None:
    options = attributes(node, K=0, N=0, bits=4, block_size=0, accuracy_level=0)
    if any(value is not None for value in node.inputs[MATRIX:]):
        raise Refused("it has a bias or another input")
    if options["accuracy_level"] != INT8_PRODUCTS:
        raise Refused("the linear layer takes its input as it is, not rounded to int8")
    if not table.fits_panels():
        raise Refused("the operator does not support how the table is quantized")
    if last_dim(node.inputs[0]) != table.codes.shape[1]:
        raise Refused("its input is not known to be as wide as the table")
