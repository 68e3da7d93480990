"""Rounds weights to 4 or 8 bits: the grids, and the search for scales with the least error. Plain numpy."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.graphs.quant.recipe import Scheme

TINY = 1e-12

HALF_SCALES = 2.0**-18, 65504.0
"""If the scale for a weight's largest number lies between these, its groups have scales that float16 holds: those of
smaller numbers have fewer significant bits, or are the smallest that there are."""

CACHED = 1 << 16
"""Weights whose scales are searched at a time: they stay in a processor's cache."""


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
        scale, zero = self.expanded(weight.shape[1])
        codes: NDArray[np.int16] = np.clip(np.rint(weight / scale) + zero, self.low, self.high).astype(np.int16)
        return codes

    def values(self, codes: NDArray[np.int16]) -> NDArray[np.float32]:
        """What quantized values [outputs, inputs] stand for, float32."""
        scale, zero = self.expanded(codes.shape[1])
        return (codes - zero) * scale


def fit_grid(
    weight: NDArray[np.float32], scheme: Scheme, importance: NDArray[np.float32] | None = None, *, search: bool = True
) -> Grid:
    """Choose scales (and zero points) for a weight [outputs, inputs].

    Scales of groups are numbers that float16 holds (`Grid.half_scales`), unless all weights are too small or some are
    too large for that.

    Args:
        weight: The weight, float32.
        scheme: How it is stored.
        importance: How much the squared error of each input counts, [inputs]; all the same without it.
        search: Try smaller and larger scales than the one that just reaches the largest weight, and keep for each
            group the one with the least error. Without it, that one.
    """
    inputs = weight.shape[1]
    width = scheme.block or inputs
    counts = None if importance is None else importance.reshape(1, inputs // width, width)
    step = max(1, CACHED // inputs)
    largest = float(np.abs(weight).max(initial=0)) / ((1 << scheme.bits - 1) - 1)
    half = scheme.block is not None and (largest == 0 or HALF_SCALES[0] <= largest <= HALF_SCALES[1])

    def fit(start: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return _fit(weight[start : start + step].reshape(-1, inputs // width, width), scheme, counts, search, half)

    with ThreadPoolExecutor() as pool:  # numpy works on arrays outside the interpreter's lock
        parts = list(pool.map(fit, range(0, len(weight), step)))
    scales, zeros = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Grid(scheme, scales, None if scheme.symmetric else zeros.astype(np.uint8))


def _fit(
    blocks: NDArray[np.float32], scheme: Scheme, counts: NDArray[np.float32] | None, search: bool, half: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and zero points, [outputs, groups], of groups [outputs, groups, width]."""
    low = -(1 << (scheme.bits - 1)) if scheme.symmetric else 0
    high = low + (1 << scheme.bits) - 1
    pairs = _candidates(blocks, scheme, search, half)
    scales, zeros = pairs[0]
    best: NDArray[np.float32] | None = None
    error = np.empty_like(blocks)
    for scale, zero in pairs:
        np.divide(blocks, scale, out=error)
        np.rint(error, out=error)
        if not scheme.symmetric:
            error += zero
        np.clip(error, low, high, out=error)
        if not scheme.symmetric:
            error -= zero
        error *= scale
        error -= blocks
        np.square(error, out=error)
        if counts is not None:
            error *= counts
        total = error.sum(-1, keepdims=True)
        if best is None:
            best = total
            continue
        better = total < best
        best = np.where(better, total, best)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    return scales[..., 0].astype(np.float32), zeros[..., 0].astype(np.float32)


def _candidates(
    blocks: NDArray[np.float32], scheme: Scheme, search: bool, half: bool
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Pairs of scale and zero point [outputs, groups, 1] to try, the plain one first."""
    top = (1 << (scheme.bits - 1)) - 1
    # Wide grids lose more by cutting off their largest weights than they win: eight bits are searched closely. What is
    # won there is that more weights happen to lie near a step, at scales above the plain one as well as below.
    factors = np.linspace(0.6, 1.1, 21) if scheme.bits == 4 else np.linspace(0.96, 1.04, 17)

    def stored(scale: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        return in_half(scale) if half else _not_zero(scale)

    if scheme.symmetric:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
        plain = _not_zero(np.abs(largest) / top)
        none = np.zeros_like(plain)
        pairs = [(stored(plain), none)]
        if search:
            pairs += [(stored(plain * np.float32(f)), none) for f in factors]
            if scheme.bits == 4:  # the grid has one more step on one side: let the largest weight have it
                sided = _not_zero(-largest / (top + 1))
                pairs += [(stored(sided * np.float32(f)), none) for f in factors]
        return pairs
    steps = (1 << scheme.bits) - 1
    bottom, peak = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    pairs = []
    for factor in (1.0, *(factors if search else ())):
        scale = stored((peak - bottom) * np.float32(factor) / steps)
        zero = np.rint(-bottom * np.float32(factor) / scale)
        for shift in (0, -1, 1) if search and scheme.bits == 4 else (0,):
            pairs.append((scale, np.clip(zero + shift, 0, steps)))
    return pairs


def in_half(scales: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The nearest scales that float16 holds, and none of them 0."""
    half = scales.astype(np.float16)
    smallest = np.copysign(np.finfo(np.float16).smallest_subnormal, scales)
    return np.where(half == 0, smallest, half).astype(np.float32)


def _not_zero(scale: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    return np.where(np.abs(scale) < TINY, np.float32(TINY), scale).astype(np.float32)
