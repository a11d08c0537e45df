"""Support vectors: exact, approximated, one setting or many, all give the same."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from pipeline.errors import CorruptStoreError
from pipeline.heads import kernels
from pipeline.heads.folds import Fold
from pipeline.heads.kernels import kernel_logits, rbf_kernel
from pipeline.heads.svm import SVMHead

NYSTROEM = {"kernel": "rbf", "max_exact_rows": 5}
KINDS = {
    "linear": {"kernel": "linear", "C": 0.01, "tol": 1e-12, "max_iter": 60},
    "hinge": {"kernel": "linear", "loss": "hinge", "C": 0.01, "tol": 1e-9, "max_iter": 10**6},
    "rbf": {"kernel": "rbf", "tol": 1e-9},
    "nystroem": {**NYSTROEM, "C": 0.1, "tol": 1e-12, "max_iter": 60},
}


# The checks compare weighted samples with repeated ones to 1e-7: Newton steps beyond the last
# digit let a solver reach the same point twice, and none of them can meet that tolerance.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [SVMHead(**KINDS[kind] | {"max_iter": 10**6}) for kind in ("hinge", "rbf")]
    + [SVMHead(**KINDS[kind] | {"tol": 1e-18, "max_iter": 15}) for kind in ("linear", "nystroem")]
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))[:700]
    return (X[order] / 16 - 0.3).astype(np.float32), y[order]


def blobs(n_samples, n_classes, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n_samples) % n_classes
    centres = rng.normal(size=(n_classes, 6))
    return centres[y] + rng.normal(size=(n_samples, 6)), y


@pytest.mark.parametrize("kind", KINDS)
def test_settings_tried_together_score_as_each_by_itself(kind):
    X, y = blobs(90, 3)
    folds = [Fold(np.arange(60), np.arange(60, 90)), Fold(np.arange(30, 90), np.arange(30))]
    values = [{"C": 0.01}, {"C": 1.0}, {"C": 0.1, "class_weight": "balanced"}]
    if KINDS[kind]["kernel"] == "rbf":
        values.append({"C": 0.1, "gamma": 0.5})
    settings = [KINDS[kind] | value for value in values]

    results = list(SVMHead.try_settings(settings, X, y, folds, n_classes=3))

    assert sorted((r.setting, r.fold) for r in results) == [
        (i, f) for i in range(len(settings)) for f in range(2)
    ]
    for result in results:
        fold = folds[result.fold]
        head = SVMHead(**settings[result.setting]).fit(X[fold.fit], y[fold.fit])
        np.testing.assert_allclose(result.logits, head.logits(X[fold.choose]), atol=2e-4)
        assert result.converged
        assert result.seconds > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_setting_and_a_fold_of_fewer_classes_leave_the_others_alone(kind):
    X, y = blobs(60, 3)
    y = np.sort(y)
    every, two, one = np.arange(60), np.arange(40), np.arange(15)
    folds = [Fold(every, every), Fold(two, every), Fold(one, every)]
    settings = [KINDS[kind], KINDS[kind] | {"C": -1.0}]

    results = {
        (r.setting, r.fold): r for r in SVMHead.try_settings(settings, X, y, folds, n_classes=3)
    }

    assert len(results) == 6
    assert np.isfinite(results[0, 0].logits).all()
    assert np.isfinite(results[0, 1].logits[:, :2]).all()
    assert (results[0, 1].logits[:, 2] == -np.inf).all()
    assert "needs samples of at least 2 classes" in results[0, 2].failure
    assert {results[1, f].failure for f in range(3)} == {
        "ValueError: C is -1.0, expected a number above 0"
    }


def test_kernels_are_made_in_parts_where_memory_is_short(monkeypatch):
    X, y = blobs(60, 3)
    folds = [Fold(np.arange(40), np.arange(40, 60)), Fold(np.arange(20, 60), np.arange(20))]
    settings = [{"C": C, "gamma": gamma} for C in (0.1, 1.0) for gamma in (0.1, 1.0)]

    def tried():
        results = SVMHead.try_settings(settings, X, y, folds, n_classes=3)
        return {(r.setting, r.fold): r.logits for r in results}

    at_once = tried()
    monkeypatch.setattr("pipeline.heads.svm._KERNEL_BYTES", 1)
    monkeypatch.setattr(kernels, "_BLOCK_NUMBERS", 50)
    in_parts = tried()

    for place, logits in at_once.items():
        np.testing.assert_allclose(in_parts[place], logits, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_weight", [None, {0: 1.0, 1: 3.0, 2: 0.5}])
def test_weights_equal_repeated_samples(kind, class_weight):
    X, y = blobs(45, 3)
    times = np.random.default_rng(1).integers(0, 4, size=45)
    tight = {"tol": 1e-18, "max_iter": 15} if kind in ("linear", "nystroem") else {}
    params = KINDS[kind] | {"class_weight": class_weight} | tight

    weighted = SVMHead(**params).fit(X, y, sample_weight=times)
    repeated = SVMHead(**params).fit(np.repeat(X, times, axis=0), np.repeat(y, times))

    np.testing.assert_allclose(weighted.logits(X), repeated.logits(X), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_without_weight_is_refused(kind):
    X, y = blobs(30, 3)

    with pytest.raises(ValueError, match="class 1 has no sample with a weight above 0"):
        SVMHead(**KINDS[kind]).fit(X, y, sample_weight=y != 1)


@pytest.mark.parametrize("n_classes", [2, 3, 12])
def test_exact_kernel_is_libsvm_with_scikit_learns_votes(n_classes):
    X, y = blobs(120, n_classes)

    ours = SVMHead(C=10.0, tol=1e-9).fit(X, y)
    theirs = SVC(C=10.0, tol=1e-9, break_ties=True, decision_function_shape="ovr").fit(X, y)

    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=1e-6)
    assert ours.gamma_ == pytest.approx(theirs._gamma)
    assert ours.approximation_ == ""


def test_scores_are_the_same_in_blocks(monkeypatch):
    X, y = blobs(90, 9)
    head = SVMHead().fit(X, y)
    whole = head.logits(X)

    monkeypatch.setattr(kernels, "_BLOCK_NUMBERS", 200)

    np.testing.assert_allclose(head.logits(X), whole, atol=1e-12)


@pytest.mark.parametrize("C", [1.0, 1e4])
def test_float32_moves_no_decision_of_two_classes_far(C, digits):
    X, y = digits
    head = SVMHead(C=C, tol=1e-6).fit(X[:350] + 3, y[:350] % 2)

    scores = head.decision_function(X[350:] + 3)

    exact = (
        rbf_kernel(X[350:].astype(float) + 3, head.support_vectors_.astype(float), head.gamma_)
        @ head.dual_coef_[0]
    )
    np.testing.assert_allclose(scores, exact + head.intercept_, atol=1e-4)


def test_products_are_float32_only_where_that_is_exact_enough(digits):
    X, _ = digits
    machine = (X[:50], 0.1), (np.ones((1, 50)), np.zeros(1), np.zeros(0, int))

    small = kernel_logits(X, *machine[0], *machine[1])
    large = kernel_logits(X, *machine[0], 1e6 * machine[1][0], *machine[1][1:])

    assert small.dtype == np.float32
    assert large.dtype == np.float64


def test_every_row_a_landmark_is_the_exact_kernel():
    X, y = blobs(60, 3)
    head = SVMHead(**NYSTROEM, C=1.0, tol=1e-12, max_iter=50).fit(X, y)

    # The squared hinge on the exact kernel: coefficients are C · 2 · lack of margin.
    scores = head.logits(X)
    signs = np.where(y[:, None] == np.arange(3), 1, -1)
    alpha = 2 * signs * np.maximum(0, 1 - signs * scores)
    expected = rbf_kernel(X, X, head.gamma_) @ alpha + head.intercept_

    np.testing.assert_allclose(scores, expected, atol=1e-3)
    assert head.approximation_ == "nystroem"


def test_landmarks_come_close_to_the_exact_kernel(digits):
    X, y = digits
    exact = SVMHead(C=10.0).fit(X[:400], y[:400])

    few, again, others = (
        SVMHead(C=10.0, max_exact_rows=399, n_components=200, seed=seed).fit(X[:400], y[:400])
        for seed in (0, 0, 1)
    )

    assert few.support_vectors_.shape == (200, 64)
    assert few.score(X[400:], y[400:]) > exact.score(X[400:], y[400:]) - 0.05
    np.testing.assert_array_equal(few.logits(X), again.logits(X))
    assert not np.array_equal(few.support_vectors_, others.support_vectors_)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_models_come_back_from_arrays(kind, n_classes):
    X, y = blobs(40, n_classes)
    head = SVMHead(**KINDS[kind]).fit(X, y)

    back = SVMHead.from_arrays(head.get_params(), head.to_arrays())

    np.testing.assert_array_equal(back.logits(X), head.logits(X))
    assert back.approximation_ == head.approximation_ == ("nystroem" if kind == "nystroem" else "")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("rbf", {"n_support": np.array([2**63 - 1, 2**63 - 1, 42])}),
        ("rbf", {"n_support": np.array([40.0, 0.0, 0.0])}),
        ("rbf", {"n_support": np.array([1])}),
        ("rbf", {"n_support": np.zeros(0, int)}),
        ("rbf", {"dual_coef": np.zeros((3, 1))}),
        ("rbf", {"support_vectors": np.zeros((0, 6)), "dual_coef": np.zeros((2, 0))}),
        ("rbf", {"gamma": np.array(0.0)}),
        ("nystroem", {"intercept": np.zeros(1)}),
        ("nystroem", {"dual_coef": np.zeros((2, 40))}),
        ("nystroem", {"n_support": np.array([40, 0, 0])}),
    ],
)
def test_arrays_that_do_not_fit_are_refused(kind, change):
    X, y = blobs(40, 3)
    arrays = SVMHead(**KINDS[kind]).fit(X, y).to_arrays() | change

    with pytest.raises(CorruptStoreError, match=r"fit its 3 classes|of the model has shape"):
        SVMHead.from_arrays(KINDS[kind], arrays)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kernel": "poly"}, "kernel is 'poly', expected one of linear, rbf"),
        ({"loss": "log"}, "loss is 'log', expected one of squared_hinge, hinge"),
        ({"C": np.inf}, "C is inf, expected a number above 0"),
        ({"gamma": "auto"}, "gamma is 'auto', expected 'scale' or a number above 0"),
        ({"gamma": 0}, "gamma is 0, expected 'scale' or a number above 0"),
        ({"n_components": 0}, "n_components is 0, expected 1 or more"),
        ({"max_exact_rows": -1}, "max_exact_rows is -1, expected 0 or more"),
    ],
)
def test_parameters_out_of_range_are_named(params, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        SVMHead(**params).check_params()


def test_hinge_that_did_not_converge_says_so(digits):
    X, y = digits
    setting = {"kernel": "linear", "loss": "hinge", "C": 100.0, "max_iter": 2}

    head = SVMHead(**setting).fit(X, y)
    (result,) = SVMHead.try_settings(
        [setting], X, y, [Fold(np.arange(500), np.arange(500, 700))], n_classes=10
    )

    assert not head.converged_
    assert not result.converged
