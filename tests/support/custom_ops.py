"""The library of operators that tests use, and passes over it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime_extensions

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, replace

LIBRARY = Path(onnxruntime_extensions.get_library_path())
DOMAIN = "ai.onnx.contrib"


@graph_pass
def split_signs(model: ir.Model, report: Report) -> None:
    """Take the logits apart into those below zero and those above, and add them up: the same numbers."""
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    builder = Builder(model)
    split = builder.node("NegPos", [logits], "split_signs", domain=DOMAIN, outputs=2)
    for output in split.outputs:
        output.shape, output.type = logits.shape, logits.type
    both = builder.value("Add", list(split.outputs), "split_signs.both", like=logits)
    replace(logits, both)
    logits.name = "split_signs.input"
    split.replace_input_with(0, logits)
    report.count += 1


def halve_logits(model: ir.Model, report: Report) -> None:
    """Change every prediction, without a library."""
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    builder = Builder(model)
    half = builder.constant(np.array(0.5, np.float32), "half")
    scaled = builder.node("Mul", [logits, half], "halved")
    replace(logits, scaled.outputs[0])
    logits.name = "halved.input"
    scaled.replace_input_with(0, logits)
    report.count += 1
