"""Which nodes of a graph that computes in float16 have to compute in float32 all the same."""

from __future__ import annotations

import json
from collections.abc import Iterable

import onnx_ir as ir

from satchel.graphs.analysis.element_types import Types
from satchel.graphs.ir.contract import PassError
from satchel.graphs.ir.values import nodes, producer, square
from satchel.runtime.bundle.contract import LOGITS

MEANS = ("ReduceMean", "ReduceSumSquare", "ReduceL2")
"""Reductions that only norms have: their sums of squares pass float16's largest where an entry passes 255."""
ANGLES = ("Cos", "Sin")
"""Of positions times frequencies: float16 has no odd numbers above 2,048."""
ELEMENTWISE = {"Abs", "Add", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub"}
ON_THE_WAY_TO_ANGLES = ELEMENTWISE | {
    "Concat", "Expand", "Gather", "MatMul", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"
}  # fmt: skip
ADVICE = "the target computes in float16: export with --target cpu"
BEHIND_THE_HEAD = {"Add", "Div", "Mul", "Neg", "Reshape", "Squeeze", "Sub", "Tanh", "Unsqueeze"}

TOO_LARGE = "satchel.too_large"
"""The model's property with the values that float16 does not hold: a JSON object of names and largest magnitudes."""
LARGEST = 65504.0
"""The largest number of float16."""


def float32_islands(model: ir.Model, types: Types) -> set[ir.Node]:
    """Nodes over float32 values that have to stay so: norms written as arithmetic, rotary angles, and what follows the
    head's linear layer on the way to the logits; and what makes or reads a value that float16 does not hold.

    Norms in one operator are not among them: with float16 inputs they sum in float32 inside.
    """
    kept: set[ir.Node] = set()
    for op_type in (*MEANS, "ReduceSum"):
        for node in nodes(model, op_type):
            if _is_float32(node, types) and (op_type != "ReduceSum" or square(node.inputs[0]) is not None):
                _keep_norm(node, kept)
    for op_type in ANGLES:
        for node in nodes(model, op_type):
            if _is_float32(node, types):
                _keep_backwards(node, ON_THE_WAY_TO_ANGLES, kept)
    for output in model.graph.outputs:
        if output.name == LOGITS:
            _keep_tail(output, kept)
    for value in _too_large_values(model):
        kept.update(node for node in (value.producer(), *value.consumers()) if node is not None)
    _keep_casts(model, types, kept)
    return kept


def too_large(model: ir.Model) -> dict[str, float]:
    """The names of the values that float16 does not hold, and their largest magnitudes."""
    found: dict[str, float] = json.loads(model.metadata_props.get(TOO_LARGE, "{}"))
    return found


def write_too_large(model: ir.Model, sizes: dict[str, float]) -> None:
    """Write down which values float16 does not hold."""
    model.metadata_props.pop(TOO_LARGE, None)
    if sizes:
        model.metadata_props[TOO_LARGE] = json.dumps(sizes)


def _too_large_values(model: ir.Model) -> list[ir.Value]:
    """The values of `too_large`. Raises PassError where one is not in this graph, or attention or a cache needs it."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    found = []
    for name, size in too_large(model).items():
        value = values.get(name)
        around = [] if value is None else [value.producer(), *value.consumers()]
        attends = any(node is not None and "Attention" in node.op_type for node in around)
        if value is None or attends or value.is_graph_output():
            raise PassError(f"{name} reaches {size:.3g}, and float16 ends at 65504: {ADVICE}")
        found.append(value)
    return found


def _is_float32(node: ir.Node, types: Types) -> bool:
    return types.get(node.outputs[0]) == ir.DataType.FLOAT


def _keep_norm(mean: ir.Node, kept: set[ir.Node]) -> None:
    """Keep a mean, the square in front of it, and what is done with it up to the tensor that it scales or shifts."""
    kept.update(node for node in (mean, square(mean.inputs[0])) if node is not None)
    waiting = [mean.outputs[0]]
    while waiting:
        statistic = waiting.pop()
        for use in statistic.uses():
            node = use.node
            if node.op_type not in ELEMENTWISE or node.domain != "":
                continue
            kept.add(node)
            others = [v for v in node.inputs if v is not None and v is not statistic]
            if all(v.is_initializer() or producer(v, "Constant") is not None for v in others):
                waiting.append(node.outputs[0])


def _keep_backwards(node: ir.Node, allowed: Iterable[str], kept: set[ir.Node]) -> None:
    """Keep a node and all of these operators that make its input."""
    waiting = [node]
    while waiting:
        found = waiting.pop()
        kept.add(found)
        makers = [v.producer() for v in found.inputs if v is not None]
        waiting += [m for m in makers if m is not None and m not in kept and m.op_type in allowed and m.domain == ""]


def _keep_tail(logits: ir.Value, kept: set[ir.Node]) -> None:
    """Keep what works on the logits alone, back to the linear layer that makes them."""
    node = logits.producer()
    while node is not None and node.domain == "" and node.op_type in BEHIND_THE_HEAD:
        moving = [v for v in node.inputs if v is not None and not v.is_initializer()]
        if len(moving) != 1 or len(moving[0].uses()) != 1:
            return
        kept.add(node)
        node = moving[0].producer()


def _keep_casts(model: ir.Model, types: Types, kept: set[ir.Node]) -> None:
    """Keep casts to float32 and constants whose readers are all kept, and the cast that makes the logits."""
    for node in (*nodes(model, "Cast"), *nodes(model, "Constant")):
        output = node.outputs[0]
        logits = output.is_graph_output() and output.name == LOGITS
        readers = output.consumers()
        if _is_float32(node, types) and (logits or (readers and all(reader in kept for reader in readers))):
            kept.add(node)
