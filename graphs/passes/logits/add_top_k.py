"""The most likely tokens are outputs of their own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, last_dim, rank
from satchel.runtime.bundle.contract import LOGITS, TOP_IDS, TOP_LOGITS

TOP = 64
"""How many tokens are handed out. Greedy search takes one; top-k sampling is rarely asked for more."""


@graph_pass
def add_top_k(model: ir.Model, report: Report) -> None:
    """Choose the most likely tokens where the logits are, so that a runner need not fetch all of these.

    before: logits [batch, 1, vocabulary]
    after:  logits -> TopK(min(64, vocabulary)) -> top_logits [batch, 1, k], top_ids [batch, 1, k] int64, falling
    refuses when: the logits are of more than one token, their width is not known, or the outputs are there (silently).
    """
    names = {value.name for value in model.graph.outputs}
    (logits,) = [value for value in model.graph.outputs if value.name == LOGITS]
    vocabulary = last_dim(logits)
    if TOP_IDS in names or vocabulary is None or rank(logits) != 3 or logits.shape[1] != 1:  # type: ignore[index]
        return
    k = min(TOP, vocabulary)
    builder = Builder(model)
    count = builder.constant(np.asarray([k], np.int64), f"top.{k}")
    node = builder.node("TopK", [logits, count], TOP_LOGITS, outputs=2, axis=-1, largest=1, sorted=1)
    shape = [*list(logits.shape or ())[:2], k]
    for output, name, dtype in zip(node.outputs, (TOP_LOGITS, TOP_IDS), (logits.dtype, ir.DataType.INT64), strict=True):
        output.name, output.shape = name, ir.Shape(shape)
        output.type = None if dtype is None else ir.TensorType(dtype)
        model.graph.outputs.append(output)
    report.count += 1
