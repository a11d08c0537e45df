"""The logistic and ridge heads: batched settings equal single fits; odd data is no surprise."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from pipeline.heads.base import Head
from pipeline.heads.folds import Fold, fit_one_by_one
from pipeline.heads.logistic import LogisticHead
from pipeline.heads.multilabel import MultiLabelLogisticHead
from pipeline.heads.ridge import RidgeHead
from pipeline.heads.solvers.linear import fit_logistic, fit_logistic_multilabel
from pipeline.heads.threads import one_thread_each

HEADS = [
    LogisticHead(tol=1e-9),
    LogisticHead(penalty="l1", tol=1e-7),
    LogisticHead(penalty="elasticnet", tol=1e-7),
    RidgeHead(),
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Thread pools that wait for work hold each other up on problems as small as these."""
    with one_thread_each():
        yield


def blobs(n_samples=90, n_features=6, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n_samples) % n_classes
    X = rng.normal(size=(n_classes, n_features))[y] + rng.normal(size=(n_samples, n_features))
    return X, y


def parts(n_samples, n_folds):
    place = np.arange(n_samples)
    held = place // 5 % n_folds == np.arange(n_folds)[:, None]
    return [Fold(place[~one], place[one]) for one in held]


def by_place(results):
    results = list(results)
    found = {(one.setting, one.fold): one for one in results}
    assert len(found) == len(results)
    return found


def same_as_one_by_one(cls, settings, X, y, folds, n_classes, atol):
    batched = by_place(cls.try_settings(settings, X, y, folds, n_classes=n_classes))
    single = by_place(fit_one_by_one(cls, settings, X, y, folds, n_classes))
    assert batched.keys() == single.keys()
    for place, one in single.items():
        assert batched[place].failure == one.failure
        assert batched[place].converged == one.converged
        if not one.failure:
            assert batched[place].logits.shape == (len(folds[place[1]].choose), n_classes)
            np.testing.assert_allclose(batched[place].logits, one.logits, atol=atol)
    return batched


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("n_folds", [2, 4])
def test_batched_settings_of_the_logistic_head(n_classes, n_folds):
    X, y = blobs(n_classes=n_classes)
    y = np.where(np.arange(90) < 20, 0, y)
    settings = [
        {"C": C, "class_weight": class_weight, "penalty": penalty, "tol": 1e-10, "l1_ratio": 0.3}
        for C in (1.0, 0.01)
        for class_weight in (None, "balanced", {1: 3.0})
        for penalty in ("l2", "elasticnet")
    ]

    found = same_as_one_by_one(
        LogisticHead, settings, X, y, parts(90, n_folds), n_classes, atol=1e-3
    )

    assert not any(one.failure for one in found.values())


@pytest.mark.parametrize("n_folds", [1, 3])
def test_batched_settings_of_the_ridge_head(n_folds):
    X, y = blobs()
    y = np.where(np.arange(90) < 20, 0, y)
    settings = [
        {"alpha": alpha, "class_weight": class_weight}
        for alpha in (10.0, 0.1)
        for class_weight in (None, "balanced")
    ]
    folds = parts(90, 3)[:n_folds]

    same_as_one_by_one(RidgeHead, settings, X, y, folds, 3, atol=1e-9)


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_a_fold_without_a_class_scores_it_with_minus_infinity(head):
    X, y = blobs()
    folds = parts(90, 3)
    folds[1] = Fold(folds[1].fit[y[folds[1].fit] != 1], folds[1].choose)

    found = same_as_one_by_one(type(head), [head.get_params()], X, y, folds, 3, atol=2e-3)

    assert (found[0, 1].logits[:, 1] == -np.inf).all()
    assert np.isfinite(found[0, 0].logits).all()


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_a_bad_setting_and_a_bad_fold_take_no_other_with_them(head):
    X, y = blobs()
    folds = parts(90, 3)
    folds[2] = Fold(folds[2].fit[y[folds[2].fit] == 1], folds[2].choose)
    name = "alpha" if isinstance(head, RidgeHead) else "C"
    good = head.get_params()

    found = by_place(type(head).try_settings([good | {name: -1.0}, good], X, y, folds, n_classes=3))

    assert found[0, 0].failure == f"ValueError: {name} is -1.0, expected a number above 0"
    assert "has only one class" in found[1, 2].failure
    assert found[1, 0].logits is not None
    assert found[1, 1].logits is not None


def test_nan_fails_every_setting_by_name():
    X, y = blobs()
    X[0, 0] = np.nan

    found = by_place(
        LogisticHead.try_settings([{"C": 1.0}, {"C": 2.0}], X, y, parts(90, 2)[1:], n_classes=3)
    )

    assert all("NaN" in one.failure for one in found.values())


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_heads_find_what_scikit_learn_finds(n_classes):
    X, y = blobs(n_classes=n_classes)
    weights = np.random.default_rng(1).uniform(0, 2, len(y))

    ridge = RidgeHead(3.0, class_weight="balanced").fit(X, y, weights)

    for options, weight in [({}, weights), ({"class_weight": {0: 2.0}}, None)]:
        logistic = LogisticHead(0.3, tol=1e-10, **options).fit(X, y, weight)
        theirs = LogisticRegression(C=0.3, tol=1e-8, max_iter=5000, **options).fit(X, y, weight)
        np.testing.assert_allclose(logistic.coef_, theirs.coef_, atol=1e-4)
        np.testing.assert_allclose(logistic.intercept_, theirs.intercept_, atol=2e-4)
    closed = RidgeClassifier(alpha=3.0, class_weight="balanced").fit(X, y, weights)
    np.testing.assert_allclose(ridge.coef_, np.atleast_2d(closed.coef_), atol=1e-8)
    np.testing.assert_allclose(ridge.intercept_, closed.intercept_, atol=1e-8)


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_odd_data_is_fitted(head):
    X, y = blobs(40, 60, 4)
    flat = np.hstack([X[:, :5], np.ones((40, 3))])
    few = np.arange(6)
    for data, labels in [
        (X, y),  # fewer samples than features
        (flat, y),  # constant features
        (np.ones((40, 2)), y),  # nothing but constants
        (X[:6], few),  # one sample a class
        (X[:8], np.r_[few, 0, 1]),  # more classes than most classes have samples
    ]:
        fitted = head.set_params().fit(data, labels)
        assert fitted.converged_
        assert np.isfinite(fitted.logits(data)).all()
    assert (head.fit(X[:6], few).predict(X[:6]) == few).all() or head.get_params().get("C")


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_what_cannot_be_fitted_is_said(head):
    X, y = blobs(20)

    with pytest.raises(ValueError, match="only one class"):
        head.fit(X, np.zeros(20))
    with pytest.raises(ValueError, match="NaN"):
        head.fit(np.where(np.eye(20, 6), np.nan, X), y)
    with pytest.raises(ValueError, match="at least one non-zero number"):
        head.fit(X, y, np.zeros(20))
    with pytest.raises(ValueError, match="weight above 0"):
        head.fit(X, y, (y == 0).astype(float))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"C": 0.0}, "C is 0.0, expected a number above 0"),
        ({"penalty": "l3"}, "penalty is 'l3', expected one of l2, l1, elasticnet"),
        ({"l1_ratio": 1.5}, "l1_ratio is 1.5, expected a number from 0 to 1"),
        ({"tol": 0.0}, "tol is 0.0, expected a number above 0"),
        ({"max_iter": 0}, "max_iter is 0, expected 1 or more"),
        ({"device": "abacus"}, "device is 'abacus', expected auto, cpu or cuda"),
    ],
)
def test_parameters_out_of_range(params, message):
    with pytest.raises(ValueError, match=message):
        LogisticHead(**params).fit(*blobs())


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_saved_and_loaded(head):
    X, y = blobs()
    fitted = head.fit(X, y)

    again = type(head).from_arrays(head.get_params(), fitted.to_arrays())

    np.testing.assert_array_equal(again.logits(X), fitted.logits(X))


def labels_of(X, seed=3):
    rng = np.random.default_rng(seed)
    scores = X @ rng.normal(size=(X.shape[1], 4)) + rng.normal(size=4)
    return (scores + rng.logistic(size=scores.shape) > 0).astype(float)


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_together_are_the_labels_one_by_one(weighted):
    X, _ = blobs()
    labels = labels_of(X)
    weights = np.random.default_rng(5).uniform(0, 2, 90) if weighted else None
    grid = [1.0, 0.01, 10.0]

    found = fit_logistic_multilabel(X, labels, grid, sample_weight=weights, tol=1e-10)

    assert found.converged.all()
    assert found.coef.shape == (1, 3, 4, 6)
    objective = 0
    for j, label in enumerate(labels.T.astype(int)):
        alone = fit_logistic(X, label, grid, sample_weight=weights, tol=1e-10)
        np.testing.assert_allclose(found.coef[:, :, j], alone.coef[:, :, 0], atol=1e-5)
        np.testing.assert_allclose(found.intercept[:, :, j], alone.intercept[:, :, 0], atol=1e-5)
        objective = objective + alone.objective
    np.testing.assert_allclose(found.objective, objective, rtol=1e-9)


def test_an_unknown_label_is_a_sample_left_out():
    X, _ = blobs()
    labels = labels_of(X)
    known = np.random.default_rng(6).random(labels.shape) < 0.7
    holes = np.where(known, labels, np.nan)

    found = fit_logistic_multilabel(X, holes, [1.0], tol=1e-10)

    for j in range(4):
        rows = known[:, j]
        alone = fit_logistic(X[rows], labels[rows, j].astype(int), [1.0], tol=1e-10)
        np.testing.assert_allclose(found.coef[0, 0, j], alone.coef[0, 0, 0], atol=1e-5)


def test_a_label_of_one_value_is_foretold_by_the_rule_of_succession():
    X, _ = blobs()
    labels = np.column_stack([np.ones(90), labels_of(X)[:, 0], np.zeros(90)])
    labels[:40, 2] = np.nan

    head = MultiLabelLogisticHead().fit(X, labels)

    np.testing.assert_allclose(head.predict_proba(X)[:, 0], 91 / 92)
    np.testing.assert_allclose(head.predict_proba(X)[:, 2], 1 / 52)
    assert (head.predict(X)[:, [0, 2]] == [1, 0]).all()
    constant = MultiLabelLogisticHead().fit(X, labels[:, [0, 2]])
    assert (constant.coef_ == 0).all()
    assert constant.converged_


def test_the_multi_label_head_predicts_and_is_saved():
    X, _ = blobs()
    labels = labels_of(X)

    head = MultiLabelLogisticHead(C=0.5).fit(X, labels)
    again = MultiLabelLogisticHead.from_arrays(head.get_params(), head.to_arrays())

    assert isinstance(again, Head)
    assert head.predict(X).shape == labels.shape
    np.testing.assert_array_equal(head.predict(X), head.predict_proba(X) > 0.5)
    assert (head.predict(X) == labels).mean() > 0.8
    np.testing.assert_array_equal(again.predict_proba(X), head.predict_proba(X))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((90, 2), 2.0), "y holds 2, expected 0, 1 or NaN"),
        (np.zeros((90, 1)), "y has 1 label, expected 2 or more"),
        (np.column_stack([np.zeros(90), np.full(90, np.nan)]), "Label 1 of y is known of no"),
        (np.zeros((89, 2)), "inconsistent numbers of samples|89"),
    ],
)
def test_labels_that_cannot_be_fitted(labels, message):
    with pytest.raises(ValueError, match=message):
        MultiLabelLogisticHead().fit(blobs()[0], labels)
