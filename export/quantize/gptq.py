"""GPTQ: rounding with error feedback, from the second moments of a layer's inputs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from satchel.graphs.quant.rounding import Grid

DAMPING = 0.01
"""Fraction of the mean of the second moments' diagonal that is added to the diagonal."""

COLUMNS = 128
"""Inputs that are rounded before their errors are propagated to the rest of the weight."""


def round_with_feedback(weight: NDArray[np.float32], moments: NDArray[np.float32], grid: Grid) -> NDArray[np.int16]:
    """Round a weight [outputs, inputs] to `grid`, one input after another.

    The remaining inputs compensate for the rounding error of each input. This is GPTQ (Frantar et al. 2023, "GPTQ:
    Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1) with inputs ordered by
    descending second moment (act-order) and a fixed grid.

    Args:
        weight: [outputs, inputs] float32.
        moments: The sum of x x^T over the layer's inputs x, [inputs, inputs].
        grid: The scales, zero points and range of the quantized values.

    Returns:
        The quantized values, [outputs, inputs].
    """
    inputs = weight.shape[1]
    second = torch.from_numpy(moments).double()
    diagonal = second.diagonal()
    never = diagonal <= 0
    diagonal[never] = 1.0
    second.diagonal().add_(DAMPING * diagonal.mean())
    order = torch.argsort(diagonal, descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    scale, zero = (torch.from_numpy(a)[:, order].T.contiguous() for a in grid.expanded(inputs))
    rest = torch.from_numpy(weight.copy())  # a mapped weight is read-only
    rest[:, never] = 0.0
    rest = rest[:, order].T.contiguous()  # [inputs, outputs]: one input is one contiguous row
    codes = torch.empty_like(rest)
    for start in range(0, inputs, COLUMNS):
        stop = min(start + COLUMNS, inputs)
        block, errors = rest[start:stop], torch.empty(stop - start, rest.shape[1])
        for i in range(stop - start):
            row = start + i
            code = (block[i] / scale[row]).round_().add_(zero[row]).clamp_(grid.low, grid.high)
            codes[row] = code
            errors[i] = (block[i] - (code - zero[row]) * scale[row]) / upper[row, row]
            if i + 1 < stop - start:
                block[i + 1 :] -= upper[row, row + 1 : stop, None] * errors[i]
        if stop < inputs:
            rest[stop:] -= upper[start:stop, stop:].T @ errors
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous().to(torch.int16).numpy()
