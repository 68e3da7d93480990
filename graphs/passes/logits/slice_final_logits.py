"""The head works on the last position only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder
from satchel.graphs.passes.logits.slice_last_logits import NAME, slice_tokens


@graph_pass
def slice_final_logits(model: ir.Model, report: Report) -> None:
    """As slice_last_logits, for rows without padding: the last token's place does not depend on what is fed, so that
    nothing has to be known on the host while the device works.

    before: x [batch, sequence, hidden] -> norm -> MatMul -> logits [batch, sequence, vocabulary]
    after:  x -> Gather(-1) -> [batch, 1, hidden] -> norm -> MatMul -> logits [batch, 1, vocabulary]
    refuses when: nothing in front of the logits works on each token alone, or the logits are sliced already (silently).
    """
    slice_tokens(model, report, _gather)


def _gather(model: ir.Model, before: ir.Node, value: ir.Value) -> ir.Value:
    """[batch, sequence, n] -> [batch, 1, n]: the last of each row."""
    builder = Builder(model, before)
    index = builder.constant(np.asarray([-1], np.int64), "axis.last")
    last = builder.value("Gather", [value, index], NAME, axis=1)
    if value.shape is not None:
        last.shape = ir.Shape([value.shape[0], 1, value.shape[2]])
    last.type = value.type
    return last
