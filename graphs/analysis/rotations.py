"""Orthogonal matrices that spread outliers over many channels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def hadamard(size: int) -> NDArray[np.float32]:
    """The Hadamard matrix of Sylvester's construction, scaled to be orthogonal: [size, size], symmetric.

    Raises:
        ValueError: `size` is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of Sylvester's kind is of a power of two, not of {size}")
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size), np.float32)


def rotation(size: int, seed: int = 0, *, keeps_mean: bool = False) -> NDArray[np.float32]:
    """A randomized Hadamard matrix R of any size: [size, size], orthogonal, computed in double precision.

    For size = 2^k * m with odd m it is diag(random signs) @ (Hadamard(2^k) kron Q(m)), Q a random orthogonal matrix.

    Args:
        size: Number of channels.
        seed: The same seed gives the same matrix.
        keeps_mean: Give R the further property 1 @ R = 1, by one reflection: the mean of x @ R is then the mean of x,
            and a norm that subtracts it commutes with R.

    Source: QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; SpinQuant, Liu et al. 2024, arXiv:2405.16406.
    """
    random = np.random.default_rng(seed)
    signs = random.choice([-1.0, 1.0], size)
    power = size & -size
    matrix = signs[:, None] * np.kron(hadamard(power).astype(np.float64), _orthogonal(size // power, random))
    if keeps_mean:
        ones = np.full(size, size**-0.5)
        mirror = ones @ matrix - ones
        length = mirror @ mirror
        if length > 0:  # 0 where the matrix keeps the mean as it is, as that of size 1 with sign +
            matrix -= np.outer(matrix @ mirror, 2 / length * mirror)
    return np.asarray(matrix, np.float32)


def _orthogonal(size: int, random: np.random.Generator) -> NDArray[np.float64]:
    """A random orthogonal matrix, uniform over all: the Q of a normal matrix, with the signs that make R's diagonal
    positive.

    Source: Mezzadri 2007, arXiv:math-ph/0609050.
    """
    q, r = np.linalg.qr(random.standard_normal((size, size)))
    found: NDArray[np.float64] = q * np.sign(np.diag(r))
    return found
