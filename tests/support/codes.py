"""Rounds small arrays to quantized weights, the plain way."""

from __future__ import annotations

import numpy as np

from satchel.export.quantize.scales import fit_grid
from satchel.graphs.quant.quantized import QuantizedWeight
from satchel.graphs.quant.recipe import Scheme


def rounded(
    name: str, array: np.ndarray, bits: int = 8, block: int | None = 32, symmetric: bool = True
) -> QuantizedWeight:
    """The array [outputs, inputs], or a stack of such ones after the other, as codes on a grid without any search."""
    flat = array.reshape(-1, array.shape[-1])
    grid = fit_grid(flat, Scheme(bits, block, symmetric), search=False)
    return QuantizedWeight(name, grid, grid.round(flat).astype(np.int8 if symmetric else np.uint8))


def values(weight: QuantizedWeight, *shape: int) -> np.ndarray:
    """What the codes stand for, float32, in a shape if one is given."""
    array = weight.grid.values(weight.codes.astype(np.int16))
    return array.reshape(shape) if shape else array


def exact_rows(seed: int, block: int, *shape: int) -> np.ndarray:
    """Whole numbers, one of each block 127: a kernel that rounds them to 8 bits per block changes nothing."""
    array = np.random.default_rng(seed).integers(-126, 127, shape).astype(np.float32)
    array.reshape(-1, block)[:, 3] = 127
    return array
