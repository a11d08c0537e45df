"""Sparse logistic regression ends at the optimum of scikit-learn's saga."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from pipeline.heads.solvers.linear import fit_logistic
from pipeline.heads.solvers.proximal import fit_sparse_logistic
from pipeline.heads.threads import one_thread_each

GRID = np.array([0.01, 0.1, 1.0, 10.0])


@pytest.fixture(autouse=True)
def _one_thread():
    """Thread pools that wait for work hold each other up on problems as small as these."""
    with one_thread_each():
        yield


def blobs(n_samples, n_features, n_classes, dtype=np.float64):
    rng = np.random.default_rng(0)
    y = np.arange(n_samples) % n_classes
    centers = rng.normal(size=(n_classes, n_features)) * (np.arange(n_features) < 5)
    X = centers[y] + 1.5 * rng.normal(size=(n_samples, n_features))
    return (X - X.mean(0)).astype(dtype) + 1, y


def objective(X, y, C, coef, intercept, l1_ratio, weights=1.0):
    scores = X.astype(float) @ coef.T + intercept
    if scores.shape[1] == 1:
        scores = np.hstack([np.zeros_like(scores), scores])
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(y)), y]
    penalty = l1_ratio * np.abs(coef).sum() + (1 - l1_ratio) / 2 * np.square(coef).sum()
    return C * np.sum(weights * losses) + penalty


@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.parametrize(("n_samples", "n_features", "n_classes"), [(120, 12, 3), (60, 70, 2)])
def test_it_finds_the_optimum_of_saga(l1_ratio, n_samples, n_features, n_classes):
    X, y = blobs(n_samples, n_features, n_classes)

    grid, centred = [0.1, 0.3, 1.0], X - X.mean(axis=0)
    found = fit_sparse_logistic(X, y, grid, l1_ratio=l1_ratio, tol=1e-6)

    assert found.converged.all()
    for i, C in enumerate(grid):
        theirs = LogisticRegression(
            C=C, l1_ratio=l1_ratio, solver="saga", tol=1e-7, max_iter=3000, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs.fit(centred, y)  # where saga is fast; intercepts are free, the optimum stays
        best = objective(centred, y, C, theirs.coef_, theirs.intercept_, l1_ratio)
        own = objective(X, y, C, found.coef[0, i], found.intercept[0, i], l1_ratio)
        assert own <= best * (1 + 1e-5)
        assert own == pytest.approx(best, rel=1e-4)
        assert found.objective[0, i] == pytest.approx(own, rel=1e-9)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.3])
def test_the_gap_bounds_what_is_left(n_classes, l1_ratio):
    X, y = blobs(100, 10, n_classes)
    best = fit_sparse_logistic(X, y, GRID, l1_ratio=l1_ratio, tol=1e-10, max_iter=20_000)

    for max_iter in (10, 30, 100):
        rough = fit_sparse_logistic(X, y, GRID, l1_ratio=l1_ratio, tol=1e-12, max_iter=max_iter)
        left = 1 - best.objective / rough.objective
        assert (left <= rough.gap + 1e-9).all()
        assert (rough.n_iter <= max_iter).all()
        assert (rough.gap > 0).any()


def test_without_l1_it_is_the_other_solver():
    X, y = blobs(80, 10, 3)

    sparse = fit_sparse_logistic(X, y, GRID, l1_ratio=0.0, tol=1e-8)
    newton = fit_logistic(X, y, GRID, tol=1e-8)

    np.testing.assert_allclose(sparse.objective, newton.objective, rtol=1e-7)
    np.testing.assert_allclose(sparse.coef, newton.coef, atol=1e-2)


def test_a_strong_penalty_leaves_the_class_shares_alone():
    X, y = blobs(60, 8, 3)
    y = np.where(np.arange(60) < 10, 0, y)

    found = fit_sparse_logistic(X, y, [1e-4], tol=1e-10)

    assert (found.coef == 0).all()
    odds = np.exp(found.intercept[0, 0])
    np.testing.assert_allclose(odds / odds.sum(), np.bincount(y) / 60, rtol=1e-3)


def test_features_without_a_part_in_it_get_exact_zeros():
    X, y = blobs(200, 30, 3)

    found = fit_sparse_logistic(X, y, [0.02, 0.05])

    assert (found.coef[0, :, :, :5] != 0).any(axis=(1, 2)).all()
    assert (found.coef[0, :, :, 5:] == 0).mean() > 0.8


@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_fold_of_zero_weights_is_the_fit_of_the_rest(n_classes):
    X, y = blobs(90, 8, n_classes)
    folds = np.arange(90) % 7 != np.arange(3)[:, None]

    together = fit_sparse_logistic(X, y, GRID, sample_weight=folds, tol=1e-8)

    for i, fold in enumerate(folds):
        alone = fit_sparse_logistic(X[fold], y[fold], GRID, tol=1e-8)
        np.testing.assert_allclose(together.objective[i], alone.objective[0], rtol=1e-7)


def test_a_weight_of_two_is_a_sample_twice():
    X, y = blobs(50, 6, 3)
    twice = np.r_[np.arange(50), np.arange(0, 50, 2)]
    weights = np.where(np.arange(50) % 2, 1.0, 2.0)

    weighted = fit_sparse_logistic(X, y, GRID, sample_weight=weights, tol=1e-9)
    repeated = fit_sparse_logistic(X[twice], y[twice], GRID, tol=1e-9)

    np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-8)


def test_the_order_of_penalties_does_not_matter():
    X, y = blobs(60, 6, 3)
    grid = np.array([10.0, 0.1, 1.0, 1.0])

    shuffled = fit_sparse_logistic(X, y, grid)
    ordered = fit_sparse_logistic(X, y, np.sort(grid))

    np.testing.assert_array_equal(shuffled.coef[:, np.argsort(grid)], ordered.coef)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_float32_and_another_unit_of_all_features(scale):
    X, y = blobs(150, 10, 3, dtype=np.float32)

    single = fit_sparse_logistic(X * np.float32(scale), y, GRID / scale)
    double = fit_sparse_logistic(X.astype(float) * scale, y, GRID / scale, tol=1e-8)

    assert single.coef.dtype == np.float32
    assert single.converged.all()
    np.testing.assert_allclose(single.objective, double.objective, rtol=1.1e-4)


def test_constant_features_get_nothing():
    X, y = blobs(40, 4, 3)
    more = np.hstack([X, np.full((40, 2), 7.0)])

    plain = fit_sparse_logistic(X, y, GRID, tol=1e-9)
    wide = fit_sparse_logistic(more, y, GRID, tol=1e-9)
    blank = fit_sparse_logistic(more[:, 4:], y, [1.0])

    np.testing.assert_allclose(wide.objective, plain.objective, rtol=1e-8)
    assert (wide.coef[..., 4:] == 0).all()
    assert (blank.coef == 0).all()
    assert blank.converged.all()


def test_too_few_steps_are_said():
    X, y = blobs(60, 10, 3)

    found = fit_sparse_logistic(X, y, [10.0], max_iter=5)

    assert not found.converged.any()
    assert (found.n_iter == 5).all()


def test_what_cannot_be_fitted_is_said():
    X, y = blobs(20, 4, 2)
    holes = X.copy()
    holes[3, 1] = np.inf

    with pytest.raises(ValueError, match="samples of 1 class, expected at least 2"):
        fit_sparse_logistic(X, np.zeros(20, dtype=int), [1.0])
    with pytest.raises(ValueError, match="NaN or infinity in 1 places"):
        fit_sparse_logistic(holes, y, [1.0])
    with pytest.raises(ValueError, match=r"C is 0.0, expected a number above 0"):
        fit_sparse_logistic(X, y, [0.0])
    with pytest.raises(ValueError, match=r"l1_ratio is 2.0, expected a number from 0 to 1"):
        fit_sparse_logistic(X, y, [1.0], l1_ratio=2.0)
    with pytest.raises(ValueError, match=r"expected \(20,\) or \(n_folds, 20\)"):
        fit_sparse_logistic(X, y, [1.0], sample_weight=np.ones(19))
