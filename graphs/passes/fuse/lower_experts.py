"""The internal Experts operator -> com.microsoft MoE."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused, Report, graph_pass
from satchel.graphs.ir.values import INTERNAL, MICROSOFT, Builder, attributes, last_dim, nodes, replace, weight
from satchel.graphs.ir.weights import LazyWeight, marked_like

INTERLEAVED = ".interleaved"
"""What the name of such a weight ends with."""


@graph_pass
def lower_experts(model: ir.Model, report: Report) -> None:
    """Lower each mixture of experts to ONNX Runtime's MoE operator.

    before: hidden, index, weights -> satchel::Experts(gate_up, down, biases) -> y
    after:  ScatterElements(-inf, index, Log(weights)) -> router;  hidden, router -> MoE(gate_up interleaved, down) ->
            Mul(sum of weights) -> y
    Matrices are transposed, and gates and ups interleaved, where they are not.
    MoE makes its weights itself, by softmax over the router's row, the best k of it, and scaling these to 1. Fed with
    the logarithm of the weights that the model
    chose, and minus infinity elsewhere, it comes back to these weights divided by their sum.
    refuses when: the expert weights are not constants, k is not known, or an attribute is not known.
    """
    for node in nodes(model, "Experts", INTERNAL):
        with report.refusing(node):
            options = attributes(node, alpha=1.0, beta=0.0, limit=0.0, interleaved=0, transposed=0)
            stacks, k = [weight(value) for value in node.inputs[3:]], last_dim(node.inputs[1])
            if k is None or not all(stacks):
                raise Refused("the expert weights are not constants, or the number of experts per token is not known")
            _lower(model, node, [stack for stack in stacks if stack is not None], k, options)
            report.count += 1


def _lower(model: ir.Model, node: ir.Node, stacks: list[LazyWeight], k: int, options: dict[str, Any]) -> None:
    hidden, index, weights = node.inputs[:3]
    if options["transposed"]:
        stacks = [*map(_transposed, stacks[:2]), *stacks[2:]]
    if not options["interleaved"]:
        stacks[::2] = map(interleaved, stacks[::2])
    builder, name, experts = Builder(model, node), str(node.name), stacks[0].dims[0]
    tokens = builder.value("Shape", [index], f"{name}.tokens", end=1)
    count = builder.constant(np.asarray([experts], np.int64), f"experts.{experts}")
    shape = builder.value("Concat", [tokens, count], f"{name}.router_shape", axis=0)
    low = builder.constant(np.asarray([[-1e30]], np.float32), "router.lowest")
    empty = builder.value("Expand", [low, shape], f"{name}.router_empty")
    logs = builder.value("Log", [weights], f"{name}.log_weights", weights)
    router = builder.value("ScatterElements", [empty, index, logs], f"{name}.router", axis=1)
    gate_up, down, *biases = (
        value if stack is weight(value) else builder.initializer(stack)
        for stack, value in zip(stacks, node.inputs[3:], strict=True)
    )
    bias_1, bias_2 = biases or (None, None)
    mixed = builder.value(
        "MoE", [hidden, router, gate_up, bias_1, down, bias_2], f"{name}.moe", node.outputs[0], MICROSOFT,
        k=k, activation_type="swiglu", swiglu_fusion=1, activation_alpha=options["alpha"],
        activation_beta=options["beta"], swiglu_limit=options["limit"] or None, normalize_routing_weights=1,
    )  # fmt: skip
    axis = builder.constant(np.asarray([-1], np.int64), "axis.last")
    total = builder.value("ReduceSum", [weights, axis], f"{name}.weight_sum", keepdims=1)
    replace(node.outputs[0], builder.value("Mul", [mixed, total], f"{name}.scaled", node.outputs[0]))


def interleaved(gate_up: LazyWeight) -> LazyWeight:
    """The order that MoE reads: [experts, gates then ups, ...] -> [experts, gate, up, gate, up, ..., ...]."""
    _, rows, *rest = gate_up.dims

    def read(start: int, stop: int) -> np.ndarray:
        block = gate_up.rows(start, stop).reshape(stop - start, 2, rows // 2, *rest)
        return block.swapaxes(1, 2).reshape(stop - start, rows, *rest)

    return marked_like(LazyWeight(f"{gate_up.name}{INTERLEAVED}", gate_up.dims, gate_up.dtype, read), gate_up)


def _transposed(stack: LazyWeight) -> LazyWeight:
    """[experts, inputs, outputs] -> [experts, outputs, inputs]."""
    experts, inputs, outputs = stack.dims

    def read(start: int, stop: int) -> np.ndarray:
        return stack.rows(start, stop).swapaxes(1, 2)

    new = LazyWeight(f"{stack.name}.transposed", (experts, outputs, inputs), stack.dtype, read)
    return marked_like(new, stack)
