"""Work on large arrays, with the same bits for any number of processors.

Each product of matrices is cut into pieces of a fixed size, of one thread each: a library that cuts a product into as
many parts as there are threads may round otherwise with each number, and its threads wait for each other by computing.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PIECE = 1024
"""Rows or columns of a piece."""

LINES = 64
"""Rows that are transposed at a time."""


@functools.cache
def workers() -> ThreadPoolExecutor:
    """Threads for work outside of the interpreter's lock, which waits for no other work of theirs."""
    return ThreadPoolExecutor(os.cpu_count(), "arrays")


def transposed(matrix: np.ndarray) -> np.ndarray:
    """The transposed matrix as an array of its own. All rows at once take up to twice as long."""
    rows, columns = matrix.shape
    result = np.empty((columns, rows), matrix.dtype)
    for start in range(0, rows, LINES):
        result[:, start : start + LINES] = matrix[start : start + LINES].T
    return result


def rows_times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`rows @ matrix`, [rows, inner] by [inner, columns]."""
    if len(rows) <= PIECE:
        return np.asarray(rows @ matrix)
    product = np.empty((len(rows), matrix.shape[1]), np.result_type(rows, matrix))

    def multiply(start: int) -> None:
        np.matmul(rows[start : start + PIECE], matrix, out=product[start : start + PIECE])

    list(workers().map(multiply, range(0, len(rows), PIECE)))
    return product


def times_blocks(matrix: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """`matrix @ block` for each of the blocks, [blocks, inner, columns]."""
    count, _, columns = blocks.shape
    product = np.empty((count, len(matrix), columns), np.result_type(matrix, blocks))

    def multiply(piece: tuple[int, int]) -> None:
        block, part = piece[0], slice(piece[1], piece[1] + PIECE)
        np.matmul(matrix, blocks[block, :, part], out=product[block, :, part])

    list(workers().map(multiply, ((block, start) for block in range(count) for start in range(0, columns, PIECE))))
    return product
