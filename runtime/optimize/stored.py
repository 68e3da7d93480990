"""Reads the weights of products as a bundle stores them, a few outputs at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.dtypes import QUANTIZED
from satchel.runtime.bundle.onnx_wire import Tensor

CODES, SCALES, ZERO_POINTS = ".codes", ".scales", ".zero_points"
"""Ends of the names of a stored weight's parts."""

CODE_TYPES = {dtype.onnx: form for form, dtype in QUANTIZED.items()}
"""Number in TensorProto.DataType -> bits, and whether codes are signed."""

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Stored:
    """Codes [inputs, outputs], scales and zero points [blocks, outputs], or [outputs] for one block, in one file."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    @classmethod
    def of(cls, tensors: dict[str, Tensor], name: str) -> Stored:
        """The weight of this name. Raises KeyError where there is none, ValueError where it is of another form."""
        found = cls(tensors[name + CODES], tensors[name + SCALES], tensors.get(name + ZERO_POINTS))
        if len(found.codes.dims) != 2 or found.codes.dtype not in CODE_TYPES:
            raise ValueError(f"codes of type {found.codes.dtype} and shape {found.codes.dims}")
        return found

    def values(self, content: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.float32]:
        """What the codes of the outputs from `start` to `stop` stand for: [inputs, outputs] float32."""
        steps = integers(content, self.codes, start, stop).astype(np.float32)
        scales = floats(content, self.scales, start, stop)
        block = len(steps) // len(scales)
        if self.zero_points is not None:
            zeros = integers(content, self.zero_points, start, stop).astype(np.float32)
            steps -= np.repeat(zeros, block, axis=0)
        steps *= np.repeat(scales, block, axis=0)
        return steps


def floats(content: NDArray[np.uint8], tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
    """Columns `start` to `stop` of a float32 tensor [rows, columns], or of one row: [rows, stop - start]."""
    return np.array(_raw(content, tensor).view(np.float32).reshape(-1, tensor.dims[-1])[:, start:stop])


def integers(content: NDArray[np.uint8], tensor: Tensor, start: int, stop: int) -> Integers:
    """Columns `start` to `stop` of codes [rows, columns], or of one row: [rows, stop - start], int8 or uint8.

    Two codes of 4 bits are in a byte, the low half first; rows follow each other without a gap.
    """
    columns, raw = tensor.dims[-1], _raw(content, tensor)
    bits, signed = CODE_TYPES[tensor.dtype]
    if bits == 8:
        return raw.view(np.int8 if signed else np.uint8).reshape(-1, columns)[:, start:stop]
    if columns % 2:  # rows begin in the middle of a byte
        return _nibbles(raw, signed)[: int(np.prod(tensor.dims))].reshape(-1, columns)[:, start:stop]
    first, last = start // 2, -(-stop // 2)
    whole = _nibbles(raw.reshape(-1, columns // 2)[:, first:last], signed).reshape(-1, 2 * (last - first))
    return whole[:, start - 2 * first : stop - 2 * first]


def _raw(content: NDArray[np.uint8], tensor: Tensor) -> NDArray[np.uint8]:
    offset = int(tensor.place["offset"])
    return content[offset : offset + int(tensor.place["length"])]


def _nibbles(raw: NDArray[np.uint8], signed: bool) -> Integers:
    halves = np.empty((*raw.shape, 2), np.uint8)
    np.bitwise_and(raw, 15, out=halves[..., 0])
    np.right_shift(raw, 4, out=halves[..., 1])
    codes = halves.ravel()
    return (codes ^ 8).view(np.int8) - np.int8(8) if signed else codes
