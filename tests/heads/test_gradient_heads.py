"""Softmax layers and networks: what a head learns is what its settings learn side by side."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from pipeline.heads.folds import Fold
from pipeline.heads.linear import LinearHead
from pipeline.heads.mlp import MLPHead

QUICK = {"epochs": 4, "batch_size": 16, "lr": 0.01}
BOTH = [(LinearHead, QUICK), (MLPHead, QUICK | {"hidden": 8, "precision": "float32"})]
both = pytest.mark.parametrize(("cls", "params"), BOTH)


def blobs(n_samples=120, n_features=6, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n_samples) % n_classes
    centres = 2 * np.random.default_rng(9).normal(size=(n_classes, n_features))
    return (centres[y] + rng.normal(size=(n_samples, n_features))).astype(np.float32), y


def folds_of(n_samples, n_folds=2):
    order = np.random.default_rng(3).permutation(n_samples)
    parts = np.array_split(order, n_folds)
    return [Fold(np.setdiff1d(order, part), np.sort(part)) for part in parts]


def assert_as_one_by_one(cls, settings, X, y, folds, n_classes=3):
    results = list(cls.try_settings(settings, X, y, folds, n_classes=n_classes))

    places = sorted((result.setting, result.fold) for result in results)
    assert places == [(i, f) for i in range(len(settings)) for f in range(len(folds))]
    for result in results:
        fold = folds[result.fold]
        head = cls(**settings[result.setting]).fit(X[fold.fit], y[fold.fit])
        assert not result.failure
        np.testing.assert_allclose(
            result.logits[:, head.classes_], head.logits(X[fold.choose]), rtol=1e-3, atol=1e-3
        )
    return results


# As scikit-learn's


SAME_AS_REPEATED = {
    "check_sample_weight_equivalence_on_dense_data": (
        "steps of float32: repeated samples make other mini-batches, and even one batch of all of "
        "them adds up in another order"
    )
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [
        LinearHead(lr=0.1, epochs=40, batch_size=32, optimizer="sgd", class_weight="balanced"),
        MLPHead(hidden=32, lr=0.02),
        MLPHead(hidden=(32, 16), lr=0.02, epochs=30, early_stopping=True, precision="float32"),
    ],
    expected_failed_checks=lambda _: SAME_AS_REPEATED,
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("hidden", [8, (8,), [8, 4], (8, 4, 2)])
def test_a_clone_has_the_very_parameters(hidden):
    head = MLPHead(hidden, class_weight={0: 1.0})

    assert clone(head).get_params() == head.get_params()
    assert head.get_params()["hidden"] is hidden


# Weights


@both
def test_one_batch_with_weights_is_one_with_repeated_samples(cls, params):
    X, y = blobs(60)
    weights = np.random.default_rng(1).integers(0, 4, len(X))
    params = params | {"batch_size": 1000, "optimizer": "sgd"}
    # Dropout draws anew for each sample.
    params |= {"dropout": 0.0} if cls is MLPHead else {}

    weighted = cls(**params).fit(X, y, sample_weight=weights)
    repeated = cls(**params).fit(np.repeat(X, weights, axis=0), np.repeat(y, weights))

    np.testing.assert_allclose(weighted.logits(X), repeated.logits(X), atol=1e-4)


@both
def test_class_weights_are_sample_weights(cls, params):
    X, y = blobs()
    factors = {0: 1.0, 1: 0.5, 2: 3.0}

    one = cls(**params, class_weight=factors).fit(X, y)
    other = cls(**params).fit(X, y, sample_weight=[factors[label] for label in y])

    np.testing.assert_array_equal(one.logits(X), other.logits(X))


# Views


@both
@pytest.mark.parametrize("early_stopping", [False, True])
def test_one_view_is_as_none(cls, params, early_stopping):
    X, y = blobs()
    weights = np.random.default_rng(1).random(len(X))
    if cls is MLPHead:
        params = params | {"early_stopping": early_stopping}

    plain = cls(**params).fit(X, y, sample_weight=weights)
    viewed = cls(**params).fit_views(X[:, None], y, sample_weight=weights)

    np.testing.assert_array_equal(plain.logits(X), viewed.logits(X))


@both
def test_more_views_are_all_learnt_from(cls, params):
    X, y = blobs(60)
    rng = np.random.default_rng(2)
    noise = 3 * rng.normal(size=(2, len(X), 1)).astype(np.float32)
    views = np.stack([X, X + noise[0], X + noise[1]], axis=1)
    X_moved, y_moved = blobs(300, seed=5)
    X_moved = X_moved + 3 * rng.normal(size=(300, 1)).astype(np.float32)
    params = params | {"epochs": 40}

    plain = cls(**params).fit(X, y)
    viewed = cls(**params).fit_views(views, y)

    assert viewed.n_features_in_ == X.shape[1]
    assert viewed.score(X_moved, y_moved) > plain.score(X_moved, y_moved)


@both
def test_views_have_three_axes_and_are_finite(cls, params):
    X, y = blobs(6)
    broken = np.stack([X, X], axis=1)
    broken[4, 1] = np.nan

    with pytest.raises(ValueError, match=r"shape \(6, 6\), expected \(n_samples, n_views, n_feat"):
        cls(**params).fit_views(X, y)
    with pytest.raises(ValueError, match=r"shape \(6, 0, 6\), expected .* none of them 0"):
        cls(**params).fit_views(np.empty((6, 0, 6)), y)
    with pytest.raises(ValueError, match=r"1 of 6 rows of X hold NaN or infinity .* is row 4"):
        cls(**params).fit_views(broken, y)
    with pytest.raises(ValueError, match="Found array with dim 3"):
        cls(**params).fit(broken, y)


# Settings side by side


@both
def test_settings_learn_what_each_learns_alone(cls, params):
    X, y = blobs()
    settings = [params | {"lr": lr, "weight_decay": decay}
                for lr in (0.001, 0.01) for decay in (0.0, 0.5)]  # fmt: skip
    settings += [
        settings[0] | {"epochs": 2},
        settings[0] | {"seed": 4},
        settings[0] | {"optimizer": "sgd", "warmup": 0.3, "label_smoothing": 0.1},
        settings[0] | {"class_weight": {0: 3.0, 1: 1.0, 2: 1.0}},
    ]

    results = assert_as_one_by_one(cls, settings, X, y, folds_of(len(X)))

    # The settings are no copies of one another.
    logits = [result.logits for result in results if result.fold == 0]
    assert len(np.unique([np.abs(table).sum() for table in logits])) == len(settings)


def test_networks_of_many_shapes_learn_what_each_learns_alone():
    X, y = blobs()
    params = QUICK | {"precision": "float32"}
    settings = [params | {"hidden": hidden, "dropout": dropout}
                for hidden in (4, (8, 4), [8]) for dropout in (0.0, 0.5)]  # fmt: skip

    assert_as_one_by_one(MLPHead, settings, X, y, folds_of(len(X)))


def test_early_stopping_never_sees_the_rows_that_choose():
    X, y = blobs(200)
    folds = folds_of(len(X))
    params = {"hidden": 8, "lr": 0.05, "epochs": 20, "patience": 2, "precision": "float32"}
    settings = [params | {"early_stopping": True, "batch_size": size} for size in (16, 32)]

    results = assert_as_one_by_one(MLPHead, settings, X, y, folds)

    y_mad = y.copy()
    y_mad[folds[0].choose] = np.random.default_rng(0).permutation(y[folds[0].choose])
    again = list(MLPHead.try_settings(settings, X, y_mad, folds[:1], n_classes=3))
    first = {result.setting: result.logits for result in results if result.fold == 0}
    for result in again:
        np.testing.assert_array_equal(result.logits, first[result.setting])


@both
def test_a_fold_without_a_class_gives_it_no_score(cls, params):
    X, y = blobs()
    folds = [Fold(np.flatnonzero(y != 1), np.flatnonzero(y == 1)), *folds_of(len(X))]

    results = assert_as_one_by_one(cls, [params, params | {"lr": 0.001}], X, y, folds)

    lacking = [result.logits for result in results if result.fold == 0]
    assert all(np.isneginf(logits[:, 1]).all() for logits in lacking)
    assert all(np.isfinite(logits[:, [0, 2]]).all() for logits in lacking)


@both
def test_a_setting_that_fails_takes_no_other_with_it(cls, params):
    X, y = blobs()
    folds = folds_of(len(X))
    settings = [params, params | {"lr": 1e38}, params | {"lr": -1.0}, params | {"warmup": 2},
                params | {"device": "abacus"}]  # fmt: skip

    results = list(cls.try_settings(settings, X, y, folds, n_classes=3))

    assert len(results) == len(settings) * len(folds)
    texts = {result.setting: result.failure for result in results}
    assert texts[0] == ""
    assert "ArithmeticError" in texts[1]
    assert "lr is -1 and weight_decay 0.01, expected a number above 0" in texts[2]
    assert "warm-up of 2, expected" in texts[3]
    assert "device is 'abacus', expected auto, cpu or cuda" in texts[4]
    assert_as_one_by_one(cls, [params], X, y, folds)


@both
def test_a_fold_of_one_class_says_so(cls, params):
    X, y = blobs()
    fold = Fold(np.flatnonzero(y == 1), np.flatnonzero(y == 2))

    results = list(cls.try_settings([params, params | {"lr": 0.1}], X, y, [fold], n_classes=3))

    assert [result.setting for result in results] == [0, 1]
    assert all("at least 2 classes, but the data has only one" in r.failure for r in results)


# Saved


@pytest.mark.parametrize("hidden", [6, (6,), (6, 5), [6, 5, 4], ()])
def test_networks_of_any_depth_come_back(hidden):
    X, y = blobs()
    head = MLPHead(hidden, **QUICK).fit(X, y)

    back = MLPHead.from_arrays(head.get_params(), head.to_arrays())

    np.testing.assert_array_equal(back.logits(X), head.logits(X))


def test_a_network_that_was_saved_before_depth_was_known_comes_back():
    X, _ = blobs()
    rng = np.random.default_rng(0)
    arrays = {
        "hidden_weight": rng.normal(size=(4, 6)).astype(np.float32),
        "hidden_bias": rng.normal(size=4).astype(np.float32),
        "weight": rng.normal(size=(3, 4)).astype(np.float32),
        "bias": rng.normal(size=3).astype(np.float32),
        "classes": np.arange(3),
    }
    params = {
        "hidden": 4, "dropout": 0.2, "lr": 3e-3, "weight_decay": 1e-2, "epochs": 50,
        "batch_size": 256, "early_stopping": False, "patience": 5, "class_weight": None, "seed": 0,
    }  # fmt: skip

    head = MLPHead.from_arrays(params, arrays)

    hidden = np.maximum(X @ arrays["hidden_weight"].T + arrays["hidden_bias"], 0)
    expected = hidden @ arrays["weight"].T + arrays["bias"]
    np.testing.assert_allclose(head.logits(X), expected, rtol=1e-6)


@both
def test_a_model_of_a_gpu_is_used_without_one(cls, params):
    X, y = blobs()
    head = cls(**params).fit(X, y)

    back = cls.from_arrays(head.get_params() | {"device": "cuda"}, head.to_arrays())

    np.testing.assert_array_equal(back.logits(X), head.logits(X))


# Degenerate input


@both
def test_little_and_dull_data_is_fitted(cls, params):
    one_each = np.eye(4, 50, dtype=np.float32)
    constant = np.full((6, 3), 5.0, np.float32)

    few = cls(**params | {"batch_size": 1000, "epochs": 40, "lr": 0.05})
    few.fit(one_each, np.arange(4))
    dull = cls(**params).fit(constant, np.arange(6) % 2)

    np.testing.assert_array_equal(few.predict(one_each), np.arange(4))
    assert np.isfinite(dull.logits(constant)).all()
    np.testing.assert_allclose(dull.predict_proba(constant).sum(axis=1), 1)


@both
def test_samples_that_cannot_be_fitted_are_refused(cls, params):
    X, y = blobs(9)
    broken = X.copy()
    broken[2] = np.nan
    head = cls(**params)

    with pytest.raises(ValueError, match="only one class"):
        head.fit(X, np.zeros(9))
    with pytest.raises(ValueError, match="NaN"):
        head.fit(broken, y)
    with pytest.raises(ValueError, match="none negative"):
        head.fit(X, y, sample_weight=-np.ones(9))
    with pytest.raises(ValueError, match="at least one non-zero"):
        head.fit(X, y, sample_weight=np.zeros(9))
    with pytest.raises(ArithmeticError, match="try a learning rate below 1e\\+38"):
        cls(**params | {"lr": 1e38}).fit(X, y)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"hidden": 0}, r"hidden layers of \(0,\) units, expected 1 or more each"),
        ({"dropout": 1.0}, "dropout is 1 "),
        ({"epochs": 0}, "0 epochs in batches of 128"),
        ({"precision": "int4"}, "precision is 'int4', expected one of auto, float32, bfloat16"),
        ({"early_stopping": True, "patience": 0}, "patience is 0"),
    ],
)
def test_parameters_out_of_range_are_named(params, message):
    X, y = blobs(9)

    with pytest.raises(ValueError, match=message):
        MLPHead(**params).fit(X, y)
