"""Mixtures of experts over quantized weights."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, Refused, Report, graph_pass
from satchel.graphs.ir.values import MICROSOFT, Builder, attributes, nodes, replace, weight
from satchel.graphs.ir.weights import LazyWeight, from_array, pack_rows, reshaped
from satchel.graphs.quant.quantized import FLOAT_PRODUCTS, INT8_PRODUCTS, QuantizedWeight
from satchel.graphs.quant.recipe import Scheme

Parts = tuple[LazyWeight, LazyWeight, LazyWeight | None]
"""Quantized values, scales and zero points."""
FIRST, SECOND = 2, 4
"""Which inputs of MoE are its two stacks of matrices; the bias of each comes after it."""


def quantize_experts(weights: Mapping[str, QuantizedWeight], exact: Container[str] = ()) -> GraphPass:
    """Let a mixture of experts read its matrices as quantized values.

    before: hidden, router -> MoE(gate_up, down) -> y
    after:  hidden, router -> QMoE(codes and scales of gate_up, of down) -> y
    The attributes are MoE's. A stack [experts, outputs, inputs] is quantized as one weight [experts * outputs, inputs].
    refuses when: only one of the two stacks is quantized; their bits, groups or symmetry differ, for which the kernel
    has one setting; the quantized values are of another shape than the stack; four-bit rows do not end on a whole
    byte; there is a third stack; weights are not scaled to a sum of 1 per token; or an attribute is not
    known.

    Args:
        weights: Quantized weights by the name of the float initializer, as MoE reads it: gates and ups interleaved.
        exact: Names of those whose input is not to be rounded to int8; the kernel for 8 bits in groups rounds anyway.
    """

    def edit(model: ir.Model, report: Report) -> None:
        for node in nodes(model, "MoE", MICROSOFT):
            stacks = [weight(node.inputs[i]) for i in (FIRST, SECOND)]
            first, second = (None if stack is None else weights.get(stack.name) for stack in stacks)
            if first is None and second is None:
                continue
            with report.refusing(node):
                if first is None or second is None:
                    raise Refused("only one of its two stacks of matrices is quantized")
                _check(node, first, second)
                level = FLOAT_PRODUCTS if first.name in exact else INT8_PRODUCTS
                kept = _attributes(node) | {"accuracy_level": level}
                parts = [_stack(quantized, stack) for quantized, stack in zip((first, second), stacks, strict=True)]
                _rewrite(model, node, first.grid.scheme, parts, kept)
                report.count += 1

    return graph_pass(edit, quantize_experts)


def _check(node: ir.Node, first: QuantizedWeight, second: QuantizedWeight) -> None:
    """Raise Refused where the kernel has no such mixture over quantized values."""
    if first.grid.scheme != second.grid.scheme:
        raise Refused(f"its stacks of matrices are stored as {first.grid.scheme} and {second.grid.scheme}")
    if any(value is not None for value in node.inputs[SECOND + 2 :]):
        raise Refused("it has a third stack of matrices")


def _attributes(node: ir.Node) -> dict[str, Any]:
    """The node's own attributes, which the operator over quantized values has under the same names and with the same
    defaults.

    Raises:
        Refused: It has one that is not known to be the same.
    """
    known = attributes(
        node, k=None, activation_type=None, activation_alpha=None, activation_beta=None, swiglu_fusion=None,
        swiglu_limit=None, normalize_routing_weights=None,
    )  # fmt: skip
    if known["normalize_routing_weights"] != 1:
        raise Refused("the weights of its experts are not scaled to a sum of 1, as QMoE always does")
    return {name: value for name, value in known.items() if value is not None}


def _stack(quantized: QuantizedWeight, stack: LazyWeight | None) -> Parts:
    """Quantized values [experts, outputs, inputs * bits / 8], scales [experts, outputs, groups] and packed zero points.

    With one scale per output there is no axis for groups, and zero points are packed along the outputs.

    Raises:
        Refused: The quantized values do not belong to the stack, or their rows do not end on a whole byte.
    """
    grid, bits = quantized.grid, quantized.grid.scheme.bits
    if stack is None or len(stack.dims) != 3 or quantized.codes.shape != (math.prod(stack.dims[:2]), stack.dims[2]):
        raise Refused(f"{quantized.name} is quantized in another shape")
    experts, outputs, inputs = stack.dims
    if inputs * bits % 8:
        raise Refused(f"{quantized.name} has {inputs} inputs of {bits} bits, which are no whole bytes")
    codes, scales, points = quantized.rows()
    per_output = grid.scheme.block is None
    if per_output and grid.zero_points is not None:
        packed = pack_rows(grid.zero_points.reshape(experts, outputs), bits)
        points = from_array(f"{quantized.name}.output_zero_points", packed, computed=True)
    elif points is not None:
        points = reshaped(points, (experts, outputs, points.dims[1]), f"{points.name}.stacked")
    blocks = () if per_output else (scales.dims[1],)
    return (
        reshaped(codes, (experts, outputs, codes.dims[1]), f"{codes.name}.stacked"),
        reshaped(scales, (experts, outputs, *blocks), f"{scales.name}.stacked"),
        points,
    )


def _rewrite(model: ir.Model, node: ir.Node, scheme: Scheme, parts: Sequence[Parts], kept: Mapping[str, Any]) -> None:
    builder = Builder(model, node)
    (codes_1, scales_1, points_1), (codes_2, scales_2, points_2) = (
        [None if part is None else builder.shared(part) for part in stack] for stack in parts
    )
    bias_1, bias_2 = (node.inputs[i + 1] if i + 1 < len(node.inputs) else None for i in (FIRST, SECOND))
    inputs = [*node.inputs[:2], codes_1, scales_1, bias_1, codes_2, scales_2, bias_2]
    if points_1 is not None:
        inputs += [None, None, None, points_1, points_2]
    mixed = builder.value(
        "QMoE", inputs, f"{node.name}.codes", node.outputs[0], MICROSOFT, **kept, quant_type="int",
        expert_weight_bits=scheme.bits, block_size=scheme.block,
    )  # fmt: skip
    replace(node.outputs[0], mixed)
