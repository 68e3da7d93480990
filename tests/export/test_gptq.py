"""round_with_feedback: the error of each rounding is made up for by the inputs that go with it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from satchel.export.quantize.gptq import COLUMNS, round_with_feedback
from satchel.graphs.quant.recipe import Scheme
from satchel.graphs.quant.rounding import Grid, fit_grid

OUTPUTS, INPUTS, TOKENS = 48, 192, 2000
WEIGHT = np.random.default_rng(1).standard_normal((OUTPUTS, INPUTS)).astype(np.float32)
SCHEMES = [Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(4, None), Scheme(8, 64)]


def correlated(seed: int = 2) -> NDArray[np.float32]:
    """Inputs [tokens, inputs] that lie near a space of 24 dimensions, some channels much larger than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((TOKENS, 24)) @ rng.standard_normal((24, INPUTS))
    mixed += 0.3 * rng.standard_normal((TOKENS, INPUTS))
    return (mixed * np.exp(rng.standard_normal(INPUTS))).astype(np.float32)


def moments(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x.T @ x


def error(grid: Grid, codes: NDArray[np.int16], x: NDArray[np.float32]) -> float:
    """The squared error of the layer's outputs, as a part of the outputs' own squares."""
    difference = x.astype(np.float64) @ (grid.values(codes) - WEIGHT).T
    return float(np.square(difference).sum() / np.square(x.astype(np.float64) @ WEIGHT.T).sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_correlated_inputs_are_rounded_with_a_fraction_of_the_error(scheme: Scheme) -> None:
    x, grid = correlated(), fit_grid(WEIGHT, scheme)
    codes = round_with_feedback(WEIGHT, moments(x), grid)
    assert error(grid, codes, x) < 0.25 * error(grid, grid.round(WEIGHT), x)


def test_it_holds_for_inputs_that_were_not_seen() -> None:
    grid = fit_grid(WEIGHT, Scheme(4, 32))
    seen = correlated()
    codes = round_with_feedback(WEIGHT, moments(seen[: TOKENS // 2]), grid)
    other = seen[TOKENS // 2 :]
    assert error(grid, codes, other) < 0.25 * error(grid, grid.round(WEIGHT), other)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest(scheme: Scheme) -> None:
    grid = fit_grid(WEIGHT, scheme)
    for second in (np.eye(INPUTS), np.diag(np.random.default_rng(3).uniform(0.1, 10, INPUTS))):
        codes = round_with_feedback(WEIGHT, second.astype(np.float32), grid)
        np.testing.assert_array_equal(codes, grid.round(WEIGHT))


def test_inputs_that_are_always_zero_get_the_code_of_zero() -> None:
    x = correlated()
    dead = [0, 7, COLUMNS, INPUTS - 1]
    x[:, dead] = 0
    for scheme in SCHEMES:
        grid = fit_grid(WEIGHT, scheme)
        codes = round_with_feedback(WEIGHT, moments(x), grid)
        np.testing.assert_array_equal(grid.values(codes)[:, dead], 0)
        assert error(grid, codes, x) < 0.25 * error(grid, grid.round(WEIGHT), x)


def test_fewer_tokens_than_inputs_still_do() -> None:
    x, grid = correlated()[:16], fit_grid(WEIGHT, Scheme(4, 32))
    codes = round_with_feedback(WEIGHT, moments(x), grid)
    assert error(grid, codes, x) < 0.25 * error(grid, grid.round(WEIGHT), x)


def test_all_inputs_dead_are_no_error() -> None:
    grid = fit_grid(WEIGHT, Scheme(4, 32))
    codes = round_with_feedback(WEIGHT, np.zeros((INPUTS, INPUTS), np.float32), grid)
    np.testing.assert_array_equal(codes, 0)
