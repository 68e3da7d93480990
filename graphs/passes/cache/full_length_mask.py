"""The decode graph's mask is as long as its cache."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.inputs import graph_input
from satchel.graphs.ir.values import dims
from satchel.runtime.bundle.contract import ATTENTION_MASK, CAPACITY


@graph_pass
def full_length_mask(model: ir.Model, report: Report) -> None:
    """Declare one mask for all steps: ones for the tokens that are there, zeros up to the capacity. Then all shapes are
    the same at every step, and a device can replay one step's work for the next.

    before: attention_mask [batch, total]
    after:  attention_mask [batch, capacity]
    refuses when: the mask's length is fixed already, or has that name (silently).
    """
    mask = graph_input(model, ATTENTION_MASK)
    batch, length = dims(mask) or (None, None)
    if not isinstance(length, str) or length == CAPACITY:
        return
    mask.shape = ir.Shape([batch, CAPACITY])
    report.count += 1
