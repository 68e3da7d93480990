"""GPTQ and its refinement: rounding that minimizes the error of a layer's outputs, from the moments of its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from satchel.graphs.ir.arrays import transposed
from satchel.graphs.quant.rounding import Grid, in_half
from satchel.runtime.kernels.rounding import INPUTS, compiled, round_inputs

DAMPING = 0.01
"""Fraction of the mean of the second moments' diagonal that is added to the diagonal."""

COLUMNS = INPUTS
"""Inputs that are rounded before their errors are propagated to the rest of the weight."""

SWEEPS = 2
"""Sweeps of `Feedback.refine` after GPTQ."""

RIDGE = 1e-4
"""Share of its own moment with which a scale is drawn towards its old value when all scales are fitted."""


class Feedback:
    """Rounds weights of one layer so that inputs make up for each other's errors.

    Args:
        moments: The sum of x x^T over the layer's inputs x, [inputs, inputs] float32.

    Attributes:
        squares: Their diagonal: how much each input is used, [inputs].
    """

    def __init__(self, moments: NDArray[np.float32]) -> None:
        second = torch.from_numpy(moments).double()
        self.squares = np.ascontiguousarray(moments.diagonal())
        diagonal = second.diagonal()
        self._never = diagonal <= 0
        diagonal[self._never] = 1.0
        second.diagonal().add_(DAMPING * diagonal.mean())
        self._order = torch.argsort(diagonal, descending=True)
        second = second[self._order][:, self._order]
        # The upper factor U of the inverse, H^-1 = U^T U, is the inverse of R in H = R R^T, R upper: the factor of H
        # with inputs from last to first.
        lower = torch.linalg.cholesky(second.flip(0, 1))
        eye = torch.eye(len(lower), dtype=lower.dtype)
        self._upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()
        self._moments = second.float()  # of the inputs in order

    @property
    def importance(self) -> NDArray[np.float32]:
        """What an error of each weight costs after the inputs that are rounded later made up for it, [inputs].

        It is the mean square of what those inputs do not explain, times the number of inputs: the pivots of H.
        """
        pivots = torch.empty(len(self._order))
        pivots[self._order] = self._upper.diagonal() ** -2
        return pivots.numpy()

    def error(self, difference: NDArray[np.float32]) -> float:
        """The squared error of all outputs, e^T H e for each output's difference e of weights, [outputs, inputs]."""
        moved = self._ordered(difference)
        return float((moved * (self._moments @ moved)).sum(dtype=torch.float64))

    def round(self, weight: NDArray[np.float32], grid: Grid) -> NDArray[np.int16]:
        """Round a weight [outputs, inputs] to `grid`, one input after another; returns the quantized values.

        The remaining inputs compensate for the rounding error of each input. This is GPTQ (Frantar et al. 2023, "GPTQ:
        Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1) with inputs ordered
        by descending second moment (act-order) and a fixed grid.
        """
        rest = self._ordered(weight)
        codes = torch.empty_like(rest)
        for part, errors in self._blocks(grid, self._upper, rest, codes):
            if part.stop < len(rest):
                rest[part.stop :] -= self._upper[part, part.stop :].T @ errors
        return self._codes(codes)

    def refine(
        self, weight: NDArray[np.float32], grid: Grid, codes: NDArray[np.int16], sweeps: int = SWEEPS
    ) -> tuple[Grid, NDArray[np.int16]]:
        """Lower the error of rounded values; returns the grid and the quantized values.

        The error of an output is e^T H e for the error e of its weights and the moments H of the inputs. By turns, all
        scales of an output become those with the least error for its quantized values, by least squares, and each
        quantized value in turn becomes the best with all others fixed (coordinate descent). Neither raises the error,
        but for the rounding of scales to float16.

        Args:
            weight: [outputs, inputs].
            grid: Where `codes` lie.
            codes: [outputs, inputs].
            sweeps: How often.
        """
        if sweeps == 0:
            return grid, codes
        target = self._ordered(weight)
        values = torch.from_numpy(codes.astype(np.float32))[:, self._order].T.contiguous()
        for _ in range(sweeps):
            grid = self._fitted(target, values, grid)
            self._descend(target, values, grid)
        return grid, self._codes(values)

    def _descend(self, target: torch.Tensor, codes: torch.Tensor, grid: Grid) -> None:
        """Set each of the quantized values [inputs, outputs] to the best with all others fixed, one input at a time."""
        scale, zero = self._of_inputs(grid, len(target))
        slope = self._moments @ ((codes - zero) * scale - target)  # half of the error's gradient, [inputs, outputs]
        for part, moved in self._blocks(grid, self._moments, slope, codes, descend=True):
            if part.stop < len(target):  # earlier inputs are not visited again
                slope[part.stop :] += self._moments[part.stop :, part] @ moved

    def _blocks(
        self, grid: Grid, square: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, descend: bool = False
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Round COLUMNS inputs after the other, `values` and `codes` [inputs, outputs], as `round_inputs` says.

        Yields after each block its inputs, and what the inputs after it have to make up for, [inputs, outputs].
        """
        inputs, groups = len(values), grid.scales.shape[1]
        group_of = self._order // (inputs // groups)
        scales = np.ascontiguousarray(grid.scales.T)
        zeros = None if grid.zero_points is None else np.ascontiguousarray(grid.zero_points.T, np.float32)
        loops = compiled()
        for start in range(0, inputs, COLUMNS):
            part = slice(start, min(start + COLUMNS, inputs))
            given = square[part, part].contiguous(), values[part], codes[part]
            if loops is None:
                scale = torch.from_numpy(scales)[group_of[part]]
                zero = torch.zeros_like(scale) if zeros is None else torch.from_numpy(zeros)[group_of[part]]
                yield part, (_descend_inputs if descend else _round_inputs)(*given, scale, zero, (grid.low, grid.high))
                continue
            near, block, found = (tensor.numpy() for tensor in given)
            bounds = grid.low, grid.high
            places = group_of[part].numpy()
            moved = round_inputs(loops, near, places, scales, zeros, bounds, block, found, descend=descend)
            yield part, torch.from_numpy(moved)

    def _fitted(self, target: torch.Tensor, codes: torch.Tensor, grid: Grid) -> Grid:
        """The grid with the scales that have the least error for these quantized values [inputs, outputs]."""
        inputs, outputs = target.shape
        groups = grid.scales.shape[1]
        _, zero = self._of_inputs(grid, inputs)
        group_of = self._order // (inputs // groups)
        steps = codes - zero
        members = [torch.nonzero(group_of == group).flatten() for group in range(groups)]
        projected = self._moments @ target
        wanted = torch.stack([(steps[m] * projected[m]).sum(0) for m in members])  # [groups, outputs]
        curve = torch.empty(outputs, groups, groups)
        for group, rows in enumerate(members):
            moved = self._moments[:, rows] @ steps[rows]
            for other, columns in enumerate(members):
                curve[:, group, other] = (moved[columns] * steps[columns]).sum(0)
        ridge = RIDGE * curve.diagonal(dim1=1, dim2=2)
        ridge = ridge + RIDGE * ridge.mean(1, keepdim=True) + 1e-30
        old = torch.from_numpy(grid.scales)
        curve += torch.diag_embed(ridge)
        found = torch.linalg.solve(curve.double(), (wanted.T + ridge * old).double()).float()
        scales = torch.where(found.isfinite() & (found != 0), found, old).numpy()
        if grid.half_scales.dtype == np.float16:
            rounded = in_half(scales)
            scales = np.where(np.isfinite(rounded), rounded, grid.scales)
        return dataclasses.replace(grid, scales=scales)

    def _of_inputs(self, grid: Grid, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of each weight, [inputs, outputs], inputs in order."""
        scale, zero = (torch.from_numpy(a)[:, self._order].T.contiguous() for a in grid.expanded(inputs))
        return scale, zero

    def _ordered(self, weight: NDArray[np.float32]) -> torch.Tensor:
        """[inputs, outputs], inputs in order: one input is one contiguous row."""
        copy = torch.from_numpy(transposed(weight))
        copy[self._never] = 0.0
        return copy[self._order]

    def _codes(self, codes: torch.Tensor) -> NDArray[np.int16]:
        result = torch.empty_like(codes, dtype=torch.int16)
        result[self._order] = codes.to(torch.int16)
        return result.T.contiguous().numpy()


def _round_inputs(
    upper: torch.Tensor,
    block: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bounds: tuple[int, int],
) -> torch.Tensor:
    """GPTQ of a few inputs, where there is no compiled loop: `block`, `scale` and the others are [inputs, outputs]."""
    errors = torch.empty_like(block)
    for i in range(len(block)):
        codes[i] = (block[i] / scale[i]).round_().add_(zero[i]).clamp_(*bounds)
        errors[i] = (block[i] - (codes[i] - zero[i]) * scale[i]) / upper[i, i]
        block[i + 1 :] -= upper[i, i + 1 :, None] * errors[i]
    return errors


def _descend_inputs(
    moments: torch.Tensor,
    slope: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bounds: tuple[int, int],
) -> torch.Tensor:
    """The same of coordinate descent."""
    moved = torch.empty_like(slope)
    for i in range(len(slope)):
        new = (slope[i] / (scale[i] * -moments[i, i])).add_(codes[i]).round_().clamp_(*bounds)
        moved[i] = (new - codes[i]) * scale[i]
        codes[i] = new
        slope[i + 1 :] += moments[i, i + 1 :, None] * moved[i]
    return moved
