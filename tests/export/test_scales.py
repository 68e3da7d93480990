"""Grids for 4 and 8 bits: nearest codes, and scales as good as those that trying everything finds."""

from __future__ import annotations

import numpy as np
import pytest
from support.graphs import normal
from support.kernels import equal_in_all_sets, needs_kernels

from satchel.export.quantize.scales import fit_grid
from satchel.graphs.quant.recipe import Scheme
from satchel.graphs.quant.rounding import Grid
from satchel.runtime.kernels.library import OFF, SWITCH

EVERY = [Scheme(bits, block, symmetric) for bits in (4, 8) for block in (16, 32, None) for symmetric in (True, False)]
WEIGHT = normal(1, 6, 64) * np.exp(normal(2, 6, 1))
WEIGHT[0, 5], WEIGHT[1, 40] = 9, -30


def name(scheme: Scheme) -> str:
    return f"{scheme.bits} bits, {scheme.block or 'channel'}, {'symmetric' if scheme.symmetric else 'zero points'}"


def errors(grid: Grid, weight: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The squared error of each block, [outputs, blocks], in float64."""
    error = np.square(grid.values(grid.round(weight)).astype(np.float64) - weight)
    if importance is not None:
        error *= importance
    return error.reshape(*grid.scales.shape, -1).sum(-1)


def by_trying(block: np.ndarray, scheme: Scheme) -> float:
    """The least squared error of one block over a fine range of scales of both signs, and over all zero points."""
    steps = (1 << scheme.bits) - 1
    low = -(steps + 1) // 2 if scheme.symmetric else 0
    span = 2 * np.abs(block).max() / steps
    sizes = np.linspace(0.3, 1.3, 400) * span
    scales = np.concatenate([sizes, -sizes])[:, None, None]
    zeros = np.zeros(1) if scheme.symmetric else np.arange(steps + 1)
    zeros = zeros[None, :, None]
    codes = np.clip(np.rint(block / scales) + zeros, low, low + steps)
    return float(np.square((codes - zeros) * scales - block).sum(-1).min())


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("scheme", EVERY, ids=name)
def test_each_code_is_the_nearest(scheme: Scheme, search: bool) -> None:
    grid = fit_grid(WEIGHT, scheme, search=search)
    codes = grid.round(WEIGHT)
    assert grid.low <= codes.min() and codes.max() <= grid.high
    found = np.abs(grid.values(codes) - WEIGHT)
    for code in range(grid.low, grid.high + 1):
        other = np.abs(grid.values(np.full_like(codes, code)) - WEIGHT)
        assert (found <= other + 1e-5).all()


@pytest.mark.parametrize("scheme", EVERY, ids=name)
def test_the_search_never_loses_to_the_plain_scale(scheme: Scheme) -> None:
    for importance in (None, np.random.default_rng(3).uniform(0.01, 5, 64).astype(np.float32)):
        searched = errors(fit_grid(WEIGHT, scheme, importance), WEIGHT, importance)
        plain = errors(fit_grid(WEIGHT, scheme, importance, search=False), WEIGHT, importance)
        assert (searched <= plain * (1 + 1e-5)).all()
        assert searched.sum() < 0.995 * plain.sum()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
def test_four_bits_come_near_to_what_trying_everything_finds(symmetric: bool) -> None:
    scheme = Scheme(4, 16, symmetric)
    weight = normal(5, 20, 16) + (0 if symmetric else normal(6, 20, 1))
    least = np.asarray([by_trying(row.astype(np.float64), scheme) for row in weight])
    found, plain = (errors(fit_grid(weight, scheme, search=search), weight)[:, 0] for search in (True, False))
    assert found.sum() < 1.1 * least.sum()
    assert plain.sum() > 1.2 * least.sum(), "the plain scale would pass this test, too"


def test_eight_bits_come_near_to_what_trying_everything_finds() -> None:
    scheme, weight = Scheme(8, 16), normal(7, 20, 16)
    least = sum(by_trying(row.astype(np.float64), scheme) for row in weight)
    found, plain = (errors(fit_grid(weight, scheme, search=search), weight).sum() for search in (True, False))
    assert found < 1.2 * least
    assert plain > 1.4 * least, "the plain scale would pass this test, too"


def test_the_largest_weight_of_four_bits_may_take_the_longer_side() -> None:
    weight = np.asarray([[8, 1, 2, 3, -4, 5, -6, 7] * 2, [-8, 1, 2, 3, -4, 5, -6, 7] * 2], np.float32)
    grid = fit_grid(weight, Scheme(4, 16))
    np.testing.assert_allclose(grid.scales[:, 0], [-1, 1], rtol=1e-6)
    np.testing.assert_allclose(grid.values(grid.round(weight)), weight, rtol=1e-6)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("scheme", EVERY, ids=name)
def test_zeros_stay_zeros(scheme: Scheme, search: bool) -> None:
    weight = WEIGHT.copy()
    weight[2], weight[3, :32], weight[4, ::3] = 0, 0, 0
    grid = fit_grid(weight, scheme, search=search)
    assert np.isfinite(grid.scales).all() and (grid.scales != 0).all()
    np.testing.assert_array_equal(grid.values(grid.round(weight))[weight == 0], 0)


@pytest.mark.parametrize("shift", [-20, 20])
def test_zero_points_serve_blocks_of_one_sign(shift: int) -> None:
    weight = normal(8, 4, 32) + shift
    grid = fit_grid(weight, Scheme(8, 32, symmetric=False))
    assert grid.zero_points is not None
    assert set(grid.zero_points.reshape(-1)) == {0 if shift > 0 else 255}
    assert np.abs(grid.values(grid.round(weight)) - weight).max() < 0.1


@pytest.mark.parametrize("scheme", EVERY, ids=name)
def test_scales_of_groups_are_stored_in_float16_as_they_are(scheme: Scheme) -> None:
    weight = WEIGHT.copy()
    weight[2], weight[3, :32], weight[4] = 0, 0, weight[4] * 1e-7
    for search in (True, False):
        grid = fit_grid(weight, scheme, search=search)
        assert grid.half_scales.dtype == (np.float32 if scheme.block is None else np.float16)
        np.testing.assert_array_equal(grid.half_scales, grid.scales)


@pytest.mark.parametrize("factor", [1e-8, 1e7])
def test_scales_that_float16_does_not_hold_stay_float32(factor: float) -> None:
    weight = np.float32(factor) * normal(1, 6, 64)
    grid = fit_grid(weight, Scheme(4, 32))
    assert grid.half_scales.dtype == np.float32
    assert errors(grid, weight).sum() < 0.01 * np.square(weight.astype(np.float64)).sum()


def test_more_important_inputs_lose_less() -> None:
    scheme, importance = Scheme(4, 32), np.ones(64, np.float32)
    importance[10] = 1000
    weight = normal(9, 20, 64)
    plain, weighed = (fit_grid(weight, scheme, counts) for counts in (None, importance))
    lost = [np.square(grid.values(grid.round(weight)) - weight)[:, 10].sum() for grid in (plain, weighed)]
    assert lost[1] < lost[0] / 4
    np.testing.assert_array_equal(weighed.scales[:, 1], plain.scales[:, 1])  # no input of the second block


@needs_kernels
@pytest.mark.parametrize("scheme", [*EVERY, Scheme(4, 128), Scheme(8, 64, symmetric=False)], ids=name)
def test_compiled_loops_find_the_scales_of_numpy(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(11, 7, 640) * np.exp(normal(12, 7, 1))  # an odd number of groups, and more than numpy sums at once
    weight[2], weight[3, :128], weight[4, 7] = 0, 0, 1e12
    counts = np.random.default_rng(13).uniform(0, 5, 640).astype(np.float32)

    def found() -> list[np.ndarray]:
        grids = [fit_grid(weight, scheme, importance) for importance in (None, counts)]
        return [array for grid in grids for array in (grid.scales, grid.zero_points) if array is not None]

    equal_in_all_sets(found)
    compiled = found()
    monkeypatch.setenv(SWITCH, OFF)
    for ours, numpys in zip(compiled, found(), strict=True):
        np.testing.assert_array_equal(ours, numpys)
