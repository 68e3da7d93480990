"""Positions follow from the attention mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.inputs import POSITIONS, graph_input, set_token_shapes
from satchel.graphs.ir.values import Builder
from satchel.runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, POSITION_IDS


@graph_pass
def derive_positions(model: ir.Model, report: Report) -> None:
    """Replace the input `position_ids` by positions counted from the mask, and drop it.

    before: position_ids (input) -> readers
    after:  max(sum(attention_mask) - sequence, 0) + (0 .. sequence - 1) -> readers
    Right for a first prompt padded on the right, for one more chunk of a single row, and for one new token per row of
    any length.
    refuses when: never; without the input there is nothing to do.
    """
    positions = next((v for v in model.graph.inputs if v.name == POSITION_IDS), None)
    if positions is None:
        return
    if positions.uses():
        builder = Builder(model, next(iter(model.graph)))
        ids, mask = (graph_input(model, n) for n in (INPUT_IDS, ATTENTION_MASK))
        zero, one = builder.constant(np.asarray(0, np.int64), "zero"), builder.constant(np.asarray(1, np.int64), "one")
        axis = builder.constant(np.asarray([1], np.int64), "axis.1")
        count = builder.value("ReduceSum", [mask, axis], "positions.count", keepdims=1)  # [batch, 1]
        # Counted from tensors alone: a number out of Shape would be on the host, and on its way to the device stop it.
        none = builder.value("Mul", [ids, zero], "positions.none")
        each = builder.value("Add", [none, one], "positions.each")  # 1 for each new token, [batch, sequence]
        new = builder.value("ReduceSum", [each, axis], "positions.new", keepdims=1)
        first = builder.value("Max", [builder.value("Sub", [count, new], "positions.past"), zero], "positions.first")
        steps = builder.value("CumSum", [each, one], "positions.steps", exclusive=1)
        derived = builder.value("Add", [first, steps], POSITIONS, positions)  # [batch, sequence]
        ir.convenience.replace_all_uses_with(positions, derived)
    model.graph.inputs.remove(positions)
    set_token_shapes(model)
    report.count += 1
