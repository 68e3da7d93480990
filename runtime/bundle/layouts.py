"""Weight layouts that are made from the stored weights when a bundle is specialized: their names, shapes and bytes.

A bundle stores each weight of a linear layer once, as DequantizeLinear reads it. Graphs that read another layout name
its tensors by `parts`, and refer to a file that is not in the bundle, `file_name(layout)`; `pack` makes its content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.dtypes import FLOAT16, FLOAT32, INT8, UINT8, DType

INT8_MAX = 127
SMALLEST_RANGE = np.float32(1e-10)
"""The minimum for the largest magnitude of an output, so that zeros stay zeros."""

GROUP_SIZE = 64
"""Group size in `Layout.GROUPS`. With 128 the result of a row would depend on the number of rows."""

PANEL = 16
"""Outputs per panel."""

HALF_BITS = 16
"""Bits of weights that are not quantized but in float16."""

TOGETHER = {16: 1, 8: 4, 4: 8}
"""Bits -> adjacent inputs of one output in a panel, which one instruction multiplies."""

ROWS = {8: ".rows", 4: ".rows4"}
"""Bits -> the suffix of the tensor name of a table's quantized values, a row for each output, as lookups read it."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Form:
    """Shape and quantization of a weight. It has `groups` scales for each output; of 16 bits, in float16, none.

    `half_scales`: Scales are in float16, else in float32.
    """

    inputs: int
    outputs: int
    groups: int
    bits: int
    symmetric: bool
    half_scales: bool = False


@dataclass(frozen=True)
class Part:
    """One tensor of a layout; `axis` is the axis of outputs, or of panels of outputs."""

    dtype: DType
    shape: tuple[int, ...]
    axis: int = 0


@dataclass(frozen=True)
class Weight:
    """A weight, or some of its outputs.

    Attributes:
        values: [inputs, outputs], one quantized value in a byte: int8 where symmetric, else uint8; or float16.
        scales: [groups, outputs] float32 or float16; those of values in float16 are ones.
        zero_points: [groups, outputs] uint8; None where symmetric.
        bits: 8 or 4; 16 of float16.
    """

    values: Array
    scales: NDArray[np.float32] | NDArray[np.float16]
    zero_points: Array | None
    bits: int

    @property
    def form(self) -> Form:
        """Its shape and quantization."""
        inputs, outputs = self.values.shape
        half_scales = self.scales.dtype == np.float16
        return Form(inputs, outputs, len(self.scales), self.bits, self.zero_points is None, half_scales)


def file_name(layout: Layout) -> str:
    """The file that graphs name for weights in this layout. It is not in the bundle."""
    return f"{layout.value}.bin"


def parts(layout: Layout, form: Form, *, gated: bool = False) -> dict[str, Part]:
    """The tensors of a weight in this layout, by the suffix of the tensor's name after the weight's.

    Args:
        layout: The layout.
        form: The weight's shape and quantization.
        gated: For panels: the outputs are two halves, up and gate of a gated MLP. Panels of the halves alternate, so
            that both are computed together.

    Raises:
        ValueError: The layout cannot hold such a weight.
    """
    inputs, outputs, groups = form.inputs, form.outputs, form.groups
    if min(inputs, outputs, groups) < 1 or inputs % groups:
        raise ValueError(f"{form} is not a weight")
    if form.bits == HALF_BITS and (layout is not Layout.PANELS or (groups, form.symmetric) != (1, True)):
        raise ValueError(f"{form} has no layout {layout.value}")
    if layout is Layout.INT8:
        values = Part(INT8, (inputs, outputs), axis=1)
        return {values_ending(layout): values, ".int8_scales": Part(FLOAT32, (outputs,))}
    if layout is Layout.GROUPS:
        if (groups, form.bits, form.symmetric) != (1, 8, True):
            raise ValueError(f"{form} is not int8, per-channel")
        count = -(-inputs // GROUP_SIZE)
        values = Part(UINT8, (outputs, count, GROUP_SIZE))
        return {values_ending(layout): values, ".block_scales": Part(FLOAT32, (outputs, count))}
    halves, together = 2 if gated else 1, TOGETHER[form.bits]
    if outputs % halves or (form.bits == 4 and inputs % together):
        raise ValueError(f"{form} has no panels")
    panels = halves * -(-outputs // halves // PANEL)
    size = PANEL * form.bits * -(-inputs // together) * together // 8
    start, by_group = values_ending(layout, gated=gated).removesuffix("s"), (panels, groups, PANEL)
    made = {f"{start}s": Part(UINT8, (panels, size))}
    if form.bits == HALF_BITS:
        return made
    made |= {f"{start}_scales": Part(FLOAT16 if form.half_scales else FLOAT32, by_group)}
    return made if form.symmetric else made | {f"{start}_zero_points": Part(UINT8, by_group)}


def values_ending(layout: Layout, *, gated: bool = False) -> str:
    """The name suffix of the tensor with the quantized values, which is the first of its parts."""
    if layout is Layout.PANELS:
        return ".gated_panels" if gated else ".panels"
    return {Layout.INT8: ".int8", Layout.GROUPS: ".block_codes"}[layout]


def pack(layout: Layout, weight: Weight, *, gated: bool = False) -> dict[str, Array]:
    """The content of each tensor that `parts` names.

    A weight may be packed a few outputs at a time, along each part's axis: for panels a multiple of `PANEL` outputs,
    and for a gated weight equally many of each half.
    """
    wanted = parts(layout, weight.form, gated=gated)
    if layout is Layout.PANELS:
        made = _panels(weight, gated)
    else:
        made = _int8(weight) if layout is Layout.INT8 else _groups(weight)
    return dict(zip(wanted, made, strict=True))


def dequantized(weight: Weight) -> NDArray[np.float32]:
    """The dequantized weight, (value - zero point) * scale: [inputs, outputs] float32."""
    values = weight.values.astype(np.float32)
    size = len(values) // len(weight.scales)
    if weight.zero_points is not None:
        values -= np.repeat(weight.zero_points.astype(np.float32), size, axis=0)
    values *= np.repeat(weight.scales, size, axis=0)
    return values


def _int8(weight: Weight) -> list[Array]:
    """Int8 rounded to nearest, with per-channel scales of the largest magnitude / 127; computed in float32."""
    values = dequantized(weight)
    scales = np.maximum(np.abs(values).max(axis=0), SMALLEST_RANGE) / np.float32(INT8_MAX)
    values /= scales
    return [np.rint(values).astype(np.int8), scales]


def _groups(weight: Weight) -> list[Array]:
    """The same numbers as MatMulNBits reads them: with an offset of 128, and the last group padded with 128, a zero.

    All groups of an output have the scale of the output.
    """
    inputs, outputs = weight.values.shape
    count = -(-inputs // GROUP_SIZE)
    whole = np.full((outputs, count * GROUP_SIZE), 128, np.uint8)
    whole[:, :inputs] = _unsigned(weight).T
    return [whole.reshape(outputs, count, GROUP_SIZE), np.repeat(weight.scales.T, count, axis=1)]


def _panels(weight: Weight, gated: bool) -> list[Array]:
    """Panels of 16 outputs as satchel's own kernels read them; outputs that pad the last one have a scale of 0.

    In 8 bits a panel is [inputs / 4, 16 outputs, 4 inputs], the inputs padded with 128. In 4 bits it is [inputs / 8, 16
    outputs, 4 bytes]: byte i has input i of eight in its low half and input i + 4 in its high half. Symmetric values
    are unsigned by adding 128 or 8. Scales and zero points are [panels, groups, 16]. In float16 a panel is [inputs,
    16], and there is nothing else.
    """
    zero, halves = 1 << weight.bits - 1, 2 if gated else 1

    def alternating(rows: Array, fill: int, arrange: Any) -> Array:
        made = [arrange(_padded(half, fill, axis=1, multiple=PANEL)) for half in np.split(rows, halves, axis=1)]
        whole = made[0] if halves == 1 else np.stack(made, axis=1)
        return np.ascontiguousarray(whole).reshape(-1, *made[0].shape[1:])

    def groups(rows: Array) -> Array:
        return rows.reshape(len(rows), -1, PANEL).transpose(1, 0, 2)

    if weight.bits == HALF_BITS:
        numbers = alternating(weight.values.view(np.uint16), 0, groups)
        return [numbers.reshape(len(numbers), -1).view(np.uint8)]
    words = alternating(_unsigned(weight), zero, lambda values: _words(values, weight.bits))
    made = [words.reshape(len(words), -1).view(np.uint8), alternating(weight.scales, 0, groups)]
    if weight.zero_points is not None:
        made.append(alternating(weight.zero_points, zero, groups))
    return made


def _words(values: Array, bits: int) -> Array:
    """Unsigned values [inputs, outputs] of whole panels as [panels, inputs / 4 or / 8, 16] 4-byte words."""
    outputs = values.shape[1]
    if bits == 4:
        eights = values.reshape(-1, 2, 4, outputs)
        fours = eights[:, 0] | eights[:, 1] << np.uint8(4)
    else:
        fours = _padded(values, 128, axis=0, multiple=4).reshape(-1, 4, outputs)
    # Viewed as 4-byte words, whole rows of a panel are transposed at once.
    together = np.empty((len(fours), outputs, 4), np.uint8)
    for place in range(4):
        together[:, :, place] = fours[:, place]
    return together.view(np.uint32).reshape(len(fours), -1, PANEL).transpose(1, 0, 2)


def _unsigned(weight: Weight) -> Array:
    """The values as unsigned numbers: half the range is added to symmetric ones."""
    values = weight.values.view(np.uint8)
    if weight.zero_points is not None:
        return values
    return values ^ np.uint8(128) if weight.bits == 8 else values + np.uint8(8)


def _padded(rows: Array, fill: int, *, axis: int, multiple: int) -> Array:
    missing = -rows.shape[axis] % multiple
    width = [(0, 0), (0, 0)]
    width[axis] = (0, missing)
    return np.pad(rows, width, constant_values=fill) if missing else rows
