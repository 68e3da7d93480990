"""Lazy weights give the numbers that numpy gives, block by block, and read no more than is asked of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import normal

from satchel.graphs.ir.weights import BLOCK_BYTES, LazyWeight, cast, concatenated, from_array, mapped, transposed

A, B, C = normal(1, 13, 7), normal(2, 5, 7), normal(3, 13, 3)
STEPS = [1, 4, 27, 28, 29, 56, 13 * 28 - 1, 13 * 28, BLOCK_BYTES]


def lazy(array: np.ndarray, name: str = "w") -> LazyWeight:
    return from_array(name, array)


MADE = {
    "from_array": (lazy(A), A),
    "three axes": (lazy(normal(4, 3, 5, 2)), normal(4, 3, 5, 2)),
    "a vector": (lazy(normal(5, 11)), normal(5, 11)),
    "transposed": (transposed(lazy(A), "t"), A.T),
    "transposed back": (transposed(transposed(lazy(A), "t"), "u"), A),
    "rows joined": (concatenated([lazy(A), lazy(B), lazy(A)], 0, "c"), np.concatenate([A, B, A])),
    "columns joined": (concatenated([lazy(A), lazy(C)], 1, "c"), np.concatenate([A, C], 1)),
    "columns of transposes joined": (
        concatenated([transposed(lazy(A), "t"), transposed(lazy(B), "u")], 1, "c"),
        np.concatenate([A.T, B.T], 1),
    ),
    "vectors joined": (concatenated([lazy(A[0]), lazy(C[0])], 0, "c"), np.concatenate([A[0], C[0]])),
    "mapped": (mapped(lazy(A), lambda array: array * 2, "m"), A * 2),
    "cast": (cast(lazy(A), ir.DataType.FLOAT16, "h"), A.astype(np.float16)),
    "a cast of a join of a transpose": (
        cast(concatenated([transposed(lazy(A), "t"), lazy(B.T)], 1, "c"), ir.DataType.FLOAT16, "h"),
        np.concatenate([A.T, B.T], 1).astype(np.float16),
    ),
    "one number": (lazy(np.asarray(2.5, np.float32)), np.asarray(2.5, np.float32)),
    "one number mapped": (mapped(lazy(np.asarray(2.5, np.float32)), np.negative, "m"), np.asarray(-2.5, np.float32)),
    "integers": (lazy(np.arange(10).reshape(5, 2)), np.arange(10).reshape(5, 2)),
    "an array that is not contiguous": (lazy(A[::2, ::3]), A[::2, ::3]),
    "no rows": (lazy(A[:0]), A[:0]),
    "no columns": (lazy(A[:, :0]), A[:, :0]),
    "no rows joined": (concatenated([lazy(A[:0]), lazy(B[:0])], 0, "c"), A[:0]),
    "no rows between": (concatenated([lazy(A), lazy(B[:0]), lazy(B)], 0, "c"), np.concatenate([A, B])),
    "no rows transposed": (transposed(lazy(A[:0]), "t"), A[:0].T),
}


@pytest.mark.parametrize("name", MADE)
def test_a_weight_is_the_array_that_numpy_makes(name: str) -> None:
    weight, array = MADE[name]
    assert weight.dims == array.shape
    assert weight.size == array.size
    assert weight.nbytes == array.nbytes
    assert weight.dtype.numpy() == array.dtype
    for found in (weight.numpy(), np.asarray(weight)):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    assert weight.tobytes() == array.tobytes()


@pytest.mark.parametrize("size", STEPS)
@pytest.mark.parametrize("name", MADE)
def test_blocks_of_any_size_are_the_whole_in_order(name: str, size: int) -> None:
    weight, array = MADE[name]
    blocks = list(weight.blocks(size))
    assert b"".join(block.tobytes() for block in blocks) == array.tobytes()
    assert all(block.flags["C_CONTIGUOUS"] and block.dtype == array.dtype for block in blocks)
    row = array.nbytes // max(1, len(np.atleast_1d(array)))
    assert all(block.nbytes <= max(size, row) for block in blocks)


@pytest.mark.parametrize("name", [name for name, (_, array) in MADE.items() if array.ndim])
def test_rows_and_columns_are_slices(name: str) -> None:
    weight, array = MADE[name]
    height = len(array)
    for start, stop in ((0, height), (0, min(1, height)), (height // 2, height), (height, height)):
        np.testing.assert_array_equal(weight.rows(start, stop), array[start:stop])
    if array.ndim == 2:
        width = array.shape[1]
        for start, stop in ((0, width), (width // 2, width), (width, width)):
            np.testing.assert_array_equal(weight.columns(start, stop), array[:, start:stop])


def test_a_weight_can_be_an_initializer_of_a_model() -> None:
    tensor = ir.to_proto(ir.Value(name="w", const_value=MADE["transposed"][0]).const_value)
    np.testing.assert_array_equal(np.frombuffer(tensor.raw_data, np.float32).reshape(7, 13), A.T)


class Counted:
    """A source that writes down which rows and columns were read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.read = array, list[tuple[str, int, int]]()
        self.weight = LazyWeight("w", array.shape, ir.DataType.FLOAT, self.rows, self.columns)

    def rows(self, start: int, stop: int) -> np.ndarray:
        self.read.append(("rows", start, stop))
        return self.array[start:stop]

    def columns(self, start: int, stop: int) -> np.ndarray:
        self.read.append(("columns", start, stop))
        return self.array[:, start:stop]


def test_nothing_is_read_before_values_are_asked_for() -> None:
    source = Counted(A)
    made = cast(concatenated([transposed(source.weight, "t")] * 2, 1, "c"), ir.DataType.FLOAT16, "h")
    assert made.dims == (7, 26)
    assert source.read == []


def test_rows_of_a_join_read_their_own_part_only() -> None:
    first, second = Counted(A), Counted(B)
    joined = concatenated([first.weight, second.weight], 0, "c")
    joined.rows(11, 15)
    assert (first.read, second.read) == ([("rows", 11, 13)], [("rows", 0, 2)])
    joined.rows(13, 14)
    assert first.read == [("rows", 11, 13)]


def test_a_cast_rounds_to_nearest_even() -> None:
    between = np.asarray([2049, 2051, -2049, -2051], np.float32)  # half way between neighbors in float16
    found = cast(lazy(between), ir.DataType.FLOAT16, "h").numpy()
    np.testing.assert_array_equal(found, np.asarray([2048, 2052, -2048, -2052], np.float16))


@pytest.mark.parametrize(
    ("parts", "axis"),
    [([A, C], 0), ([A, B], 1), ([A, A.astype(np.float16)], 0), ([A, A[0]], 0)],
    ids=["widths differ", "heights differ", "types differ", "ranks differ"],
)
def test_weights_that_do_not_fit_are_not_joined(parts: list[np.ndarray], axis: int) -> None:
    with pytest.raises(ValueError, match=f"cannot join along axis {axis}: LazyWeight"):
        concatenated([lazy(part) for part in parts], axis, "c")
