"""The batched solvers find what scikit-learn finds, at every penalty and in every fold."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.svm import LinearSVC

from pipeline.heads.solvers.design import make_design
from pipeline.heads.solvers.linear import fit_logistic, fit_svm
from pipeline.heads.solvers.ridge import fit_ridge, fit_ridge_folds
from pipeline.heads.threads import one_thread_each

GRID = np.logspace(-3, 2, 6)
UNEVEN_OPTIMUM = 39.8162  # of the module's uneven digits at C = 100, in float64 with tol=1e-10


@pytest.fixture(autouse=True)
def _one_thread():
    """Thread pools that wait for work hold each other up on problems as small as these."""
    with one_thread_each():
        yield


def blobs(n_samples, n_features, n_classes, seed=0, dtype=np.float64):
    """Overlapping classes, with features of a falling spectrum."""
    rng = np.random.default_rng(seed)
    y = np.arange(n_samples) % n_classes
    centers = rng.normal(size=(n_classes, n_features))
    X = 0.7 * centers[y] + rng.normal(size=(n_samples, n_features))
    X = X / (1 + np.arange(n_features)) ** 0.5 + 3
    return X.astype(dtype), y


def logistic_objective(X, y, C, coef, intercept, weights=None):
    scores = X.astype(float) @ coef.T + intercept
    if scores.shape[1] == 1:
        scores = np.hstack([np.zeros_like(scores), scores])
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(y)), y]
    return C * np.sum(losses if weights is None else weights * losses) + 0.5 * np.sum(coef**2)


def hinge_objective(X, signs, C, coef, intercept):
    margin = np.maximum(0, 1 - signs * (X.astype(float) @ coef + intercept))
    return C * np.sum(margin**2) + 0.5 * np.sum(coef**2)


SHAPES = [(200, 10, 3), (40, 90, 3), (120, 15, 2), (30, 50, 2), (150, 30, 50)]


@pytest.mark.parametrize(("n_samples", "n_features", "n_classes"), SHAPES)
def test_logistic_finds_the_optimum_of_scikit_learn(n_samples, n_features, n_classes):
    X, y = blobs(n_samples, n_features, n_classes)

    found = fit_logistic(X, y, GRID, tol=1e-9)

    assert found.converged.all()
    for i, C in enumerate(GRID):
        theirs = LogisticRegression(C=C, tol=1e-9, max_iter=20_000).fit(X, y)
        best = logistic_objective(X, y, C, theirs.coef_, theirs.intercept_)
        assert found.objective[0, i] == pytest.approx(best, rel=1e-6)
        np.testing.assert_allclose(found.coef[0, i], theirs.coef_, atol=2e-3 * C**0.5)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_objective_is_that_of_the_coefficients(n_classes):
    X, y = blobs(80, 12, n_classes, dtype=np.float32)
    weights = np.random.default_rng(1).uniform(0, 2, len(y))

    found = fit_logistic(X, y, GRID, sample_weight=weights)

    for i, C in enumerate(GRID):
        own = logistic_objective(X, y, C, found.coef[0, i], found.intercept[0, i], weights)
        assert found.objective[0, i] == pytest.approx(own, rel=1e-5)


def test_float32_reaches_the_optimum_of_float64():
    X, y = blobs(300, 40, 5, dtype=np.float32)
    grid = np.logspace(-5, 5, 21)

    single = fit_logistic(X, y, grid)
    double = fit_logistic(X.astype(float), y, grid, tol=1e-10)

    assert single.converged.all()
    np.testing.assert_allclose(single.objective, double.objective, rtol=1e-4)


@pytest.mark.parametrize("fit", [fit_logistic, fit_svm])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_fold_of_zero_weights_is_the_fit_of_the_rest(fit, n_classes):
    X, y = blobs(90, 8, n_classes)
    folds = np.arange(len(y)) % 7 != np.arange(3)[:, None]

    together = fit(X, y, GRID, sample_weight=folds, tol=1e-10)

    for i, fold in enumerate(folds):
        alone = fit(X[fold], y[fold], GRID, tol=1e-10)
        np.testing.assert_allclose(together.objective[i], alone.objective[0], rtol=1e-8)
        np.testing.assert_allclose(together.coef[i], alone.coef[0], atol=1e-3)


@pytest.mark.parametrize("fit", [fit_logistic, fit_svm])
def test_folds_that_start_from_the_whole_end_where_others_do(fit):
    X, y = blobs(120, 10, 3)
    folds = np.arange(len(y)) % 5 != np.arange(5)[:, None]
    grid = np.logspace(-3, 2, 12)
    design = make_design(X)
    whole = fit(design, y, grid, tol=1e-9)
    warm = fit(design, y, grid, sample_weight=folds, start=whole, tol=1e-9)
    cold = fit(design, y, grid, sample_weight=folds, tol=1e-9)

    assert warm.converged.all()
    np.testing.assert_allclose(warm.objective, cold.objective, rtol=1e-7)


def test_a_class_that_a_fold_lacks_gets_no_probability_there():
    X, y = blobs(60, 5, 3)

    found = fit_logistic(X, y, [1.0], sample_weight=(y != 2).astype(float))

    scores = X @ found.coef[0, 0].T + found.intercept[0, 0]
    assert (scores.argmax(axis=1) != 2).all()


def test_a_weight_of_two_is_a_sample_twice():
    X, y = blobs(50, 6, 3)
    twice = np.r_[np.arange(50), np.arange(0, 50, 2)]
    weights = np.where(np.arange(50) % 2, 1.0, 2.0)

    weighted = fit_logistic(X, y, GRID, sample_weight=weights, tol=1e-10)
    repeated = fit_logistic(X[twice], y[twice], GRID, tol=1e-10)

    np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-9)


def test_the_order_of_penalties_does_not_matter():
    X, y = blobs(60, 6, 3)
    grid = np.array([10.0, 1e-3, 1.0, 1.0, 1e2, 0.1])

    shuffled = fit_logistic(X, y, grid)
    ordered = fit_logistic(X, y, np.sort(grid))

    np.testing.assert_array_equal(shuffled.coef[:, np.argsort(grid)], ordered.coef)


@pytest.mark.parametrize("fit", [fit_logistic, fit_svm])
def test_the_same_call_gives_the_same_bits(fit):
    X, y = blobs(100, 20, 4, dtype=np.float32)

    np.testing.assert_array_equal(fit(X, y, GRID).coef, fit(X, y, GRID).coef)


def test_separable_classes_with_hardly_a_penalty_come_to_an_end():
    X, y = blobs(60, 100, 3, dtype=np.float32)

    found = fit_logistic(X, y, [1e2, 1e5, 1e8])

    assert np.isfinite(found.coef).all()
    assert (np.diff(found.objective[0] / found.C) < 0).all()
    assert (found.converged == (found.gap <= 1e-4)).all()


def test_too_few_steps_are_said():
    X, y = blobs(60, 10, 3)

    assert not fit_logistic(X, y, [1e3], max_iter=1, tol=1e-8).converged.any()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_one_feature_of_another_scale(scale):
    X, y = blobs(80, 5, 3)
    X[:, 2] *= scale

    found = fit_logistic(X, y, [1e-3, 1.0, 1e3], tol=1e-9)

    assert found.converged.all()
    for i, C in enumerate(found.C):
        # The same problem in a feature of scale 1, whose penalty is scaled instead.
        best = minimize(
            lambda w, C=C: scaled_objective(X, y, C, w.reshape(3, 6), scale),
            np.zeros(18),
            method="L-BFGS-B",
            options={"maxiter": 20_000, "maxfun": 10**6, "ftol": 1e-15, "gtol": 1e-8},
        ).fun
        assert found.objective[0, i] <= best * (1 + 1e-5)


def scaled_objective(X, y, C, params, scale):
    unit = np.where(np.arange(5) == 2, scale, 1.0)
    return logistic_objective(X, y, C, params[:, :5] / unit, params[:, 5])


@pytest.fixture(scope="module")
def uneven():
    """Digits whose columns differ by five orders of magnitude."""
    X, y = load_digits(return_X_y=True)
    return X[:400] * np.logspace(-3, 2, X.shape[1]), y[:400]


@pytest.mark.parametrize(
    ("dtype", "tol"), [(np.float64, 1e-4), (np.float32, 1e-4), (np.float32, 1e-6)]
)
def test_what_has_converged_on_uneven_features_is_near_the_optimum(uneven, dtype, tol):
    X, y = uneven

    found = fit_logistic(X.astype(dtype), y, [100.0], tol=tol)

    assert found.converged.all()
    assert found.objective[0, 0] <= UNEVEN_OPTIMUM * (1 + 2 * tol)


def test_a_path_on_uneven_features_is_near_the_optimum(uneven):
    X, y = uneven

    found = fit_logistic(X, y, np.logspace(-4, 2, 13))

    assert found.converged.all()
    assert found.objective[0, -1] <= UNEVEN_OPTIMUM * (1 + 5e-4)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(30, 60), (25, 40), (300, 40)])
def test_an_svm_that_has_converged_is_near_the_optimum(shape, dtype, n_classes):
    X, y = blobs(*shape, n_classes)

    found = fit_svm(X.astype(dtype), y, [100.0])
    best = fit_svm(X, y, [100.0], tol=1e-9).objective

    assert found.converged.all()
    assert (found.objective <= best * (1 + 1e-4)).all()


@pytest.mark.parametrize("C", [10.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(60, 300), (300, 20)])
def test_an_svm_of_weak_penalty_in_float32_is_at_the_optimum_that_it_claims(shape, C):
    X = np.random.default_rng(0).normal(size=shape)
    y = np.arange(shape[0]) % 3
    X[:, 0] += 6 * y

    found = fit_svm(X.astype(np.float32), y, [C])
    best = fit_svm(X, y, [C], tol=1e-9).objective

    assert found.converged.all()
    assert (found.objective <= best * (1 + 1e-4)).all()


def test_constant_features_and_repeated_rows_change_nothing():
    X, y = blobs(40, 4, 3)
    more = np.hstack([X, np.full((40, 2), 7.0)])

    plain = fit_logistic(X, y, GRID, tol=1e-10)
    wide = fit_logistic(more, y, GRID, tol=1e-10)
    tall = fit_logistic(np.tile(more, (2, 1)), np.tile(y, 2), GRID / 2, tol=1e-10)

    np.testing.assert_allclose(wide.coef[..., :4], plain.coef, atol=1e-4)
    np.testing.assert_allclose(wide.coef[..., 4:], 0, atol=1e-6)
    np.testing.assert_allclose(tall.objective, plain.objective, rtol=1e-8)


def test_identical_rows_are_fitted_by_the_intercept():
    X, y = np.full((6, 3), 2.0), np.array([0, 0, 0, 0, 1, 2])

    found = fit_logistic(X, y, [1.0], tol=1e-10)

    scores = (X @ found.coef[0, 0].T + found.intercept[0, 0])[0]
    np.testing.assert_allclose(
        np.exp(scores - np.logaddexp.reduce(scores)), [4 / 6, 1 / 6, 1 / 6], rtol=1e-5
    )


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize(("n_samples", "n_features"), [(150, 8), (40, 70)])
def test_svm_finds_the_optimum(n_samples, n_features, n_classes):
    X, y = blobs(n_samples, n_features, n_classes)

    found = fit_svm(X, y, GRID, tol=1e-9)

    assert found.converged.all()
    for i, C in enumerate(GRID):
        best = 0.0
        for k in [1] if n_classes == 2 else range(n_classes):
            signs = np.where(y == k, 1.0, -1.0)
            best += minimize(
                lambda w, C=C, s=signs: hinge_objective(X, s, C, w[:-1], w[-1]),
                np.zeros(n_features + 1),
                jac=lambda w, C=C, s=signs: hinge_gradient(X, s, C, w),
                method="L-BFGS-B",
                options={"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-15, "gtol": 1e-9},
            ).fun
        assert found.objective[0, i] == pytest.approx(best, rel=1e-6)


def hinge_gradient(X, signs, C, w):
    pull = -2 * C * signs * np.maximum(0, 1 - signs * (X @ w[:-1] + w[-1]))
    return np.r_[X.T @ pull + w[:-1], pull.sum()]


def test_svm_agrees_with_linear_svc_of_a_large_intercept_scaling():
    X, y = blobs(150, 8, 3)

    found = fit_svm(X, y, [0.1], tol=1e-9)
    theirs = LinearSVC(C=0.1, dual=False, tol=1e-10, intercept_scaling=1e3, max_iter=10_000)
    theirs.fit(X, y)

    np.testing.assert_allclose(found.coef[0, 0], theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(found.intercept[0, 0], theirs.intercept_, atol=1e-3)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("shape", [(60, 8), (25, 40)])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_and_its_leave_one_out(n_classes, shape, weighted):
    X, y = blobs(*shape, n_classes)
    weights = np.random.default_rng(2).uniform(0.5, 2, len(y)) if weighted else None
    penalties = [0.1, 10.0, 1e3]

    found = fit_ridge(X, y, penalties, sample_weight=weights)

    for i, alpha in enumerate(penalties):
        whole = RidgeClassifier(alpha=alpha, solver="svd" if not weighted else "cholesky")
        whole.fit(X, y, weights)
        np.testing.assert_allclose(found.coef[i], np.atleast_2d(whole.coef_), atol=1e-7)
        np.testing.assert_allclose(found.intercept[i], whole.intercept_, atol=1e-6)
        error, right = explicit_leave_one_out(X, y, alpha, weights)
        assert found.loo_error[i] == pytest.approx(error, rel=1e-6)
        assert found.loo_accuracy[i] == pytest.approx(right)


def explicit_leave_one_out(X, y, alpha, weights):
    share = np.ones(len(y)) if weights is None else weights
    targets = np.where(y[:, None] == np.arange(y.max() + 1), 1.0, -1.0)
    targets = targets[:, 1:] if y.max() == 1 else targets
    errors, rights = [], []
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        w = share[rest][:, None]
        mean, center = (w * X[rest]).sum(0) / w.sum(), (w * targets[rest]).sum(0) / w.sum()
        inner = X[rest] - mean
        gram = inner.T @ (w * inner) + alpha * np.eye(X.shape[1])
        coef = np.linalg.solve(gram, inner.T @ (w * (targets[rest] - center)))
        predicted = (X[i] - mean) @ coef + center
        errors.append(np.mean((targets[i] - predicted) ** 2))
        chosen = int(predicted[0] > 0) if len(predicted) == 1 else predicted.argmax()
        rights.append(chosen == y[i])
    return np.average(errors, weights=share), np.average(rights, weights=share)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_ridge_folds_are_the_fits_of_the_rest(n_classes):
    X, y = blobs(60, 8, n_classes)
    folds = np.arange(60) % 7 != np.arange(3)[:, None]
    penalties = [10.0, 0.1]

    together = fit_ridge_folds(X, y, penalties, sample_weight=folds)

    assert together.converged.all()
    for i, fold in enumerate(folds):
        alone = fit_ridge(X[fold], y[fold], penalties)
        np.testing.assert_allclose(together.coef[i], alone.coef, atol=1e-10)
        np.testing.assert_allclose(together.intercept[i], alone.intercept, atol=1e-10)


@pytest.mark.parametrize("fit", [fit_logistic, fit_svm])
@pytest.mark.parametrize("shape", [(150, 12), (30, 60)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_that_are_not_turned_have_the_same_optimum(fit, shape, dtype):
    X, y = blobs(*shape, 3, dtype=dtype)
    weights = np.random.default_rng(4).uniform(0, 2, len(y))
    grid = [1e-2, 1.0, 1e2]

    turned = fit(make_design(X), y, grid, sample_weight=weights)
    plain = fit(make_design(X, turn=False), y, grid, sample_weight=weights)

    assert plain.converged.all()
    np.testing.assert_allclose(plain.objective, turned.objective, rtol=1e-3)
    np.testing.assert_allclose(plain.coef, turned.coef, atol=0.05)


def test_three_folds_from_their_centre_end_where_each_alone_does():
    X, y = blobs(120, 10, 3)
    folds = np.arange(len(y)) % 5 != np.arange(4)[:, None]

    together = fit_logistic(X, y, GRID, sample_weight=folds, tol=1e-9)

    for i, fold in enumerate(folds):
        alone = fit_logistic(X, y, GRID, sample_weight=fold, tol=1e-9)
        np.testing.assert_allclose(together.objective[i], alone.objective[0], rtol=1e-7)


def test_a_design_keeps_distances_in_as_many_dimensions_as_samples():
    X, _ = blobs(20, 50, 2)

    design = make_design(X)

    assert design.rank == 20
    inner = design.values[:, :-1].numpy()
    np.testing.assert_allclose(inner @ inner.T, (X - X.mean(0)) @ (X - X.mean(0)).T, atol=1e-10)
    np.testing.assert_allclose(
        design.from_original(*design.to_original(torch.ones(21, dtype=torch.float64))), 1.0
    )


@pytest.mark.parametrize("fit", [fit_logistic, fit_svm, fit_ridge])
def test_what_cannot_be_fitted_is_said(fit):
    X, y = blobs(20, 4, 2)
    holes = X.copy()
    holes[3, 1] = np.nan

    with pytest.raises(ValueError, match="samples of 1 class, expected at least 2"):
        fit(X, np.zeros(20, dtype=int), [1.0])
    with pytest.raises(ValueError, match="NaN or infinity in 1 places"):
        fit(holes, y, [1.0])
    with pytest.raises(ValueError, match=r"is -1.0, expected a number above 0"):
        fit(X, y, [1.0, -1.0])
    with pytest.raises(ValueError, match="sample_weight"):
        fit(X, y, [1.0], sample_weight=np.full(20, -1.0))
    with pytest.raises(ValueError, match="expected class indices"):
        fit(X, y.astype(float), [1.0])
    with pytest.raises(ValueError, match="samples of 1 class"):
        fit(X, y, [1.0], sample_weight=(y == 0).astype(float))
