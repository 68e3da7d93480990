"""Lazy products of weights give the numbers that numpy gives, and read each source once where all is asked for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import normal

from satchel.graphs.ir.weights import (
    LazyWeight,
    from_array,
    left_multiplied,
    mapped,
    right_multiplied,
    scaled,
    transposed,
)

A, CUBE, VECTOR = normal(1, 12, 8), normal(2, 3, 12, 8), normal(3, 12)
FOUR, EIGHT, TWELVE = normal(4, 4, 4), normal(5, 8, 8), normal(6, 12, 12)


def lazy(array: np.ndarray) -> LazyWeight:
    return from_array("w", array)


def blocks(matrix: np.ndarray, count: int) -> np.ndarray:
    return np.kron(np.eye(count, dtype=np.float32), matrix)


SPAN = np.concatenate([A[:, :2], A[:, 2:6] @ FOUR, A[:, 6:]], 1)
MADE = {
    "rows scaled": (scaled(lazy(A), lazy(VECTOR), "s"), VECTOR[:, None] * A),
    "last axis scaled": (scaled(lazy(A), lazy(VECTOR[:8]), "s", axis=-1), A * VECTOR[:8]),
    "vector scaled": (scaled(lazy(VECTOR), lazy(VECTOR), "s"), VECTOR * VECTOR),
    "last axis of three scaled": (scaled(lazy(CUBE), lazy(VECTOR[:8]), "s", axis=-1), CUBE * VECTOR[:8]),
    "first axis of three scaled": (scaled(lazy(CUBE), lazy(VECTOR[:3]), "s"), CUBE * VECTOR[:3, None, None]),
    "right": (right_multiplied(lazy(A), EIGHT, "r"), A @ EIGHT),
    "right in blocks": (right_multiplied(lazy(A), FOUR, "r"), A @ blocks(FOUR, 2)),
    "right over a part": (right_multiplied(lazy(A), FOUR, "r", (2, 6)), SPAN),
    "right of a vector": (right_multiplied(lazy(VECTOR), FOUR, "r", (4, 12)), VECTOR @ np.block(
        [[np.eye(4), np.zeros((4, 8))], [np.zeros((8, 4)), blocks(FOUR, 2)]])),
    "right of three axes": (right_multiplied(lazy(CUBE), EIGHT, "r"), CUBE @ EIGHT),
    "left": (left_multiplied(lazy(A), TWELVE, "l"), TWELVE @ A),
    "left in blocks": (left_multiplied(lazy(A), FOUR, "l"), blocks(FOUR, 3) @ A),
    "left of three axes": (left_multiplied(lazy(CUBE), TWELVE, "l"), TWELVE @ CUBE),
    "left of a transpose": (left_multiplied(transposed(lazy(A.T), "t"), TWELVE, "l"), TWELVE @ A),
    "left of right of scaled": (
        left_multiplied(right_multiplied(scaled(lazy(A), lazy(VECTOR), "s"), EIGHT, "r"), TWELVE, "l"),
        TWELVE @ (VECTOR[:, None] * A) @ EIGHT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_a_product_is_that_of_numpy(name: str) -> None:
    weight, array = MADE[name]
    assert (weight.dims, weight.dtype) == (array.shape, ir.DataType.FLOAT)
    found = weight.numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_parts_of_a_product_are_those_of_the_whole(name: str) -> None:
    weight, array = MADE[name]
    height = len(array)
    for start, stop in ((0, height), (0, 1), (1, height - 1), (height // 2, height), (height, height)):
        np.testing.assert_allclose(weight.rows(start, stop), array[start:stop], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(list(weight.blocks(64))), array, rtol=1e-4, atol=1e-5)
    if array.ndim == 2:
        for start, stop in ((0, 8), (1, 2), (3, 7), (8, 8)):
            np.testing.assert_allclose(weight.columns(start, stop), array[:, start:stop], rtol=1e-4, atol=1e-5)


def test_all_of_a_chain_of_products_is_one_read() -> None:
    read = list[tuple[int, int]]()

    def rows(start: int, stop: int) -> np.ndarray:
        read.append((start, stop))
        return A[start:stop]

    source = LazyWeight("w", A.shape, ir.DataType.FLOAT, rows)
    scaled_twice = scaled(scaled(source, lazy(VECTOR), "s"), lazy(VECTOR[:8]), "s", axis=-1)
    product = left_multiplied(left_multiplied(right_multiplied(scaled_twice, EIGHT, "r"), TWELVE, "l"), FOUR, "b")
    assert read == []
    product.numpy()
    assert read == [(0, 12)]


def test_rows_of_a_block_diagonal_product_read_their_blocks_only() -> None:
    read = list[tuple[int, int]]()

    def rows(start: int, stop: int) -> np.ndarray:
        read.append((start, stop))
        return A[start:stop]

    left_multiplied(LazyWeight("w", A.shape, ir.DataType.FLOAT, rows), FOUR, "l").rows(5, 6)
    assert read == [(4, 8)]


def test_what_no_checkpoint_holds_stays_marked() -> None:
    computed = from_array("w", A, computed=True)
    for made in (scaled(computed, lazy(VECTOR), "s"), right_multiplied(computed, EIGHT, "r")):
        assert made.computed
    assert not left_multiplied(mapped(lazy(A), np.negative, "m"), FOUR, "l").computed


def test_sizes_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="cannot scale axis 0"):
        scaled(lazy(A), lazy(VECTOR[:8]), "s")
    with pytest.raises(ValueError, match="cannot scale axis 1"):
        scaled(lazy(CUBE), lazy(VECTOR), "s", axis=1)
    with pytest.raises(ValueError, match="cannot multiply channels 0 to 8"):
        right_multiplied(lazy(A), TWELVE, "r")
    with pytest.raises(ValueError, match="cannot multiply channels 4 to 9"):
        right_multiplied(lazy(A), FOUR, "r", (4, 9))
    with pytest.raises(ValueError, match="from the left"):
        left_multiplied(lazy(A), EIGHT, "l")
