"""Reads weights as a bundle stores them, quantized or in float16, a few outputs at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.dtypes import FLOAT16, FLOAT32, QUANTIZED
from satchel.runtime.bundle.layouts import HALF_BITS, Form, Weight
from satchel.runtime.bundle.onnx_wire import Tensor

CODES, SCALES, ZERO_POINTS = ".codes", ".scales", ".zero_points"
"""Suffixes of the tensor names of a stored weight."""

HALF = ".fp16"
"""The suffix of one that is stored in float16."""

CODE_TYPES = {dtype.onnx: form for form, dtype in QUANTIZED.items()}
"""Number in TensorProto.DataType -> bits, and whether values are symmetric (signed)."""

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Stored:
    """The tensors of a stored weight: values [inputs, outputs], scales and zero points [groups, outputs].

    With one group, scales and zero points are [outputs]; values in float16 have none. Scales of groups are in float16
    or float32. All tensors are in one file.
    """

    codes: Tensor
    scales: Tensor | None
    zero_points: Tensor | None

    @classmethod
    def of(cls, tensors: dict[str, Tensor], name: str) -> Stored:
        """The weight of this name. Raises KeyError if there is none, ValueError if its tensors do not match."""
        if name + CODES not in tensors:
            half = tensors[name + HALF]
            if half.dtype != FLOAT16.onnx or len(half.dims) != 2 or min(half.dims) < 1:
                raise ValueError(f"values of type {half.dtype} and shape {half.dims}")
            return cls(half, None, None)
        codes, scales, zero_points = tensors[name + CODES], tensors[name + SCALES], tensors.get(name + ZERO_POINTS)
        if len(codes.dims) != 2 or min(codes.dims) < 1 or codes.dtype not in CODE_TYPES:
            raise ValueError(f"values of type {codes.dtype} and shape {codes.dims}")
        by_group = len(scales.dims) == 2
        types = (FLOAT32.onnx, FLOAT16.onnx) if by_group else (FLOAT32.onnx,)
        if scales.dtype not in types or scales.dims[-1:] != codes.dims[1:] or len(scales.dims) > 2:
            raise ValueError(f"scales of type {scales.dtype} and shape {scales.dims}")
        if zero_points is not None and (zero_points.dtype, zero_points.dims) != (codes.dtype, scales.dims):
            raise ValueError(f"zero points of type {zero_points.dtype} and shape {zero_points.dims}")
        if (zero_points is None) != CODE_TYPES[codes.dtype][1]:
            raise ValueError("unsigned values need zero points, and signed ones have none")
        return cls(codes, scales, zero_points)

    @property
    def form(self) -> Form:
        """The weight's shape and quantization."""
        inputs, outputs = self.codes.dims
        if self.scales is None:
            return Form(inputs, outputs, groups=1, bits=HALF_BITS, symmetric=True)
        bits, symmetric = CODE_TYPES[self.codes.dtype]
        groups = self.scales.dims[0] if len(self.scales.dims) == 2 else 1
        return Form(inputs, outputs, groups, bits, symmetric, self.scales.dtype == FLOAT16.onnx)

    def read(self, content: NDArray[np.uint8], ranges: list[tuple[int, int]]) -> Weight:
        """Some of its outputs, those of each range (first, last + 1), from the content of its file."""

        def joined(read: Callable[..., NDArray[Any]], tensor: Tensor) -> NDArray[Any]:
            found = [read(content, tensor, *outputs) for outputs in ranges]
            return found[0] if len(found) == 1 else np.concatenate(found, axis=1)

        if self.scales is None:
            values = joined(_halves, self.codes)
            return Weight(values, np.ones((1, values.shape[1]), np.float32), None, HALF_BITS)
        zero_points = None if self.zero_points is None else joined(_integers, self.zero_points)
        floats = _halves if self.form.half_scales else _floats
        return Weight(joined(_integers, self.codes), joined(floats, self.scales), zero_points, self.form.bits)


def _floats(content: NDArray[np.uint8], tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
    """Columns `start` to `stop` of a float32 tensor [rows, columns], or of one row: [rows, stop - start]."""
    return np.array(_raw(content, tensor).view(np.float32).reshape(-1, tensor.dims[-1])[:, start:stop])


def _halves(content: NDArray[np.uint8], tensor: Tensor, start: int, stop: int) -> NDArray[np.float16]:
    """Columns `start` to `stop` of a float16 tensor [rows, columns]."""
    return _raw(content, tensor).view(np.float16).reshape(-1, tensor.dims[-1])[:, start:stop]


def _integers(content: NDArray[np.uint8], tensor: Tensor, start: int, stop: int) -> Integers:
    """Columns `start` to `stop` of quantized values [rows, columns], or of one row, as int8 or uint8.

    4-bit values are packed two to a byte, the low nibble first, without padding between rows.
    """
    columns, raw = tensor.dims[-1], _raw(content, tensor)
    bits, signed = CODE_TYPES[tensor.dtype]
    if bits == 8:
        return raw.view(np.int8 if signed else np.uint8).reshape(-1, columns)[:, start:stop]
    if columns % 2:  # rows may begin in the middle of a byte
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
