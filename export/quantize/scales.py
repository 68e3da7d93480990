"""Chooses the scales of weights of 4 or 8 bits: those with the least error, in numpy or by compiled loops."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.graphs.ir.arrays import workers
from satchel.graphs.quant.recipe import Scheme
from satchel.graphs.quant.rounding import Grid, in_half
from satchel.runtime.kernels.rounding import LANES, choose_scales, compiled

TINY = 1e-12

HALF_SCALES = 2.0**-18, 65504.0
"""If the scale for a weight's largest number lies between these, its groups have scales that float16 holds: those of
smaller numbers have fewer significant bits, or are the smallest that there are."""

CACHED = 1 << 16
"""Weights whose scales are searched at a time: they stay in a processor's cache."""

Scales = tuple[NDArray[np.float32], NDArray[np.float32] | None]
"""Scales and zero points, which are None if all are 0."""


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
    counts = None if importance is None else np.ascontiguousarray(importance.reshape(inputs // width, width))
    step = max(1, CACHED // inputs)
    largest = max(float(weight.max(initial=0)), -float(weight.min(initial=0))) / ((1 << scheme.bits - 1) - 1)
    half = scheme.block is not None and (largest == 0 or HALF_SCALES[0] <= largest <= HALF_SCALES[1])
    loops = compiled() if width % LANES == 0 else None

    def fit(start: int) -> Scales:
        groups = weight[start : start + step].reshape(-1, width)
        scales, zeros = _candidates(groups, scheme, search, half)
        if len(scales) == 1:
            return scales[0], None if zeros is None else zeros[0]
        best = _best(groups, scales, zeros, counts, scheme, loops), np.arange(len(groups))
        return scales[best], None if zeros is None else zeros[best]

    parts = list(workers().map(fit, range(0, len(weight), step)))
    shape = (len(weight), inputs // width)
    zeros = [zeros for _, zeros in parts if zeros is not None]
    points = np.concatenate(zeros).astype(np.uint8).reshape(shape) if zeros else None
    return Grid(scheme, np.concatenate([scales for scales, _ in parts]).reshape(shape), points)


def _best(
    groups: NDArray[np.float32],
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32] | None,
    counts: NDArray[np.float32] | None,
    scheme: Scheme,
    loops: ctypes.CDLL | None,
) -> NDArray[np.integer[Any]]:
    """The candidate with the least error for each of `groups` [groups, width], [groups]; the first of equal ones."""
    low = -(1 << (scheme.bits - 1)) if scheme.symmetric else 0
    high = low + (1 << scheme.bits) - 1
    if loops is not None:
        return choose_scales(loops, np.ascontiguousarray(groups), scales, zeros, counts, (low, high))
    best, least = np.zeros(len(groups), np.intp), np.empty(0, np.float32)
    error = np.empty_like(groups)
    for index, scale in enumerate(scales):
        np.divide(groups, scale[:, None], out=error)
        np.rint(error, out=error)
        if zeros is not None:
            error += zeros[index][:, None]
        np.clip(error, low, high, out=error)
        if zeros is not None:
            error -= zeros[index][:, None]
        error *= scale[:, None]
        error -= groups
        np.square(error, out=error)
        if counts is not None:
            error.reshape(-1, *counts.shape)[:] *= counts
        total = error.sum(-1)
        if index == 0:
            least = total
            continue
        better = total < least
        least = np.where(better, total, least)
        best[better] = index
    return best


def _candidates(groups: NDArray[np.float32], scheme: Scheme, search: bool, half: bool) -> Scales:
    """Scales and zero points to try for groups [groups, width], [candidates, groups], the plain one first."""
    top = (1 << (scheme.bits - 1)) - 1
    # Wide grids lose more by cutting off their largest weights than they win: eight bits are searched closely. What is
    # won there is that more weights happen to lie near a step, at scales above the plain one as well as below.
    tried = np.linspace(0.6, 1.1, 21) if scheme.bits == 4 else np.linspace(0.96, 1.04, 17)
    factors = np.array([1.0, *(tried if search else ())], np.float32)[:, None]

    def stored(scale: NDArray[np.float32]) -> NDArray[np.float32]:
        return in_half(scale) if half else _not_zero(scale)

    if scheme.symmetric:
        peak = np.maximum(groups.max(-1), -groups.min(-1))
        scales = stored(_not_zero(np.divide(peak, np.float32(top))) * factors)
        if search and scheme.bits == 4:  # the grid has one more step on one side: let the largest weight have it
            largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[:, None], -1)[:, 0]
            scales = np.concatenate([scales, stored(_not_zero(-largest / np.float32(top + 1)) * factors[1:])])
        return scales, None
    steps = (1 << scheme.bits) - 1
    bottom, peak = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = stored((peak - bottom) * factors / np.float32(steps))
    zeros = np.rint(-bottom * factors / scales)
    shifts = np.array([0, -1, 1] if search and scheme.bits == 4 else [0], np.float32)[:, None]
    zeros = np.clip(zeros[:, None] + shifts, 0, np.float32(steps))  # [factors, shifts, groups]
    return np.repeat(scales, len(shifts), 0), zeros.reshape(-1, len(groups))


def _not_zero(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.abs(scale) < TINY, np.float32(TINY), scale).astype(np.float32)
