"""Reads weights as a bundle stores them, quantized or in float16, a few outputs at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.dtypes import FLOAT16, FLOAT32, QUANTIZED, UINT8
from satchel.runtime.bundle.layouts import HALF_BITS, ROWS, Form, Weight
from satchel.runtime.bundle.onnx_wire import Tensor

CODES, SCALES, ZERO_POINTS = ".codes", ".scales", ".zero_points"
"""Suffixes of the tensor names of a stored weight."""

HALF = ".fp16"
"""The suffix of one that is stored in float16."""

ROW_SCALES, ROW_ZERO_POINTS = ".row_scales", ".row_zero_points"
"""Suffixes of a table's (`ROWS`)."""

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
        for bits, ending in ROWS.items():
            if name + CODES not in tensors and name + ending in tensors:
                return StoredTable.of_bits(tensors, name, bits)
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
    def dims(self) -> tuple[int, ...]:
        """Its inputs and outputs."""
        return self.codes.dims

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
            return _joined([read(content, tensor, *outputs) for outputs in ranges])

        if self.scales is None:
            values = joined(_halves, self.codes)
            return Weight(values, np.ones((1, values.shape[1]), np.float32), None, HALF_BITS)
        zero_points = None if self.zero_points is None else joined(_integers, self.zero_points)
        floats = _halves if self.form.half_scales else _floats
        return Weight(joined(_integers, self.codes), joined(floats, self.scales), zero_points, self.form.bits)


@dataclass(frozen=True)
class StoredTable(Stored):
    """A weight that is stored as lookups read it, a row for each output: values [outputs, bytes of the inputs], scales
    [outputs, groups] in float32, zero points [outputs, bytes of the groups]. Values and zero points are unsigned, of
    `bits` bits; without zero points these are half the range.
    """

    bits: int

    @classmethod
    def of_bits(cls, tensors: dict[str, Tensor], name: str, bits: int) -> StoredTable:
        """The table of this name. Raises KeyError or ValueError as `of`."""
        codes, scales = tensors[name + ROWS[bits]], tensors[name + ROW_SCALES]
        zero_points = tensors.get(name + ROW_ZERO_POINTS)
        if len(codes.dims) != 2 or min(codes.dims) < 1 or codes.dtype != UINT8.onnx:
            raise ValueError(f"values of type {codes.dtype} and shape {codes.dims}")
        if scales.dtype != FLOAT32.onnx or len(scales.dims) != 2 or scales.dims[0] != codes.dims[0]:
            raise ValueError(f"scales of type {scales.dtype} and shape {scales.dims}")
        points = (scales.dims[0], -(-scales.dims[1] * bits // 8))
        if zero_points is not None and (zero_points.dtype, zero_points.dims) != (UINT8.onnx, points):
            raise ValueError(f"zero points of type {zero_points.dtype} and shape {zero_points.dims}")
        return cls(codes, scales, zero_points, bits)

    @property
    def dims(self) -> tuple[int, ...]:
        """Its inputs and outputs."""
        outputs, size = self.codes.dims
        return size * 8 // self.bits, outputs

    @property
    def form(self) -> Form:
        """The weight's shape and quantization."""
        inputs, outputs = self.dims
        return Form(inputs, outputs, self._groups, self.bits, symmetric=self.zero_points is None)

    @property
    def _groups(self) -> int:
        return 0 if self.scales is None else self.scales.dims[1]

    def read(self, content: NDArray[np.uint8], ranges: list[tuple[int, int]]) -> Weight:
        """Some of its outputs, as `Stored.read`."""

        def joined(tensor: Tensor | None, dtype: type[Any]) -> NDArray[Any]:
            if tensor is None:
                raise ValueError("a table without scales")
            rows = _raw(content, tensor).view(dtype).reshape(tensor.dims)
            return _joined([rows[start:stop].T for start, stop in ranges])

        scales, unsigned = joined(self.scales, np.float32), self._unpacked(joined(self.codes, np.uint8), self.dims[0])
        if self.zero_points is None:
            half = 1 << self.bits - 1
            return Weight((unsigned.astype(np.int16) - half).astype(np.int8), scales, None, self.bits)
        return Weight(unsigned, scales, self._unpacked(joined(self.zero_points, np.uint8), self._groups), self.bits)

    def _unpacked(self, packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
        """`count` values [count, outputs] of bytes [bytes, outputs], the first of two in the low half."""
        if self.bits == 8:
            return packed
        return np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])[:count]


def _joined(found: list[NDArray[Any]]) -> NDArray[Any]:
    return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


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
