"""Heads agree with scikit-learn, learn digits, and come back from arrays as they were."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from pipeline.errors import CorruptStoreError, StoreFormatError, UnknownNameError, UsageError
from pipeline.heads import HEADS, head_class, make_head

QUICK = {"linear": {"epochs": 30, "lr": 0.05}, "mlp": {"epochs": 40, "hidden": 64, "lr": 0.01}}
LINEAR_SVM = ("svm", {"kernel": "linear", "C": 0.01})
EVERY = [(name, QUICK.get(name, {})) for name in HEADS] + [LINEAR_SVM]


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X = (X / 16 - 0.3).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(X))
    return X[order[:600]], y[order[:600]], X[order[600:1200]], y[order[600:1200]]


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_heads_learn_digits(name, params, digits):
    X, y, X_test, y_test = digits

    head = make_head(name, **params).fit(X, y)

    assert head.score(X_test, y_test) > 0.85
    assert head.converged_
    assert head.logits(X_test).dtype in (np.float32, np.float64)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(("name", "params"), EVERY)
def test_heads_come_back_from_arrays_bit_for_bit(name, params, binary, digits):
    X, y, X_test, _ = digits
    y = np.array([f"dígit {label % 2 if binary else label}" for label in y])
    head = make_head(name, **params).fit(X, y)

    arrays = head.to_arrays()
    back = head_class(name).from_arrays(head.get_params(), arrays)

    assert all(array.dtype.kind in "fiu" for array in arrays.values())
    np.testing.assert_array_equal(back.logits(X_test), head.logits(X_test))
    np.testing.assert_array_equal(back.predict(X_test), head.predict(X_test))


@pytest.mark.parametrize("n_classes", [2, 10])
@pytest.mark.parametrize("C", [0.01, 1.0])
def test_logistic_agrees_with_scikit_learn(n_classes, C, digits):
    X, y, X_test, _ = digits
    y = y % n_classes

    ours = make_head("logreg", C=C, tol=1e-6).fit(X, y).predict_proba(X_test)
    theirs = LogisticRegression(C=C, tol=1e-8, max_iter=5000).fit(X.astype(float), y)

    np.testing.assert_allclose(ours, theirs.predict_proba(X_test), atol=2e-3)


def test_linear_svm_agrees_with_scikit_learn(digits):
    X, y, X_test, _y_test = digits

    ours = make_head("svm", kernel="linear", C=0.1).fit(X, y)
    theirs = LinearSVC(C=0.1, tol=1e-6, max_iter=100_000, intercept_scaling=100).fit(X, y)

    assert np.mean(ours.predict(X_test) == theirs.predict(X_test)) > 0.99


def test_heads_keep_float32(digits):
    X, y, X_test, _ = digits

    for name in ("logreg", "ridge", "prototype"):
        assert make_head(name).fit(X, y).logits(X_test).dtype == np.float32


def test_unfinished_solver_says_so(digits):
    X, y, *_ = digits

    assert not make_head("logreg", C=100.0, max_iter=3).fit(X, y).converged_
    assert not make_head("svm", kernel="linear", C=100.0, max_iter=3).fit(X, y).converged_


def test_training_that_blows_up_fails(digits):
    X, y, *_ = digits

    with pytest.raises(ArithmeticError, match=r"not finite in epoch \d+: try a learning rate"):
        make_head("linear", lr=1e37).fit(X, y)


def test_early_stopping_runs_fewer_epochs(digits):
    X, y, X_test, y_test = digits

    head = make_head("mlp", hidden=64, epochs=500, early_stopping=True, lr=0.01).fit(X, y)

    assert head.n_iter_ < 500
    assert head.score(X_test, y_test) > 0.85


def test_same_seed_same_network_and_the_global_generator_is_left_alone(digits):
    import torch

    X, y, X_test, _ = digits
    torch.manual_seed(3)
    before = torch.get_rng_state()

    first, second = (make_head("mlp", hidden=16, epochs=2, seed=1).fit(X, y) for _ in range(2))

    np.testing.assert_array_equal(first.logits(X_test), second.logits(X_test))
    assert torch.equal(before, torch.get_rng_state())


def test_nearest_neighbours_ask_all_where_there_are_fewer():
    X = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])

    head = make_head("knn", k=50).fit(X, [0, 1, 1])

    assert head.k_ == 3
    np.testing.assert_array_equal(head.predict(X), [0, 1, 1])


def test_nearest_neighbours_leave_no_class_impossible():
    X = np.eye(4)

    probabilities = make_head("knn", k=1).fit(X, [0, 1, 2, 3]).predict_proba(X)

    assert probabilities.min() > 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


@pytest.mark.parametrize("name", ["knn", "prototype"])
def test_zero_rows_are_no_nan(name):
    X = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])

    head = make_head(name).fit(X, [0, 0, 1, 1])

    assert np.isfinite(head.logits(X)).all()


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_fewer_samples_than_features_or_classes(name, params):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(6, 50)).astype(np.float32)
    X[:, 0] = 3.0  # a constant feature

    head = make_head(name, **params).fit(X, np.arange(6))

    assert np.isfinite(head.logits(X)).all()
    assert len(head.classes_) == 6


def test_unknown_head_offers_close_ones():
    with pytest.raises(UnknownNameError, match=r"Unknown head 'logrge'.\n  Did you mean: logreg"):
        make_head("logrge")


def test_unknown_parameter_is_named():
    with pytest.raises(UsageError, match=r"'ridge' has no parameter 'C'. It has: alpha, class_w"):
        make_head("ridge", C=1)


def test_the_registry_imports_nothing_heavy():
    code = (
        "import sys, pipeline.heads, pipeline.sweep, pipeline.runs, pipeline.commands.fit_head\n"
        "print(*({'torch', 'sklearn', 'scipy', 'numpy', 'h5py'} & set(sys.modules)))"
    )

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == ""


def svm_arrays():
    head = make_head("svm").fit(np.eye(6, dtype=np.float32), [0, 0, 1, 1, 2, 2])
    return head.to_arrays()


def knn_arrays():
    return make_head("knn", k=1).fit(np.eye(4, dtype=np.float32), [0, 0, 1, 1]).to_arrays()


def logistic_arrays():
    return make_head("logreg").fit(np.eye(4, dtype=np.float32), [0, 0, 1, 2]).to_arrays()


@pytest.mark.parametrize(
    ("name", "arrays", "change", "message"),
    [
        ("logreg", logistic_arrays, {"coef": None}, "no array 'coef'; it holds: classes, interc"),
        ("logreg", logistic_arrays, {"coef": np.zeros((2, 4))}, r"shape \(2, 4\), expected \(out"),
        ("logreg", logistic_arrays, {"coef": np.zeros(4)}, "'coef' of the model has shape"),
        ("logreg", logistic_arrays, {"intercept": np.full(3, np.nan)}, "NaN or infinity"),
        ("logreg", logistic_arrays, {"coef": np.zeros((3, 4), bool)}, "holds bool, not numbers"),
        ("logreg", logistic_arrays, {"classes": None}, "does not say which classes"),
        ("logreg", logistic_arrays, {"classes": np.zeros(3, int)}, "3 classes, expected 2 or more"),
        (
            "logreg",
            logistic_arrays,
            {"classes": None, "classes_text": np.full((3, 2), 2**31, np.uint32)},
            "does not hold text",
        ),
        ("svm", svm_arrays, {"n_support": np.array([9, 0, 0])}, "do not fit its 3 classes"),
        ("svm", svm_arrays, {"intercept": np.zeros(2)}, "do not fit its 3 classes"),
        ("svm", svm_arrays, {"gamma": np.array(-1.0)}, "do not fit its 3 classes"),
        ("knn", knn_arrays, {"index": np.array([0, 1, 7, 0])}, "name class 7, but it has 2"),
        ("knn", knn_arrays, {"index": np.array([0, 1, -1, 0])}, "name class"),
        ("knn", knn_arrays, {"index": np.zeros(4)}, "not integers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name, arrays, change, message):
    made = arrays() | change

    with pytest.raises(CorruptStoreError, match=message):
        head_class(name).from_arrays({}, {k: v for k, v in made.items() if v is not None})


@pytest.mark.parametrize(
    ("name", "params", "error"),
    [
        ("logreg", {"solver": "saga"}, StoreFormatError),
        ("logreg", {"C": -1.0}, CorruptStoreError),
        ("logreg", {"C": "much"}, CorruptStoreError),
        ("svm", {"kernel": "poly"}, CorruptStoreError),
        ("knn", {"metric": "hamming"}, CorruptStoreError),
        ("knn", {"k": 0}, CorruptStoreError),
    ],
)
def test_parameters_that_are_none_of_ours_are_refused(name, params, error):
    with pytest.raises(error):
        head_class(name).from_arrays(params, logistic_arrays())
