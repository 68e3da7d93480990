"""Where weights of 4 or 8 bits lie. Plain numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.graphs.quant.recipe import Scheme


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the quantized values of a weight [outputs, inputs] lie: value = (quantized value - zero point) * scale.

    Attributes:
        scheme: Bits and groups.
        scales: [outputs, groups] float32. A group is `scheme.block` inputs, or all of them.
        zero_points: [outputs, groups] uint8; None where the scheme is symmetric.
    """

    scheme: Scheme
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None

    @property
    def half_scales(self) -> NDArray[np.float32] | NDArray[np.float16]:
        """The scales as linear layers store them: those of groups in float16 if it holds each of them exactly."""
        if self.scheme.block is None:
            return self.scales
        with np.errstate(over="ignore"):
            half = self.scales.astype(np.float16)
        return half if np.array_equal(half, self.scales) else self.scales

    @property
    def low(self) -> int:
        return -(1 << (self.scheme.bits - 1)) if self.zero_points is None else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.scheme.bits) - 1

    def part(self, start: int, stop: int) -> Grid:
        """The grid of the outputs from `start` to `stop`."""
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        return Grid(self.scheme, self.scales[start:stop], zero_points)

    def expanded(self, inputs: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Scale and zero point of each weight, [outputs, inputs] float32."""
        width = inputs // self.scales.shape[1]
        zero = np.zeros_like(self.scales) if self.zero_points is None else self.zero_points.astype(np.float32)
        return np.repeat(self.scales, width, axis=1), np.repeat(zero, width, axis=1)

    def round(self, weight: NDArray[np.float32]) -> NDArray[np.int16]:
        """The nearest quantized values of a weight [outputs, inputs]."""
        rounded = self._groups(weight) / self.scales[..., None]
        np.rint(rounded, out=rounded)
        if self.zero_points is not None:
            rounded += self.zero_points[..., None]
        np.clip(rounded, self.low, self.high, out=rounded)
        codes: NDArray[np.int16] = rounded.astype(np.int16).reshape(weight.shape)
        return codes

    def values(self, codes: NDArray[np.int16]) -> NDArray[np.float32]:
        """What quantized values [outputs, inputs] stand for, float32."""
        values = self._groups(codes).astype(np.float32)
        if self.zero_points is not None:
            values -= self.zero_points[..., None]
        values *= self.scales[..., None]
        return values.reshape(codes.shape)

    def _groups(self, array: NDArray[Any]) -> NDArray[Any]:
        """[outputs, inputs] as [outputs, groups, inputs of a group]."""
        outputs, inputs = array.shape
        groups = self.scales.shape[1]
        return array.reshape(outputs, groups, inputs // groups)


def in_half(scales: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The nearest scales that float16 holds, and none of them 0."""
    half = scales.astype(np.float16)
    smallest = np.copysign(np.finfo(np.float16).smallest_subnormal, scales)
    return np.where(half == 0, smallest, half).astype(np.float32)
