"""Weights that are computed when they are written, a few rows at a time.

A pass never touches the numbers of a large weight: it writes down what is to be done with them (transpose, concatenate,
scale, cast) as a `LazyWeight` over other `LazyWeight`s. The bundle writer then asks for rows, block after block, so the
memory in use
is bounded by the block and not by the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.graphs.ir.arrays import rows_times, times_blocks
from satchel.graphs.ir.low_rank import CHANGES, Change, carry, carry_inputs, carry_outputs, changes_of

BLOCK_BYTES = 32 << 20
"""How many bytes `blocks` hands out at a time."""

PAGE, LINE = 4096, 64
"""Alignment of stored weights in bytes: a memory page for weights of at least `LARGE` bytes, so that each can be mapped
separately, and a cache line for smaller ones."""

LARGE = 1 << 20

FOUR_BITS = (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4))

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
        alias_of: The weight with the same bytes, under which they are stored; None for a weight of its own.
    """

    def __init__(
        self, name: str, shape: Sequence[int], dtype: ir.DataType, rows: Rows, columns: Rows | None = None,
        *, computed: bool = False, alias_of: LazyWeight | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.shape = ir.Shape(shape, frozen=True)
        self.dtype = dtype
        self.doc_string = None
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, object] = {}
        self.computed = computed
        self._alias_of = alias_of
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
    def base(self) -> LazyWeight:
        """The weight under which the bytes are stored: this one, or the one that it is another shape of."""
        return self if self._alias_of is None else self._alias_of.base

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
        """The tensor from first row to last, in C-contiguous blocks of about `block_bytes`.

        Of a type that has two elements in a byte, all blocks but the last have an even number of elements.
        """
        row_bytes = max(1, self.nbytes // max(1, self.row_count))
        step = max(1, block_bytes // row_bytes)
        if self.dtype.itemsize < 1:
            step += step % 2
        for start in range(0, self.row_count, step):
            yield np.ascontiguousarray(self.rows(start, min(start + step, self.row_count)))

    def numpy(self) -> np.ndarray:
        return self._rows(0, self.row_count).reshape(self.dims)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def tobytes(self) -> bytes:
        return stored(np.ascontiguousarray(self.numpy())).tobytes()

    def tofile(self, file: BinaryIO) -> None:
        """Write the values block by block."""
        for block in self.blocks():
            file.write(stored(block).tobytes())

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


def marked_like(weight: LazyWeight, *sources: LazyWeight) -> LazyWeight:
    """`weight` with the marks (`meta`) on which all that it is made of agree; `CHANGES` need a `carry` of their own."""
    first = {key: value for key, value in sources[0].meta.items() if key != CHANGES}
    weight.meta |= {key: value for key, value in first.items() if all(s.meta.get(key) == value for s in sources)}
    return weight


def transposed(weight: LazyWeight, name: str) -> LazyWeight:
    """The transpose of a two-dimensional weight: [a, b] -> [b, a]."""
    height, width = weight.dims
    new = LazyWeight(
        name, (width, height), weight.dtype,
        rows=lambda a, b: weight.columns(a, b).T,
        columns=lambda a, b: weight.rows(a, b).T,
    )  # fmt: skip
    turned = carry(new, weight, lambda change: dataclasses.replace(change, transposed=not change.transposed))
    return marked_like(turned, weight)


def concatenated(weights: Sequence[LazyWeight], axis: int, name: str) -> LazyWeight:
    """Weights joined along `axis`; all other dimensions must agree."""
    first = weights[0]
    others = [[d for i, d in enumerate(w.dims) if i != axis] for w in weights]
    if any(o != others[0] for o in others) or any(w.dtype != first.dtype for w in weights):
        raise ValueError(f"cannot join along axis {axis}: " + ", ".join(map(repr, weights)))
    shape = list(first.dims)
    shape[axis] = sum(w.dims[axis] for w in weights)
    if axis > 0:
        joined = LazyWeight(
            name, shape, first.dtype, lambda a, b: np.concatenate([w.rows(a, b) for w in weights], axis=axis)
        )
        starts = itertools.accumulate((w.dims[1] for w in weights[:-1]), initial=0) if len(shape) == 2 else ()
        moved = [_moved(c, start) for w, start in zip(weights, starts, strict=False) for c in changes_of(w)]
        if moved:
            joined.meta[CHANGES] = tuple(change for change in moved if not change.transposed)
        return marked_like(joined, *weights)

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


def _moved(change: Change, by: int) -> Change:
    return dataclasses.replace(change, start=change.start + by, stop=change.stop + by)


def reshaped(weight: LazyWeight, shape: Sequence[int], name: str) -> LazyWeight:
    """The same bytes under another shape, in which they are not stored again: its `base` is that of `weight`.

    Args:
        weight: The weight as it is stored.
        shape: As many elements in all; each of its rows must be whole rows of `weight`.
        name: What to call it.

    Raises:
        ValueError: The shape has another number of elements, or cuts rows.
    """
    if math.prod(shape) != weight.size or not shape or weight.row_count % max(1, shape[0]):
        raise ValueError(f"{weight} cannot be read as {tuple(shape)}")
    each = weight.row_count // max(1, shape[0])
    return LazyWeight(
        name, shape, weight.dtype, lambda a, b: weight.rows(a * each, b * each).reshape(b - a, *shape[1:]),
        computed=weight.computed, alias_of=weight,
    )  # fmt: skip


def mapped(
    weight: LazyWeight, function: Callable[[np.ndarray], np.ndarray], name: str, dtype: ir.DataType | None = None
) -> LazyWeight:
    """`function` applied to each element; it must keep the shape and give the numpy equivalent of `dtype`."""
    new = LazyWeight(
        name, weight.dims, weight.dtype if dtype is None else dtype,
        rows=lambda a, b: function(weight.rows(a, b)),
        columns=lambda a, b: function(weight.columns(a, b)),
    )  # fmt: skip
    return marked_like(new, weight)


def cast(weight: LazyWeight, dtype: ir.DataType, name: str) -> LazyWeight:
    """The weight in another dtype, rounded to nearest even."""
    return mapped(weight, lambda array: array.astype(dtype.numpy()), name, dtype)


def pack_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Quantized values [rows, n] of 4 bits as bytes [rows, ceil(n / 2)], the first of two in the low half; 8 bits as
    they are."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return np.bitwise_or(codes[:, 0::2], np.left_shift(codes[:, 1::2], 4), dtype=np.uint8)


def unpack_rows(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """The inverse of `pack_rows`: `count` quantized values in each row, a byte each."""
    if bits == 8:
        return packed
    halves = np.stack([packed & 0x0F, packed >> 4], axis=-1)
    return halves.reshape(len(packed), -1)[:, :count]


def stored(block: np.ndarray) -> NDArray[np.uint8]:
    """A C-contiguous array as the bytes in which ONNX stores it: two four-bit numbers to a byte, all else as it is."""
    if block.dtype in FOUR_BITS:
        return pack_rows(np.bitwise_and(block.reshape(1, -1).view(np.uint8), 0x0F, dtype=np.uint8), 4).reshape(-1)
    whole: NDArray[np.uint8] = block.reshape(-1).view(np.uint8)
    return whole


def scaled(weight: LazyWeight, factors: LazyWeight, name: str, axis: int = 0) -> LazyWeight:
    """The weight with entry i of its first (`axis` 0) or last (`axis` -1) axis multiplied by `factors[i]`."""
    if axis not in (0, -1) or factors.dims != (weight.dims[axis],):
        raise ValueError(f"cannot scale axis {axis} of {weight!r} by {factors!r}")
    dtype, vector = weight.dtype.numpy(), len(weight.dims) == 1
    trailing = [1] * (len(weight.dims) - 1)

    def rows(start: int, stop: int) -> np.ndarray:
        if axis == 0 or vector:
            return np.asarray(weight.rows(start, stop) * factors.rows(start, stop).reshape(-1, *trailing), dtype)
        return np.asarray(weight.rows(start, stop) * factors.numpy(), dtype)

    def columns(start: int, stop: int) -> np.ndarray:
        across = factors.numpy()[:, None] if axis == 0 else factors.rows(start, stop)
        return np.asarray(weight.columns(start, stop) * across, dtype)

    new = LazyWeight(
        name, weight.dims, weight.dtype, rows, columns if len(trailing) == 1 else None, computed=weight.computed
    )
    if axis == 0:
        carry_inputs(new, weight, lambda matrix: scaled(matrix, factors, matrix.name))
    else:
        carry_outputs(
            new,
            weight,
            lambda matrix, own: scaled(matrix, _piece(factors, own.start, own.stop), matrix.name, -1),
            mixes=False,
        )
    return marked_like(new, weight)


def _piece(vector: LazyWeight, start: int, stop: int) -> LazyWeight:
    """Elements `start` to `stop` of a weight of one dimension."""
    return LazyWeight(
        vector.name, (stop - start,), vector.dtype, lambda a, b: vector.rows(start + a, start + b),
        computed=vector.computed,
    )  # fmt: skip


def right_multiplied(
    weight: LazyWeight, matrix: np.ndarray, name: str, span: tuple[int, int] | None = None
) -> LazyWeight:
    """`weight @ matrix` over the last axis, for a square matrix [n, n].

    Where the axis, or the part `span` = (start, stop) of it, is a multiple of n, each n channels are multiplied by
    themselves: a block-diagonal matrix. Rows cost as many rows of `weight`.
    """
    size, width = len(matrix), weight.dims[-1]
    low, high = span or (0, width)
    if matrix.shape != (size, size) or not 0 <= low <= high <= width or (high - low) % size:
        raise ValueError(f"cannot multiply channels {low} to {high} of {weight!r} by {list(matrix.shape)}")
    dtype = weight.dtype.numpy()

    def multiply(array: np.ndarray) -> np.ndarray:
        part = array[..., low:high]
        product = np.asarray(rows_times(part.reshape(-1, size), matrix), dtype).reshape(part.shape)
        if span is None:
            return product
        return np.concatenate([array[..., :low], product, array[..., high:]], axis=-1)

    if len(weight.dims) == 1:
        rows: Rows = lambda a, b: multiply(weight.numpy())[a:b]  # noqa: E731
    else:
        rows = lambda a, b: multiply(weight.rows(a, b))  # noqa: E731

    def outputs(own: LazyWeight, change: Change) -> LazyWeight | None:
        first, last = max(low, change.start), min(high, change.stop)
        if first >= last:
            return own
        if (first - low) % size or (last - low) % size:
            return None  # its outputs are mixed with those of a neighbor
        return right_multiplied(own, matrix, own.name, (first - change.start, last - change.start))

    new = LazyWeight(name, weight.dims, weight.dtype, rows, computed=weight.computed)
    return marked_like(carry_outputs(new, weight, outputs, mixes=True), weight)


def left_multiplied(weight: LazyWeight, matrix: np.ndarray, name: str) -> LazyWeight:
    """`matrix @ weight` over the axis before the last, for a square matrix [n, n].

    Where the axis is a multiple of n, each n rows are multiplied by themselves: a block-diagonal matrix. Rows cost the
    rows of the blocks that they lie in, so all of `weight` for a matrix over all rows: ask for large pieces. Columns
    cost as many columns of `weight`.
    """
    size, height = len(matrix), weight.dims[-2]
    if matrix.shape != (size, size) or height % size:
        raise ValueError(f"cannot multiply {weight!r} from the left by {list(matrix.shape)}")
    dtype = weight.dtype.numpy()

    def multiply(array: np.ndarray) -> np.ndarray:
        blocks = array.reshape(math.prod(array.shape[:-1]) // size, size, array.shape[-1])
        return np.asarray(times_blocks(matrix, blocks), dtype).reshape(array.shape)

    def rows(start: int, stop: int) -> np.ndarray:
        if len(weight.dims) > 2:
            return multiply(weight.rows(start, stop))
        first = start // size * size
        return multiply(weight.rows(first, -(-stop // size) * size))[start - first : stop - first]

    columns: Rows | None = None
    if len(weight.dims) == 2:
        columns = lambda a, b: multiply(weight.columns(a, b))  # noqa: E731
    new = LazyWeight(name, weight.dims, weight.dtype, rows, columns, computed=weight.computed)
    return marked_like(carry_inputs(new, weight, lambda low: left_multiplied(low, matrix, low.name)), weight)


def aligned(offset: int, nbytes: int) -> int:
    """The first offset from `offset` on, in bytes, at which a weight of so many bytes may be stored."""
    step = PAGE if nbytes >= LARGE else LINE
    return -(-offset // step) * step
