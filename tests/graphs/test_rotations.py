"""rotations: matrices that keep lengths, spread a single channel, and are the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from satchel.graphs.analysis.rotations import hadamard, rotation


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_a_hadamard_matrix_is_orthogonal_and_has_entries_of_one_size(size: int) -> None:
    matrix = hadamard(size)
    assert (matrix.shape, matrix.dtype) == ((size, size), np.float32)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)


@pytest.mark.parametrize("size", [0, -4, 3, 12])
def test_no_hadamard_matrix_of_another_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"of a power of two, not of {size}"):
        hadamard(size)


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 48, 64, 144])
def test_a_rotation_is_orthogonal(size: int, keeps_mean: bool) -> None:
    matrix = rotation(size, keeps_mean=keeps_mean)
    assert (matrix.shape, matrix.dtype) == ((size, size), np.float32)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 7, 48, 144])
def test_a_rotation_can_keep_the_mean(size: int) -> None:
    np.testing.assert_allclose(rotation(size, keeps_mean=True).sum(0), np.ones(size), atol=1e-5)


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_one_channel_is_spread_over_all(keeps_mean: bool) -> None:
    assert np.abs(rotation(576, keeps_mean=keeps_mean)).max() < 0.2  # 24 ** -1 is the least; 9 channels mix at random


def test_a_power_of_two_is_signs_times_hadamard() -> None:
    matrix = rotation(32)
    signs = matrix[:, 0] * np.float32(32**0.5)
    np.testing.assert_allclose(np.abs(signs), 1, rtol=1e-6)
    assert 0 < (signs < 0).sum() < 32
    np.testing.assert_allclose(matrix, signs[:, None] * hadamard(32) * np.sign(matrix[0, 0] * signs[0]), atol=1e-6)
