"""Votes of neighbours and class means: one search answers for every setting, weights count."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from pipeline.errors import CorruptStoreError
from pipeline.heads import knn
from pipeline.heads.folds import Fold
from pipeline.heads.knn import KNNHead
from pipeline.heads.prototype import PrototypeHead


def data(n_samples=90, n_features=5, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n_samples) % n_classes
    X = rng.normal(size=(n_samples, n_features)) + 0.7 * y[:, None] + 1
    return X.astype(np.float32), y


def folds_of(n_samples, n_folds=3):
    order = np.random.default_rng(3).permutation(n_samples)
    parts = np.array_split(order, n_folds)
    return [Fold(np.setdiff1d(order, part), np.sort(part)) for part in parts]


def settings_of():
    return [{"k": k, "metric": metric, "temperature": temperature}
            for k in (1, 5, 20, 500) for metric in ("cosine", "euclidean")
            for temperature in (None, 0.07, 1.0)]  # fmt: skip


# As scikit-learn's


def failing(estimator):
    if isinstance(estimator, PrototypeHead):
        return {}
    reasons = {
        "check_sample_weight_equivalence_on_dense_data": (
            "a weight multiplies a vote; a repeated sample takes several of the k places"
        )
    }
    if estimator.temperature is not None:
        reasons["check_methods_subset_invariance"] = (
            "products of float32 round by the number of queries; the neighbours are the same, "
            "their similarities to 1e-6 where the check asks for 1e-7"
        )
    return reasons


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [
        KNNHead(k=5),
        KNNHead(k=5, metric="euclidean"),
        KNNHead(k=3, temperature=None),
        PrototypeHead(),
        PrototypeHead(normalise="l2n"),
        PrototypeHead(normalise="none"),
    ],
    expected_failed_checks=failing,
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


# Neighbours


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equal_votes_choose_as_scikit_learn(metric):
    X, y = data()
    X_test, _ = data(40, seed=1)

    ours = KNNHead(7, metric=metric, temperature=None).fit(X, y)

    theirs = KNeighborsClassifier(7, metric=metric, algorithm="brute").fit(X, y)
    np.testing.assert_array_equal(ours.predict(X_test), theirs.predict(X_test))


def test_all_settings_are_what_each_is_alone():
    X, y = data()
    folds, settings = folds_of(len(X)), settings_of()

    results = list(KNNHead.try_settings(settings, X, y, folds, n_classes=3))

    places = sorted((result.setting, result.fold) for result in results)
    assert places == [(i, f) for i in range(len(settings)) for f in range(len(folds))]
    for result in results:
        fold = folds[result.fold]
        head = KNNHead(**settings[result.setting]).fit(X[fold.fit], y[fold.fit])
        np.testing.assert_allclose(result.logits, head.logits(X[fold.choose]), atol=1e-4)


def test_a_fold_is_searched_once(monkeypatch):
    X, y = data()
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[2])
        return search(*args, **kwargs)

    search = knn.search
    monkeypatch.setattr(knn, "search", counted)
    list(KNNHead.try_settings(settings_of(), X, y, folds_of(len(X)), n_classes=3))

    assert calls == [500, 500, 500]


def test_a_fold_without_a_class_gives_it_no_score():
    X, y = data()
    fold = Fold(np.flatnonzero(y != 1), np.flatnonzero(y == 1))

    (result,) = KNNHead.try_settings([{"k": 4}], X, y, [fold], n_classes=3)

    alone = KNNHead(4).fit(X[fold.fit], y[fold.fit]).logits(X[fold.choose])
    assert np.isneginf(result.logits[:, 1]).all()
    np.testing.assert_allclose(result.logits[:, [0, 2]], alone, atol=1e-5)


def test_a_setting_that_fails_takes_no_other_with_it():
    X, y = data()
    settings = [{"k": 4}, {"k": 0}, {"metric": "hamming"}, {"device": "abacus"}]

    results = list(KNNHead.try_settings(settings, X, y, folds_of(len(X))[:1], n_classes=3))

    texts = {result.setting: result.failure for result in results}
    assert len(results) == 4
    assert texts[0] == ""
    assert "k is 0 and temperature 0.07, expected 1 or more" in texts[1]
    assert "metric is 'hamming', expected one of cosine, euclidean" in texts[2]
    assert "device is 'abacus'" in texts[3]


@pytest.mark.parametrize("cls", [KNNHead, PrototypeHead])
def test_a_fold_of_one_class_or_with_nan_says_so(cls):
    X, y = data()
    X[4] = np.nan
    folds = [Fold(np.flatnonzero(y == 2), np.arange(3)), Fold(np.arange(60), np.arange(60, 90))]

    one_class, broken = cls.try_settings([{}], X, y, folds, n_classes=3)

    assert "at least 2 classes, but the data has only one" in one_class.failure
    assert "NaN" in broken.failure


def test_a_weight_multiplies_a_vote():
    X, y = data()
    weights = np.where(y == 2, 50.0, 1.0)
    head = KNNHead(15, temperature=None)

    plain, weighted = (head.fit(X, y, sample_weight=w).predict_proba(X) for w in (None, weights))
    scaled = head.fit(X, y, sample_weight=np.full(len(X), 8.0)).predict_proba(X)

    odds = plain[:, 2] / (1 - plain[:, 2])
    mixed = (plain[:, 2] > 0.1) & (plain[:, 2] < 0.9)
    assert mixed.any()
    assert (weighted[mixed, 2] / (1 - weighted[mixed, 2]) > odds[mixed]).all()
    np.testing.assert_allclose(scaled, plain, rtol=1e-12)


@pytest.mark.parametrize("cls", [KNNHead, PrototypeHead])
def test_a_sample_of_weight_0_is_not_there(cls):
    X, y = data()
    weights = (np.arange(len(X)) % 4 > 0).astype(float)

    weighted = cls().fit(X, y, sample_weight=weights).logits(X)
    removed = cls().fit(X[weights > 0], y[weights > 0]).logits(X)

    np.testing.assert_allclose(weighted, removed, rtol=1e-5)


def test_neighbours_saved_without_weights_come_back():
    X, y = data()
    head = KNNHead(5, metric="euclidean").fit(X, y)
    arrays = head.to_arrays()
    del arrays["weights"]

    back = KNNHead.from_arrays({"k": 5, "metric": "euclidean", "temperature": 0.07}, arrays)

    np.testing.assert_array_equal(back.logits(X), head.logits(X))


def test_neighbours_saved_at_length_one_are_the_same():
    X, y = data()
    head = KNNHead(5).fit(X, y)
    arrays = head.to_arrays()
    arrays["features"] = X / np.linalg.norm(X, axis=1, keepdims=True)

    back = KNNHead.from_arrays(head.get_params(), arrays)

    np.testing.assert_allclose(back.logits(X), head.logits(X), atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"weights": -np.ones(90)}, {"weights": np.zeros(90)}, {"variance": np.array(0.0)}],
)
def test_saved_votes_that_cannot_be_counted_are_refused(change):
    arrays = KNNHead(5).fit(*data()).to_arrays() | change

    with pytest.raises(CorruptStoreError, match=r"weights or the variance .* not above 0"):
        KNNHead.from_arrays({}, arrays)


# Prototypes


def test_prototypes_are_those_of_the_paper():
    X, y = data()

    cl2n, l2n, plain = (PrototypeHead(normalise=n).fit(X, y) for n in ("cl2n", "l2n", "none"))

    def length_one(Z):
        return Z / np.linalg.norm(Z, axis=1, keepdims=True)

    for head, Z in ((cl2n, length_one(X - X.mean(axis=0))), (l2n, length_one(X)), (plain, X)):
        means = np.array([Z[y == code].mean(axis=0) for code in range(3)])
        distances = ((Z[:, None] - means) ** 2).sum(axis=2)
        np.testing.assert_allclose(head.prototypes_, means, atol=1e-5)
        np.testing.assert_array_equal(head.predict(X), distances.argmin(axis=1))


def test_a_prototype_that_was_saved_before_there_was_a_choice_comes_back():
    X, y = data()
    head = PrototypeHead().fit(X, y)

    back = PrototypeHead.from_arrays({}, head.to_arrays())

    np.testing.assert_array_equal(back.logits(X), head.logits(X))


@pytest.mark.parametrize("normalise", ["cl2n", "l2n", "none"])
def test_weights_of_prototypes_are_repeated_samples(normalise):
    X, y = data()
    weights = np.random.default_rng(1).integers(0, 4, len(X))
    head = PrototypeHead(normalise=normalise)

    weighted = head.fit(X, y, sample_weight=weights).logits(X)
    repeated = head.fit(np.repeat(X, weights, axis=0), np.repeat(y, weights)).logits(X)

    np.testing.assert_allclose(weighted, repeated, rtol=1e-4, atol=1e-5)


def test_prototypes_that_cannot_be_had_are_refused():
    X, y = data()

    with pytest.raises(ValueError, match="normalise is 'zca', expected one of cl2n, l2n, none"):
        PrototypeHead(normalise="zca").fit(X, y)
    with pytest.raises(ValueError, match=r"or 0 for all samples of class np.int64\(1\)"):
        PrototypeHead().fit(X, y, sample_weight=(y != 1).astype(float))


# Degenerate input


@pytest.mark.parametrize(
    "head", [KNNHead(k=500), KNNHead(k=1, metric="euclidean"), PrototypeHead()]
)
def test_one_sample_a_class_and_more_features_than_samples(head):
    X = np.eye(4, 50, dtype=np.float32)

    head.fit(X, np.arange(4))

    np.testing.assert_array_equal(head.predict(X), np.arange(4))
    assert np.isfinite(head.logits(X)).all()


@pytest.mark.parametrize("head", [KNNHead(), KNNHead(metric="euclidean"), PrototypeHead()])
def test_constant_features_leave_finite_scores(head):
    X = np.full((6, 3), 5.0, np.float32)

    assert np.isfinite(head.fit(X, np.arange(6) % 2).logits(X)).all()


def test_weights_that_cannot_be_counted_are_refused():
    X, y = data()

    with pytest.raises(ValueError, match=r"holds -1.0, expected 0 or more"):
        KNNHead().fit(X, y, sample_weight=-np.ones(90))
    with pytest.raises(ValueError, match="at least one non-zero"):
        KNNHead().fit(X, y, sample_weight=np.zeros(90))


def test_queries_in_batches_are_those_one_by_one():
    X, y = data()
    head = KNNHead(5).fit(X, y)

    alone = np.concatenate([head.logits(X[i : i + 1]) for i in range(len(X))])

    np.testing.assert_allclose(alone, head.logits(X), atol=1e-4)
