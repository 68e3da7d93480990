"""Cuts mixtures of experts: each rank has some channels of every expert."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from satchel.graphs.shard.slices import NotCutError, Slicer, scaled
from satchel.runtime.bundle.shares import spans


def cut_experts(model: ir.Model, slicer: Slicer, node: ir.Node, shares: Sequence[float], rank: int) -> str:
    """Cut a MoE or QMoE node between its two stacks of matrices; its result is then one of the ranks' summands.

    All ranks choose the same experts for a token, and each computes its channels of all of them, so that ranks have
    equally much to do whatever experts are chosen. Whole experts for each rank would leave that to chance.

    Raises:
        NotCutError: The operator has inputs that are not known here, or too few channels.
    """
    quantized = node.op_type == "QMoE"
    up, up_scales, up_bias, down, down_scales, down_bias = (2, 3, 4, 5, 6, 7) if quantized else (2, 2, 3, 4, 4, 5)
    others = [value for value in node.inputs[down_bias + 1 :] if value is not None]
    first, second = (node.inputs[i].const_value for i in (up, down))  # type: ignore[union-attr]
    if first is None or second is None or any(value.const_value is None for value in others):
        raise NotCutError("its matrices are not constants")
    gated = node.attributes.get_int("swiglu_fusion", 0)
    if gated not in (0, 1):
        raise NotCutError("its gates and ups are in two halves")
    if others and not quantized:
        raise NotCutError("it has a third stack of matrices")
    factor = 2 if gated else 1
    channels = first.shape.numpy()[1] // factor
    bits = node.attributes.get_int("expert_weight_bits", 4)
    block = node.attributes.get_int("block_size", 0) if quantized else 0
    scales = node.inputs[down_scales].const_value if quantized else None  # type: ignore[union-attr]
    by_group = scales is not None and len(scales.shape) == 3
    packed = 8 // bits if quantized else 1
    unit = max(block if by_group else 1, packed)
    parts = spans(channels, shares, unit)
    if not all(parts):
        raise NotCutError(f"{channels} channels in units of {unit} are fewer than ranks")
    own = (parts[rank],)
    outer = scaled(own, factor)
    for index in {up, up_scales, up_bias}:
        slicer.use(node, index, 1, outer)
    slicer.use(node, down, 2, tuple(range(part.start // packed, part.stop // packed) for part in own))
    if by_group:
        slicer.use(node, down_scales, 2, tuple(range(part.start // block, part.stop // block) for part in own))
    if others:
        _cut_zero_points(slicer, node, down_bias + 1, outer, own, block, bits)
    if rank and down_bias < len(node.inputs):
        node.replace_input_with(down_bias, None)
    return str(node.outputs[0].name)


def _cut_zero_points(
    slicer: Slicer, node: ir.Node, start: int, outer: tuple[range, ...], own: tuple[range, ...], block: int, bits: int
) -> None:
    """Of both stacks, [experts, outputs, groups], two of 4 bits in a byte along the last axis."""
    raise NotCutError("its weights have zero points")
