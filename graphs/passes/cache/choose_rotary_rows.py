"""Which block of a rotary table a text has follows from its length."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.inputs import ROTARY_ROWS, graph_input
from satchel.graphs.ir.values import INTERNAL, Builder, attributes, nodes, replace
from satchel.runtime.bundle.contract import ATTENTION_MASK, BATCH, TEXT_LENGTH


@graph_pass
def choose_rotary_rows(model: ir.Model, report: Report) -> None:
    """Let each row's length choose the block: that of its mask, or that of the input `text_length` if it is larger.

    The mask of a prompt's first chunks does not know the whole prompt, whose length the input then has.

    before: positions -> satchel::RotaryRows(border) -> rows
    after:  positions + border where max(sum(attention_mask), text_length) > border, else positions -> rows
    refuses when: never.
    """
    found = list(nodes(model, "RotaryRows", INTERNAL))
    if not found:
        return
    builder = Builder(model, found[0])
    length = ir.val(TEXT_LENGTH, ir.DataType.INT64, ir.Shape([BATCH, 1]))
    model.graph.inputs.append(length)
    axis = builder.constant(np.asarray([1], np.int64), "axis.1")
    count = builder.value("ReduceSum", [graph_input(model, ATTENTION_MASK), axis], "rotary.count", keepdims=1)
    whole = builder.value("Max", [count, length], "rotary.length")  # [batch, 1]
    rows: dict[tuple[int, ir.Value | None], ir.Value] = {}
    for node in found:
        border, positions = int(attributes(node, border=0)["border"]), node.inputs[0]
        if (border, positions) not in rows:
            name = "" if not rows else f".{len(rows)}"
            limit = builder.constant(np.asarray(border, np.int64), f"rotary.border_{border}")
            beyond = builder.value("Greater", [whole, limit], f"rotary.beyond{name}")
            flag = builder.value("Cast", [beyond], f"rotary.flag{name}", to=ir.DataType.INT64)
            first = builder.value("Mul", [flag, limit], f"rotary.first{name}")
            value = builder.value("Add", [positions, first], f"{ROTARY_ROWS}{name}", node.outputs[0])
            rows[border, positions] = value
        replace(node.outputs[0], rows[border, positions])
        report.count += 1
