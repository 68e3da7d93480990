"""Weights that are computed when they are written, a few rows at a time.

A pass never touches the numbers of a large weight: it writes down what is to be done with them (transpose, concatenate,
scale, cast) as a `LazyWeight` over other `LazyWeight`s. The bundle writer then asks for rows, block after block, so the
memory in use
is bounded by the block and not by the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

BLOCK_BYTES = 32 << 20
"""How many bytes `blocks` hands out at a time."""

Rows = Callable[[int, int], np.ndarray]


class LazyWeight(ir.TensorProtocol):
    """A tensor known by shape and dtype, whose values are computed on demand; an initializer's value for onnx-ir.

    Args:
        name: The name of the tensor, as it will stand in the graph.
        shape: Its shape. A weight without dimensions counts as one row.
        dtype: Its ONNX dtype; `rows` must return arrays of exactly the numpy equivalent.
        rows: `rows(start, stop)` returns `tensor[start:stop]` along the first axis as a numpy array.
        columns: `columns(start, stop)` returns `tensor[:, start:stop]`; given where that costs less than reading all
            rows.
        computed: True for what no checkpoint holds (rotary tables, folded constants): stored as it is in any precision.
    """

    def __init__(
        self, name: str, shape: Sequence[int], dtype: ir.DataType, rows: Rows, columns: Rows | None = None,
        *, computed: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.shape = ir.Shape(shape, frozen=True)
        self.dtype = dtype
        self.doc_string = None
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, object] = {}
        self.computed = computed
        self._rows = rows
        self._columns = columns

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape as plain integers."""
        return self.shape.numpy()

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the values."""
        return math.ceil(self.size * self.dtype.itemsize)

    @property
    def raw(self) -> LazyWeight:
        return self

    @property
    def row_count(self) -> int:
        return self.dims[0] if self.dims else 1

    def rows(self, start: int, stop: int) -> np.ndarray:
        """`tensor[start:stop]` along the first axis."""
        return self._rows(start, stop)

    def columns(self, start: int, stop: int) -> np.ndarray:
        """`tensor[:, start:stop]`; reads the whole tensor where the source knows no shorter way."""
        if self._columns is not None:
            return self._columns(start, stop)
        return self._rows(0, self.row_count)[:, start:stop]

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[np.ndarray]:
        """The tensor from first row to last, in C-contiguous blocks of about `block_bytes`."""
        row_bytes = max(1, self.nbytes // max(1, self.row_count))
        step = max(1, block_bytes // row_bytes)
        for start in range(0, self.row_count, step):
            yield np.ascontiguousarray(self.rows(start, min(start + step, self.row_count)))

    def numpy(self) -> np.ndarray:
        return self._rows(0, self.row_count).reshape(self.dims)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def tobytes(self) -> bytes:
        return np.ascontiguousarray(self.numpy()).tobytes()

    def tofile(self, file: BinaryIO) -> None:
        """Write the values block by block."""
        for block in self.blocks():
            file.write(block.tobytes())

    def __dlpack__(self, *, stream: object = None) -> object:
        return self.numpy().__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.numpy().__dlpack_device__()

    def __repr__(self) -> str:
        return f"LazyWeight({self.name}, {self.dims}, {self.dtype})"


def from_array(name: str, array: np.ndarray, *, computed: bool = False) -> LazyWeight:
    """A weight that is in memory (or mapped) already."""
    array = np.asarray(array)
    shaped = array.reshape(1) if array.ndim == 0 else array
    columns: Rows | None = (lambda a, b: shaped[:, a:b]) if array.ndim > 1 else None
    dtype = ir.DataType.from_numpy(array.dtype)
    return LazyWeight(name, array.shape, dtype, lambda a, b: shaped[a:b], columns, computed=computed)


def transposed(weight: LazyWeight, name: str) -> LazyWeight:
    """The transpose of a two-dimensional weight: [a, b] -> [b, a]."""
    height, width = weight.dims
    return LazyWeight(
        name, (width, height), weight.dtype,
        rows=lambda a, b: weight.columns(a, b).T,
        columns=lambda a, b: weight.rows(a, b).T,
    )  # fmt: skip


def concatenated(weights: Sequence[LazyWeight], axis: int, name: str) -> LazyWeight:
    """Weights joined along `axis`; all other dimensions must agree."""
    first = weights[0]
    others = [[d for i, d in enumerate(w.dims) if i != axis] for w in weights]
    if any(o != others[0] for o in others) or any(w.dtype != first.dtype for w in weights):
        raise ValueError(f"cannot join along axis {axis}: " + ", ".join(map(repr, weights)))
    shape = list(first.dims)
    shape[axis] = sum(w.dims[axis] for w in weights)
    if axis > 0:
        return LazyWeight(
            name, shape, first.dtype, lambda a, b: np.concatenate([w.rows(a, b) for w in weights], axis=axis)
        )

    def rows(start: int, stop: int) -> np.ndarray:
        parts, offset = [], 0
        for weight in weights:
            low, high = max(start - offset, 0), min(stop - offset, weight.row_count)
            if low < high:
                parts.append(weight.rows(low, high))
            offset += weight.row_count
        return np.concatenate(parts) if parts else first.rows(0, 0)

    columns: Rows | None = None
    if len(shape) > 1:
        columns = lambda a, b: np.concatenate([w.columns(a, b) for w in weights])  # noqa: E731
    return LazyWeight(name, shape, first.dtype, rows, columns)


def mapped(
    weight: LazyWeight, function: Callable[[np.ndarray], np.ndarray], name: str, dtype: ir.DataType | None = None
) -> LazyWeight:
    """`function` applied to each element; it must keep the shape and give the numpy equivalent of `dtype`."""
    return LazyWeight(
        name, weight.dims, weight.dtype if dtype is None else dtype,
        rows=lambda a, b: function(weight.rows(a, b)),
        columns=lambda a, b: function(weight.columns(a, b)),
    )  # fmt: skip


def cast(weight: LazyWeight, dtype: ir.DataType, name: str) -> LazyWeight:
    """The weight in another dtype, rounded to nearest even."""
    return mapped(weight, lambda array: array.astype(dtype.numpy()), name, dtype)
