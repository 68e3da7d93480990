"""Which token is the last comes in as an input."""

from __future__ import annotations

import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.inputs import static_input
from satchel.graphs.ir.values import Builder, dims, nodes, producer, replace
from satchel.graphs.passes.logits.slice_last_logits import NAME
from satchel.runtime.bundle.contract import LAST_TOKEN


@graph_pass
def take_last_token(model: ir.Model, report: Report) -> None:
    """Gather the last token's row by an index that is given, in place of one counted from the mask.

    before: x [1, tokens, n], attention_mask -> GatherND(last real token) -> Unsqueeze -> [1, 1, n]
    after:  x -> Gather(last_token (input)) -> [1, 1, n]
    refuses when: its input has not the shape [1, tokens, n] in numbers. Other look-ups are left alone (silently).
    """
    for node in nodes(model, "Unsqueeze"):
        look_up = producer(node.inputs[0], "GatherND")
        if node.name != NAME or look_up is None:
            continue
        x = look_up.inputs[0]
        match dims(x):
            case [1, int(), int()]:
                index = static_input(model, LAST_TOKEN, ir.DataType.INT64, (1,))
            case _:
                report.refuse(node, "its input is not [1, tokens, n]")
                continue
        row = Builder(model, node).value("Gather", [x, index], f"{NAME}.taken", node.outputs[0], axis=1)
        replace(node.outputs[0], row)
        report.count += 1
