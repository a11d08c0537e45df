"""Hessians that follow the samples that bend them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.heads.solvers import path
from pipeline.heads.solvers.active import ActiveSets
from pipeline.heads.solvers.linear import fit_svm

PENALTY = torch.tensor([0.5, 2.0], dtype=torch.float64)


@pytest.fixture
def values() -> torch.Tensor:
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 7)))
    rows[:, -1] = 1
    return rows


def hessian(values: torch.Tensor, curvature: torch.Tensor, penalty: float) -> torch.Tensor:
    full = (values * curvature[:, None]).T @ values
    full.diagonal()[:-1] += penalty
    return full


@pytest.mark.parametrize("n_active", [40, 30, 12, 5, 25])
def test_what_is_solved_is_the_hessian_of_the_samples_that_bend_now(values, n_active):
    sets = ActiveSets.of(values, 2, curvature=2.0)
    residual = torch.arange(14, dtype=torch.float64).reshape(2, 1, 7)
    for n in (37, n_active):  # a step on the way there
        curvature = torch.zeros(40, 2, dtype=torch.float64)
        curvature[:n, 0], curvature[-n:, 1] = 2.0, 1.0
        inverse = sets.at(curvature, PENALTY)

    solved = inverse.solve(residual)

    assert inverse.fresh.all()
    for i in range(2):
        expected = torch.linalg.solve(
            hessian(values, curvature[:, i], float(PENALTY[i])), residual[i, 0]
        )
        torch.testing.assert_close(solved[i, 0], expected)


def test_a_factor_is_kept_where_nothing_changed(values):
    sets = ActiveSets.of(values, 2, curvature=2.0)
    curvature = torch.full((40, 2), 2.0, dtype=torch.float64)
    sets.at(curvature, PENALTY)

    again = sets.at(curvature, PENALTY)
    stronger = sets.at(curvature, 3 * PENALTY)

    assert not again.fresh.any()
    assert stronger.fresh.all()


def test_a_penalty_below_the_rounding_of_float32_is_not_lost(values):
    one = values[:, :3].float()
    repeated = torch.cat([one, one * 1e4, torch.ones(40, 1)], dim=1)  # half of it is no news
    sets = ActiveSets.of(repeated, 1, curvature=1.0)
    curvature = torch.ones(40, 1)
    curvature[:30] = 0
    wanted = torch.ones(1, 1, 7)

    solved = sets.at(curvature, torch.tensor([1e-3])).solve(wanted)

    exact = hessian(repeated.double(), curvature[:, 0].double(), 1e-3)
    expected = torch.linalg.solve(exact, wanted[0, 0].double())
    torch.testing.assert_close(solved[0, 0].double(), expected, rtol=0.02, atol=10)


def test_what_has_no_factor_is_told(values):
    sets = ActiveSets.of(values, 1, curvature=2.0)

    with pytest.raises(ArithmeticError, match="features or the sample weights are too large"):
        sets.at(torch.full((40, 1), torch.inf, dtype=torch.float64), PENALTY[:1])


def test_lanes_that_do_not_fit_at_once_are_solved_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    X = rng.standard_normal((90, 8)) + y[:, None]
    folds = np.arange(90) % 4 != np.arange(4)[:, None]
    grid = [0.01, 0.1, 1.0]
    whole = fit_svm(X, y, grid, sample_weight=folds, tol=1e-9)
    monkeypatch.setitem(path._FACTOR_BYTES, "cpu", 3000)

    parts = fit_svm(X, y, grid, sample_weight=folds, tol=1e-9)

    np.testing.assert_allclose(parts.objective, whole.objective, rtol=1e-7)
    np.testing.assert_allclose(parts.coef, whole.coef, atol=1e-4)
    np.testing.assert_array_equal(parts.converged, True)
