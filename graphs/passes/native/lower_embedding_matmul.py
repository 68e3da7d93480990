"""A head that is the embedding table, by satchel's own kernel."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from satchel.graphs.analysis.linear import native_operator
from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, attributes, dims, last_dim, nodes, replace, weight
from satchel.graphs.quant.quantized import INT8_PRODUCTS

SMALLEST = 16
"""Inputs of the smallest group that the operator takes."""


@graph_pass
def lower_embedding_matmul(model: ir.Model, report: Report) -> None:
    """Let satchel's own operator multiply by the table of quantized values that the embedding looks up.

    before: ids -> GatherBlockQuantized(codes, scales) ...  x -> MatMulNBits(codes, scales) -> logits
    after:  ids -> GatherBlockQuantized(codes, scales) ...  x -> satchel::TableLinear(codes, scales) -> logits
    refuses when: the quantized values are not of 8 bits, have zero points, or are not cut into whole groups of a power
    of two, 16 or more; the linear layer has a bias or another input, or takes x in another way than rounded to int8. A
    linear layer with other quantized values than those that are looked up is left alone (silently).
    """
    gathers = nodes(model, "GatherBlockQuantized", MICROSOFT)
    tables = {lazy.base.name for node in gathers if (lazy := weight(node.inputs[0])) is not None}
    for node in nodes(model, "MatMulNBits", MICROSOFT):
        codes = weight(node.inputs[1])
        if codes is None or codes.base.name not in tables:
            continue
        with report.refusing(node):
            options = _options(node)
            sizes = {"inputs": options["K"], "outputs": options["N"], "block": options["block_size"]}
            product = native_operator(
                Builder(model, node), "TableLinear", node.inputs[:3], f"{node.name}.table", node.outputs[0], sizes
            )
            replace(node.outputs[0], product)
            report.count += 1


def _options(node: ir.Node) -> dict[str, Any]:
    options = attributes(node, K=0, N=0, bits=4, block_size=0, accuracy_level=0)
    inputs, outputs, block = options["K"], options["N"], options["block_size"]
    if options["bits"] != 8 or any(value is not None for value in node.inputs[3:]):
        raise Refused("it is not quantized to 8 bits, or has zero points, a bias or another input")
    if options["accuracy_level"] != INT8_PRODUCTS:
        raise Refused("the linear layer takes its input as it is, not rounded to int8")
    if (
        block < SMALLEST
        or block & (block - 1)
        or inputs % block
        or dims(node.inputs[1]) != [outputs, inputs // block, block]
    ):
        raise Refused("its group size is not a power of two that divides its inputs")
    if dims(node.inputs[2]) != [outputs, inputs // block] or last_dim(node.inputs[0]) != inputs:
        raise Refused("its scales or its input do not fit the size of its weight")
    return options
