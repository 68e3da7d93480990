"""Residual sum and norm in one node."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, attributes, dims, last_dim, nodes, producer, rank, replace

FUSED = {"RMSNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}


@graph_pass
def fuse_skip_norms(model: ir.Model, report: Report) -> None:
    """Fuse the sum of residual and update with the norm that follows.

    before: a, b -> Add -> RMSNormalization(scale) -> y        (the sum goes on as the next residual)
    after:  a, b -> SkipSimplifiedLayerNormalization(scale) -> y, sum
    LayerNormalization becomes SkipLayerNormalization in the same way.
    refuses when: the two summands may differ in shape, the norm is not over the last axis, its scale or bias is not a
    constant vector, or it has an attribute that is not known.
    """
    for op_type, fused in FUSED.items():
        for norm in nodes(model, op_type):
            add = producer(norm.inputs[0], "Add")
            if add is None or rank(add.outputs[0]) != 3:
                continue
            with report.refusing(norm):
                options = attributes(norm, axis=-1, epsilon=1e-5, stash_type=1)
                _check(norm, add, options)
                _rewrite(model, norm, add, fused, options["epsilon"])
                report.count += 1


def _check(norm: ir.Node, add: ir.Node, options: dict[str, Any]) -> None:
    first, second = (dims(v) for v in add.inputs)
    if first is None or first != second or None in first:
        raise Refused("the summands may differ in shape")
    if options["axis"] not in (-1, 2) or options["stash_type"] != 1:
        raise Refused("the norm is not over the last axis, or not computed in single precision")
    if any(v is None or not v.is_initializer() or rank(v) != 1 or last_dim(v) != first[-1] for v in norm.inputs[1:]):
        raise Refused("the norm's scale or bias is not a constant vector over the last axis")


def _rewrite(model: ir.Model, norm: ir.Node, add: ir.Node, op_type: str, epsilon: object) -> None:
    first, second = add.inputs
    # Placed where the sum was made: readers of the sum may stand before the norm.
    node = Builder(model, add).node(
        op_type, [first, second, *norm.inputs[1:]], f"{norm.name}.skip", MICROSOFT, outputs=4, epsilon=epsilon
    )  # fmt: skip
    replace(norm.outputs[0], node.outputs[0])
    replace(add.outputs[0], node.outputs[3])
    for unused in node.outputs[1:3]:
        unused.name = ""
