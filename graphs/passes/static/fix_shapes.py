"""Every dimension becomes a number."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Report
from satchel.graphs.ir.inputs import Lengths
from satchel.graphs.ir.sweep import sweep
from satchel.graphs.ir.values import Builder, constant, dims, nodes
from satchel.runtime.bundle.contract import BATCH, CAPACITY, SEQUENCE, TOTAL


def fix_shapes(lengths: Lengths) -> GraphPass:
    """Give batch, sequence and capacity their numbers, everywhere that they are named, and write out each Reshape.

    before: input_ids [batch, sequence]  past [batch, kv_heads, capacity, head_dim]  Reshape(x, [0, 0, 4, 16])
    after:  input_ids [1, tokens]        past [1, kv_heads, capacity, head_dim]      Reshape(x, [1, tokens, 4, 16])
    refuses when: the target of a Reshape cannot be known. Dimensions that are numbers already are left alone
    (silently).

    Args:
        lengths: What stands for sequence and capacity.
    """
    numbers = {BATCH: 1, SEQUENCE: lengths.tokens, TOTAL: lengths.capacity, CAPACITY: lengths.capacity}

    def edit(model: ir.Model, report: Report) -> None:
        for value in {*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)}:
            report.count += _fix(value, numbers)
        for node in nodes(model, "Reshape"):
            _write_out(model, node, report)
        if report.count:
            sweep(model.graph)

    return GraphPass("fix_shapes", edit, fix_shapes.__doc__ or "")


def _fix(value: ir.Value, numbers: Mapping[str, int]) -> int:
    """Put numbers for names; returns 1 where that changed the shape."""
    shape = dims(value)
    if shape is None or not any(d in numbers for d in shape):
        return 0
    value.shape = ir.Shape([numbers.get(d, d) if isinstance(d, str) else d for d in shape])
    return 1


def _write_out(model: ir.Model, node: ir.Node, report: Report) -> None:
    target, before, after = constant(node.inputs[1]), dims(node.inputs[0]), dims(node.outputs[0])
    if target is not None and before is not None and (after is None or not _known(after)) and _known(before):
        after = _inferred(target.tolist(), [d for d in before if isinstance(d, int)])
        node.outputs[0].shape = ir.Shape(after)
    if after is None or not _known(after):
        report.refuse(node, "what it reshapes to cannot be known")
        return
    if target is not None and target.tolist() == after:
        return
    shape = Builder(model).constant(np.asarray(after, np.int64), "shape." + "_".join(map(str, after)))
    node.replace_input_with(1, shape)
    node.attributes.pop("allowzero", None)
    report.count += 1


def _known(shape: list[int | str | None] | list[int]) -> bool:
    return all(isinstance(d, int) for d in shape)


def _inferred(target: list[int], before: list[int]) -> list[int | str | None]:
    """The shape that a Reshape gives: 0 keeps a dimension, -1 takes what is left."""
    kept = [before[i] if d == 0 else d for i, d in enumerate(target)]
    rest = int(np.prod(before)) // max(1, int(np.prod([d for d in kept if d != -1])))
    return [rest if d == -1 else d for d in kept]
