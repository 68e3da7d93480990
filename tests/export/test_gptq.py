"""Feedback: the error of each rounding is made up for by the inputs that go with it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from support.kernels import equal_in_all_sets, needs_kernels

from satchel.export.quantize.gptq import COLUMNS, DAMPING, Feedback
from satchel.export.quantize.scales import fit_grid
from satchel.graphs.quant.recipe import Scheme
from satchel.graphs.quant.rounding import Grid
from satchel.runtime.kernels.library import OFF, SWITCH

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
    codes = Feedback(moments(x)).round(WEIGHT, grid)
    assert error(grid, codes, x) < 0.25 * error(grid, grid.round(WEIGHT), x)


def test_it_holds_for_inputs_that_were_not_seen() -> None:
    grid = fit_grid(WEIGHT, Scheme(4, 32))
    seen = correlated()
    codes = Feedback(moments(seen[: TOKENS // 2])).round(WEIGHT, grid)
    other = seen[TOKENS // 2 :]
    assert error(grid, codes, other) < 0.25 * error(grid, grid.round(WEIGHT), other)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest(scheme: Scheme) -> None:
    grid = fit_grid(WEIGHT, scheme)
    for second in (np.eye(INPUTS), np.diag(np.random.default_rng(3).uniform(0.1, 10, INPUTS))):
        codes = Feedback(second.astype(np.float32)).round(WEIGHT, grid)
        np.testing.assert_array_equal(codes, grid.round(WEIGHT))


def test_inputs_that_are_always_zero_get_the_code_of_zero() -> None:
    x = correlated()
    dead = [0, 7, COLUMNS, INPUTS - 1]
    x[:, dead] = 0
    for scheme in SCHEMES:
        grid = fit_grid(WEIGHT, scheme)
        codes = Feedback(moments(x)).round(WEIGHT, grid)
        np.testing.assert_array_equal(grid.values(codes)[:, dead], 0)
        assert error(grid, codes, x) < 0.25 * error(grid, grid.round(WEIGHT), x)


def test_fewer_tokens_than_inputs_still_do() -> None:
    x, grid = correlated()[:16], fit_grid(WEIGHT, Scheme(4, 32))
    codes = Feedback(moments(x)).round(WEIGHT, grid)
    assert error(grid, codes, x) < 0.25 * error(grid, grid.round(WEIGHT), x)


def test_all_inputs_dead_are_no_error() -> None:
    grid = fit_grid(WEIGHT, Scheme(4, 32))
    codes = Feedback(np.zeros((INPUTS, INPUTS), np.float32)).round(WEIGHT, grid)
    np.testing.assert_array_equal(codes, 0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refinement_lowers_the_error_of_gptq(scheme: Scheme) -> None:
    x, grid = correlated(), fit_grid(WEIGHT, scheme)
    feedback = Feedback(moments(x))
    codes = feedback.round(WEIGHT, grid)
    before = error(grid, codes, x)
    once, twice = (error(*feedback.refine(WEIGHT, grid, codes, sweeps), x) for sweeps in (1, 2))
    assert twice < once < before
    assert twice < 0.97 * before


def test_refinement_holds_for_inputs_that_were_not_seen() -> None:
    grid, seen = fit_grid(WEIGHT, Scheme(4, 32)), correlated()
    feedback = Feedback(moments(seen[: TOKENS // 2]))
    codes = feedback.round(WEIGHT, grid)
    other = seen[TOKENS // 2 :]
    assert error(*feedback.refine(WEIGHT, grid, codes), other) < error(grid, codes, other)


def test_fitted_scales_are_those_of_least_squares() -> None:
    """One output, compared with a least-squares problem over the layer's outputs."""
    x, grid = correlated().astype(np.float64), fit_grid(WEIGHT[:1], Scheme(4, 64))
    codes = grid.round(WEIGHT[:1])
    groups = codes.reshape(3, 64).astype(np.float64)
    products = np.stack([x[:, 64 * g : 64 * g + 64] @ groups[g] for g in range(3)], 1)
    damped = np.sqrt(DAMPING * np.square(x).sum(0).mean())  # as further inputs, one for each
    extra = np.zeros((INPUTS, 3))
    for group in range(3):
        extra[64 * group : 64 * group + 64, group] = damped * groups[group]
    wanted = np.concatenate([x @ WEIGHT[0], damped * WEIGHT[0]])
    scales = np.linalg.lstsq(np.concatenate([products, extra]), wanted, rcond=None)[0]
    fitted, _ = Feedback(moments(x.astype(np.float32))).refine(WEIGHT[:1], grid, codes, 1)
    np.testing.assert_allclose(fitted.scales[0], scales, rtol=2e-3)


def test_without_sweeps_nothing_changes() -> None:
    grid, feedback = fit_grid(WEIGHT, Scheme(4, 32)), Feedback(moments(correlated()))
    codes = feedback.round(WEIGHT, grid)
    same, values = feedback.refine(WEIGHT, grid, codes, 0)
    assert same is grid
    np.testing.assert_array_equal(values, codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refined_values_stay_on_the_grid(scheme: Scheme) -> None:
    x = correlated()
    x[:, [0, 7, INPUTS - 1]] = 0
    weight = WEIGHT.copy()
    weight[3] = 0
    feedback, grid = Feedback(moments(x)), fit_grid(weight, scheme)
    refined, codes = feedback.refine(weight, grid, feedback.round(weight, grid))
    assert refined.low <= codes.min() and codes.max() <= refined.high
    assert np.isfinite(refined.scales).all() and (refined.scales != 0).all()
    np.testing.assert_array_equal(refined.values(codes)[:, [0, 7, INPUTS - 1]], 0)
    np.testing.assert_array_equal(refined.values(codes)[3], 0)


def test_its_importance_foretells_the_error_after_rounding() -> None:
    x = correlated()
    feedback, grid = Feedback(moments(x)), fit_grid(WEIGHT, Scheme(8, 32), search=False)
    left = grid.values(feedback.round(WEIGHT, grid)) - WEIGHT
    steps = np.repeat(grid.scales, 32, axis=1).astype(np.float64)
    foretold = (np.square(steps) / 12 * feedback.importance).sum()  # a rounding error is uniform within a step
    assert feedback.error(left) == pytest.approx(foretold, rel=0.05)
    damped = moments(x.astype(np.float64))
    damped += DAMPING * damped.diagonal().mean() * np.eye(INPUTS)
    assert feedback.error(left) == pytest.approx(float(np.einsum("oi,ij,oj", left, damped, left)), rel=1e-3)


@needs_kernels
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compiled_loops_round_as_torch_does(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, feedback = fit_grid(WEIGHT, scheme), Feedback(moments(correlated()))

    def found() -> list[np.ndarray]:
        codes = feedback.round(WEIGHT, grid)
        refined, values = feedback.refine(WEIGHT, grid, codes)
        return [codes, refined.scales, values]

    equal_in_all_sets(found)
    compiled = found()
    monkeypatch.setenv(SWITCH, OFF)
    for ours, torchs in zip(compiled, found(), strict=True):
        np.testing.assert_array_equal(ours, torchs)
