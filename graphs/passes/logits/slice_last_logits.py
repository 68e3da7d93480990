"""The head works on the last real token only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.inputs import graph_input
from satchel.graphs.ir.values import MICROSOFT, Builder, constant, only_user, rank, weight
from satchel.runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, LOGITS

ROW_WISE_UNARY = {"Tanh", "Cast", "Neg", "Sigmoid", "Erf", "Identity"}
ROW_WISE_WITH_CONSTANT = {"Add", "Sub", "Mul", "Div", "MatMul", "RMSNormalization", "LayerNormalization"}
NAME = "last_token"


@graph_pass
def slice_last_logits(model: ir.Model, report: Report) -> None:
    """Gather each row's last real token before the head, and before all that works on each token alone in front of it.

    before: x [batch, sequence, hidden] -> norm -> MatMul -> logits [batch, sequence, vocabulary]
    after:  x -> GatherND(last real token) -> [batch, 1, hidden] -> norm -> MatMul -> logits [batch, 1, vocabulary]
    refuses when: nothing in front of the logits works on each token alone, or the logits are sliced already (silently).
    """
    slice_tokens(model, report, _gather)


def slice_tokens(model: ir.Model, report: Report, gather: Callable[[ir.Model, ir.Node, ir.Value], ir.Value]) -> None:
    """Let `gather(model, before, x)` take one token of x [batch, sequence, hidden], as far ahead of the logits as can
    be.
    """
    (logits,) = [v for v in model.graph.outputs if v.name == LOGITS]
    chain: list[ir.Node] = []
    value = logits
    while (node := _row_wise(value)) is not None and (value is logits or only_user(value) is not None):
        chain.append(node)
        value = node.inputs[_data_input(node)]  # type: ignore[assignment]
    maker = value.producer()
    if not chain or rank(value) != 3 or (maker is not None and maker.name == NAME):
        return
    last = gather(model, chain[-1], value)
    chain[-1].replace_input_with(_data_input(chain[-1]), last)
    for node in chain:
        output = node.outputs[0]
        if output.shape is not None:
            output.shape = ir.Shape([output.shape[0], 1, *list(output.shape)[2:]])
    report.count += 1


def _row_wise(value: ir.Value) -> ir.Node | None:
    """The producer of `value` if each of its rows depends on the same row of one input only."""
    node = value.producer()
    if node is None or rank(value) != 3:
        return None
    if node.op_type == "FusedMatMul" and node.domain == MICROSOFT and set(node.attributes) <= {"transB"}:
        return node if weight(node.inputs[1]) is not None else None
    if node.domain != "":
        return None
    if node.op_type in ROW_WISE_UNARY:
        return node
    if node.op_type not in ROW_WISE_WITH_CONSTANT:
        return None
    others = [v for i, v in enumerate(node.inputs) if i != _data_input(node)]
    highest = 2 if node.op_type == "MatMul" else 1
    fixed = all((weight(v) is not None or constant(v) is not None) and (rank(v) or 0) <= highest for v in others)
    ordered = node.op_type in ("MatMul", "RMSNormalization", "LayerNormalization")
    over_rows = node.attributes.get_int("axis", -1) not in (-1, 2)
    return node if fixed and not over_rows and not (ordered and _data_input(node) == 1) else None


def _data_input(node: ir.Node) -> int:
    first = node.inputs[0]
    return 1 if len(node.inputs) > 1 and first is not None and first.is_initializer() else 0


def _gather(model: ir.Model, before: ir.Node, value: ir.Value) -> ir.Value:
    """[batch, sequence, n] -> [batch, 1, n]: row min(sum(mask), sequence) - 1 of each."""
    builder = Builder(model, before)
    ids, mask = (graph_input(model, n) for n in (INPUT_IDS, ATTENTION_MASK))
    one, axis = builder.constant(np.asarray(1, np.int64), "one"), builder.constant(np.asarray([1], np.int64), "axis.1")
    count = builder.value("ReduceSum", [mask, axis], f"{NAME}.count", keepdims=1)  # [batch, 1]
    new = builder.value("Gather", [builder.value("Shape", [ids], f"{NAME}.shape"), one], f"{NAME}.new", axis=0)
    index = builder.value("Sub", [builder.value("Min", [count, new], f"{NAME}.end"), one], f"{NAME}.index")
    row = builder.value("GatherND", [value, index], f"{NAME}.row", batch_dims=1)  # [batch, n]
    last = builder.value("Unsqueeze", [row, axis], NAME)
    if value.shape is not None:
        row.shape = ir.Shape([value.shape[0], value.shape[2]])
        last.shape = ir.Shape([value.shape[0], 1, value.shape[2]])
    row.type = last.type = value.type
    return last
