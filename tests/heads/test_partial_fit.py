"""Samples in parts: ridge and prototypes are exact, a softmax layer goes on from part to part."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from pipeline.heads.linear import LinearHead
from pipeline.heads.prototype import PrototypeHead
from pipeline.heads.ridge import RidgeHead

EXACT = [
    RidgeHead(alpha=3.0),
    RidgeHead(alpha=0.1, class_weight={0: 2.0, 1: 0.5}),
    PrototypeHead(normalise="l2n"),
    PrototypeHead(normalise="none"),
]
ALL = [RidgeHead(), PrototypeHead(normalise="l2n"), LinearHead(lr=0.05, batch_size=16)]


def data(n_samples=120, n_features=6, n_classes=3):
    rng = np.random.default_rng(0)
    y = np.arange(n_samples) % n_classes
    return 1 + 0.8 * y[:, None] + rng.normal(size=(n_samples, n_features)), y


def in_parts(head, X, y, n_parts=4, weights=None):
    weights = np.ones(len(y)) if weights is None else weights
    for rows in np.array_split(np.arange(len(y)), n_parts):
        head.partial_fit(X[rows], y[rows], np.unique(y), sample_weight=weights[rows])
    return head


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [LinearHead(lr=0.1, epochs=20, batch_size=32)],
    expected_failed_checks=lambda _: {
        "check_sample_weight_equivalence_on_dense_data": (
            "steps of float32: repeated samples make other mini-batches"
        )
    },
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("head", EXACT, ids=str)
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("n_parts", [1, 4, 60])
def test_parts_give_the_fit_on_all(head, n_classes, n_parts):
    X, y = data(n_classes=n_classes)
    weights = np.random.default_rng(1).integers(1, 4, len(y)).astype(float)

    parts = in_parts(clone(head), X, y, n_parts, weights)

    whole = clone(head).fit(X, y, sample_weight=weights)
    np.testing.assert_allclose(parts.logits(X), whole.logits(X), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(parts.classes_, whole.classes_)


@pytest.mark.parametrize("head", EXACT, ids=str)
def test_parts_of_one_class_each_give_the_fit_on_all(head):
    X, y = data()
    order = np.argsort(y, kind="stable")

    parts = in_parts(clone(head), X[order], y[order], 3)

    np.testing.assert_allclose(parts.logits(X), clone(head).fit(X, y).logits(X), atol=1e-9)


@pytest.mark.parametrize("head", [RidgeHead(class_weight={1: 3.0}), *ALL], ids=str)
def test_weights_that_were_given_stay_as_they_are(head):
    X, y = data()
    weights = np.full(len(y), 2.0)

    clone(head).partial_fit(X, y, [0, 1, 2], sample_weight=weights)

    assert (weights == 2).all()


@pytest.mark.parametrize("head", EXACT, ids=str)
def test_class_that_has_not_come_yet_is_not_predicted(head):
    X, y = data()
    seen = y < 2

    early = clone(head).partial_fit(X[seen], y[seen], [0, 1, 2])

    assert set(early.predict(X)) == {0, 1}
    np.testing.assert_array_equal(early.predict(X), clone(head).fit(X[seen], y[seen]).predict(X))
    late = early.partial_fit(X[~seen], y[~seen])
    np.testing.assert_allclose(late.logits(X), clone(head).fit(X, y).logits(X), atol=1e-9)


def test_softmax_comes_near_the_fit_on_all():
    X, y = data(600)
    order = np.random.default_rng(0).permutation(len(y))
    head = LinearHead(lr=0.05, batch_size=16)

    for _ in range(10):
        in_parts(head, X[order], y[order])

    whole = LinearHead(lr=0.05, batch_size=16, epochs=10).fit(X, y)
    assert head.n_iter_ == 40
    assert head.score(X, y) == pytest.approx(whole.score(X, y), abs=0.02)


def test_softmax_goes_on_from_where_it_was():
    X, y = data()
    fitted = LinearHead(lr=0.05, epochs=30).fit(X, y)
    before = fitted.weight_.copy()

    fitted.set_params(lr=1e-4).partial_fit(X, y)

    moved = np.abs(fitted.weight_ - before).max()
    assert 0 < moved < 0.01
    assert fitted.set_params(lr=0.05).fit(X, y).weight_ == pytest.approx(before)


@pytest.mark.parametrize("head", ALL, ids=str)
def test_a_pickle_goes_on_as_the_head_does(head):
    X, y = data()
    here = in_parts(clone(head), X, y)
    there = pickle.loads(pickle.dumps(here))

    for one in (here, there):
        one.partial_fit(X[:50], y[:50])

    np.testing.assert_array_equal(here.logits(X), there.logits(X))


@pytest.mark.parametrize("head", ALL, ids=str)
def test_parts_that_do_not_fit_are_refused(head):
    X, y = data()

    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        clone(head).partial_fit(X, y)
    with pytest.raises(ValueError, match="needs at least 2 classes, but there is only one: 1"):
        clone(head).partial_fit(X, y, classes=[1, 1])
    with pytest.raises(ValueError, match=r"y holds .*2.*none of the 2 classes that partial_fit"):
        clone(head).partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="not the same as on last call"):
        in_parts(clone(head), X, y).partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match=r"holds -1\.0, expected 0 or more"):
        clone(head).partial_fit(X, y, [0, 1, 2], sample_weight=-np.ones(len(y)))


@pytest.mark.parametrize("cls", [RidgeHead, LinearHead])
def test_balanced_classes_cannot_be_had_in_parts(cls):
    with pytest.raises(AttributeError) as caught:
        cls(class_weight="balanced").partial_fit(*data(), classes=[0, 1, 2])

    assert "class_weight is 'balanced', but parts do not tell" in str(caught.value.__cause__)


def test_prototypes_off_the_mean_of_all_cannot_be_had_in_parts():
    assert not hasattr(PrototypeHead(), "partial_fit")
    with pytest.raises(AttributeError) as caught:
        PrototypeHead().partial_fit(*data(), classes=[0, 1, 2])

    assert "normalise is 'cl2n', which takes the mean" in str(caught.value.__cause__)


@pytest.mark.parametrize("head", [RidgeHead(), PrototypeHead(normalise="l2n")], ids=str)
def test_what_fit_found_is_not_forgotten_in_silence(head):
    X, y = data()
    head = clone(head).fit(X, y)
    loaded = type(head).from_arrays(head.get_params(), head.to_arrays())

    for one in (head, loaded):
        with pytest.raises(AttributeError) as caught:
            one.partial_fit(X, y)
        assert "begin with partial_fit on a clone of it" in str(caught.value.__cause__)
    assert hasattr(clone(head), "partial_fit")


def test_learning_rate_that_is_too_large_is_named():
    X, y = data()

    with pytest.raises(ArithmeticError, match=r"try a learning rate below 1e\+38"):
        in_parts(LinearHead(lr=1e38), X, y)
