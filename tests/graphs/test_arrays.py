"""Work on large arrays in pieces gives what numpy gives at once."""

from __future__ import annotations

import numpy as np
import pytest

from satchel.graphs.ir.arrays import PIECE, rows_times, times_blocks, transposed


@pytest.mark.parametrize("count", [3, PIECE, PIECE + 1, 2 * PIECE + 5])
def test_products_in_pieces_are_products(count: int) -> None:
    random = np.random.default_rng(count)
    rows, matrix = random.standard_normal((count, 48)), random.standard_normal((48, 48))
    np.testing.assert_allclose(rows_times(rows, matrix), rows @ matrix, rtol=1e-12, atol=1e-12)
    blocks = random.standard_normal((2, 48, count))
    np.testing.assert_allclose(times_blocks(matrix, blocks), matrix @ blocks, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (64, 3), (130, 70)])
def test_a_matrix_is_transposed(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = transposed(matrix)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, matrix.T)
