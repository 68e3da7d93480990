"""The decode graph's mask is as long as its cache."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs import signature
from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import dims


@graph_pass
def full_length_mask(model: ir.Model, report: Report) -> None:
    """Declare one mask for all steps: ones for the tokens that are there, zeros up to the capacity. Then all shapes are
    the same at every step, and a device can replay one step's work for the next.

    before: attention_mask [batch, total]
    after:  attention_mask [batch, capacity]
    refuses when: the mask's length is fixed already, or has that name (silently).
    """
    mask = signature.graph_input(model, signature.ATTENTION_MASK)
    batch, length = dims(mask) or (None, None)
    if not isinstance(length, str) or length == signature.CAPACITY:
        return
    mask.shape = ir.Shape([batch, signature.CAPACITY])
    report.count += 1
