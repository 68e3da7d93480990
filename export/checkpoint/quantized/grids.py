"""What the readers of quantized formats share: packed integers, and weights on a grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight, from_array
from satchel.graphs.quant.recipe import BLOCKS, Scheme
from satchel.graphs.quant.stored import GRID, WIDENED, StoredGrid, kernel_block

Codes = Callable[[int, int], NDArray[Any]]
"""Quantized values [stop - start, inputs] of the outputs from start to stop."""

Settings = Mapping[str, Any]
"""A format's settings in the config."""

INPUTS_AT_ONCE = 1 << 22
"""Values that `columns` unpacks at a time."""


@dataclasses.dataclass(frozen=True)
class Affine:
    """A weight [outputs, inputs] whose values are (quantized value - zero point) * scale.

    Attributes:
        bits: 4 or 8.
        inputs: Its inputs.
        codes: The quantized values: unsigned, or signed where there are no zero points.
        scales: [outputs, groups] float32.
        zero_points: [outputs, groups] uint8, or None.
        group_of: The group of each input, [inputs]; None where groups are equal parts in order.
        token_activations: Whether inputs are to be rounded to int8, token by token.
    """

    bits: int
    inputs: int
    codes: Codes
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None = None
    group_of: NDArray[np.int64] | None = None
    token_activations: bool = False


def affine_weight(name: str, affine: Affine) -> LazyWeight:
    """The float32 weight of an affine one, marked with its grid, or with the reason that no kernel reads it."""
    outputs, groups = affine.scales.shape
    middle = 1 << affine.bits - 1
    if affine.zero_points is not None and bool((affine.zero_points == middle).all()):
        unsigned = affine.codes
        affine = dataclasses.replace(
            affine, codes=lambda a, b: unsigned(a, b).astype(np.int16) - middle, zero_points=None
        )
    columns = (
        np.arange(affine.inputs) // max(1, affine.inputs // groups) if affine.group_of is None else affine.group_of
    )

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        values = affine.codes(start, stop).astype(np.float32)
        if affine.zero_points is not None:
            values -= affine.zero_points[start:stop].astype(np.float32)[:, columns]
        values *= affine.scales[start:stop][:, columns]
        return values

    weight = lazy_weight(name, (outputs, affine.inputs), rows)
    grid, reason = _grid(affine, name)
    weight.meta[WIDENED if grid is None else GRID] = reason if grid is None else grid
    return weight


def lazy_weight(name: str, shape: Sequence[int], rows: Callable[[int, int], NDArray[np.float32]]) -> LazyWeight:
    """A float32 weight that is computed from its first axis; columns are read some rows at a time."""
    step = max(1, INPUTS_AT_ONCE // max(1, int(np.prod(shape[1:]))))

    def columns(start: int, stop: int) -> NDArray[np.float32]:
        parts = [rows(low, min(low + step, shape[0]))[:, start:stop] for low in range(0, shape[0], step)]
        return np.concatenate(parts)

    return LazyWeight(name, shape, ir.DataType.FLOAT, rows, columns if len(shape) == 2 else None)


def _grid(affine: Affine, name: str) -> tuple[StoredGrid | None, str]:
    """The grid as kernels read it; None with the reason if no kernel does."""
    groups = affine.scales.shape[1]
    size, rest = divmod(affine.inputs, groups)
    order = None
    if affine.group_of is not None:
        order = np.argsort(affine.group_of, kind="stable").astype(np.int64)
        if rest or (np.bincount(affine.group_of, minlength=groups) != size).any():
            return None, "its groups are of different sizes"
        if (order == np.arange(affine.inputs)).all():
            order = None
    if affine.token_activations and groups == 1 and affine.bits == 8 and affine.zero_points is None:
        block = None
    else:
        block = kernel_block(size)
        if rest or block is None:
            sizes = ", ".join(map(str, BLOCKS))
            return None, f"no kernel has its group size {size}, which is not a multiple of {sizes.partition(',')[0]}"
    scheme = Scheme(affine.bits, block, affine.zero_points is None)
    repeats = 1 if block is None else size // block
    scales = from_array(f"{name}.scales", affine.scales.repeat(repeats, axis=1))
    points = None if affine.zero_points is None else affine.zero_points.repeat(repeats, axis=1)
    stored = None if points is None else from_array(f"{name}.zero_points", points)
    return StoredGrid(scheme, scales, stored, order, affine.token_activations and block is None), ""


def unpacked(words: NDArray[np.int32], bits: int, axis: int) -> NDArray[np.uint8]:
    """Unsigned values of 4 or 8 bits from int32 words, the first in the lowest bits, along an axis."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    moved = np.moveaxis(np.ascontiguousarray(words).view(np.uint32), axis, -1)
    values = ((moved[..., None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8)
    return np.moveaxis(values.reshape(*moved.shape[:-1], -1), -1, axis)


class Layer:
    """The tensors of one quantized layer, by their suffix after the layer's name."""

    def __init__(self, name: str, tensors: Mapping[str, LazyWeight], place: str, joint: str = ".") -> None:
        self.name, self.place, self._tensors, self._joint = name, place, tensors, joint

    def find(self, suffix: str) -> LazyWeight | None:
        """A tensor that may be absent."""
        return self._tensors.get(f"{self.name}{self._joint}{suffix}")

    def get(self, suffix: str, kinds: str, dims: Sequence[int | None] | None = None) -> LazyWeight:
        """A tensor of one of numpy's `kinds` ("i", "u", "f", ...) with these dimensions; None for any.

        Raises:
            ExportError: It is missing, or has another type or shape.
        """
        found, name = self.find(suffix), f"{self.name}{self._joint}{suffix}"
        if found is None:
            raise self.error(f"{name} is missing; download the checkpoint again")
        dtype = found.dtype.numpy()
        if ("f" if dtype.kind == "V" else dtype.kind) not in kinds:  # V: 8-bit floats
            raise self.error(f"{name} has type {dtype}, which does not belong to the format")
        fits = dims is None or (
            len(dims) == len(found.dims) and all(b in (None, a) for a, b in zip(found.dims, dims, strict=True))
        )
        if not fits:
            wanted = ["any" if d is None else d for d in dims or ()]
            raise self.error(
                f"{name} has shape {list(found.dims)}, but the config and the other tensors need {wanted}; "
                "download the checkpoint again"
            )
        return found

    def error(self, message: str) -> ExportError:
        """An error about the layer."""
        return ExportError(f"{self.place}: {message}")
