"""The search for neighbours is exact, and one search answers for every k and metric."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pipeline.heads import neighbours as module
from pipeline.heads.neighbours import METRICS, VoteSetting, search, vote


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that tiny data has several of each kind."""
    monkeypatch.setattr(module, "_QUERY_ROWS", 7)
    monkeypatch.setattr(module, "_SAMPLE_ROWS", 16)
    monkeypatch.setattr(module, "_RECHECK_NUMBERS", 100)


def data(n_samples=60, n_queries=20, n_features=5, n_classes=3):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n_samples, n_features)).astype(np.float32) + 1
    queries = rng.normal(size=(n_queries, n_features)).astype(np.float32) + 1
    return X, rng.integers(0, n_classes, n_samples), queries


def by_hand(X, query, metric):
    """Distances in float64, one query."""
    X, query = X.astype(np.float64), query.astype(np.float64)
    if metric == "euclidean":
        return np.square(X - query).sum(axis=1)
    norms = np.linalg.norm(X, axis=1) * np.linalg.norm(query)
    return np.where(norms > 0, -(X @ query) / np.where(norms > 0, norms, 1), 0)


def naive(X, query, k, metric, allowed):
    order = sorted(np.flatnonzero(allowed), key=lambda i: (by_hand(X, query, metric)[i], i))
    return order[:k]


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_are_those_of_a_naive_search(metric):
    X, _, queries = data()

    found = search(X, queries, 9)[metric]

    everyone = np.ones(len(X), bool)
    expected = [naive(X, query, 9, metric, everyone) for query in queries]
    np.testing.assert_array_equal(found.index, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_similarities_are_those_of_float64(metric):
    X, _, queries = data()

    found = search(X, queries, 4)[metric]

    variance = np.square(X - X.mean(axis=0)).sum(axis=1).mean()
    scale = 2 * variance if metric == "euclidean" else 1
    distances = np.array([by_hand(X, query, metric) for query in queries])
    expected = -np.take_along_axis(distances, found.index, axis=1) / scale
    np.testing.assert_allclose(found.similarity, expected, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_a_sample_is_not_its_own_neighbour(metric):
    X, _, _ = data()

    found = search(X, None, 5)[metric]

    for i in range(len(X)):
        others = np.arange(len(X)) != i
        np.testing.assert_array_equal(found.index[i], naive(X, X[i], 5, metric, others))


@pytest.mark.parametrize("metric", METRICS)
def test_masked_samples_are_never_found(metric):
    X, _, queries = data()
    mask = np.random.default_rng(1).random(len(X)) < 0.5

    found = search(X, queries, 6, mask=mask)[metric]

    expected = [naive(X, query, 6, metric, mask) for query in queries]
    np.testing.assert_array_equal(found.index, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_a_smaller_k_is_the_start_of_a_larger(metric):
    X, _, queries = data()

    large, small = search(X, queries, 30)[metric], search(X, queries, 3)[metric]

    np.testing.assert_array_equal(large.index[:, :3], small.index)
    np.testing.assert_allclose(large.similarity[:, :3], small.similarity, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 4, 15])
def test_equal_votes_are_those_of_scikit_learn(metric, k):
    X, y, queries = data()

    (shares,) = vote(
        search(X, queries, 20), y, [VoteSetting(k, metric, temperature=None)], n_classes=3
    )

    theirs = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(X, y)
    spread = (theirs.predict_proba(queries) + 1 / (3 * k)) / (1 + 1 / k)
    np.testing.assert_allclose(shares, spread, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_warm_votes_are_those_of_the_formula(metric):
    X, y, queries = data()
    found = search(X, queries, 10)

    (shares,) = vote(found, y, [VoteSetting(6, metric, temperature=0.3)], n_classes=3)

    for i in range(len(queries)):
        weights = np.exp(found[metric].similarity[i, :6] / 0.3)
        votes = np.bincount(y[found[metric].index[i, :6]], weights / weights.sum(), 3) + 1 / 18
        np.testing.assert_allclose(shares[i], votes / votes.sum())


def test_a_weight_of_zero_takes_the_vote_away():
    X, y, queries = data()
    weights = (y != 1).astype(float)

    (shares,) = vote(
        search(X, queries, 10), y, [VoteSetting(10)], n_classes=3, sample_weight=weights
    )

    assert (shares[:, 1] <= shares.min(axis=1)).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_only_ratios_of_weights_count(temperature):
    X, y, queries = data()
    found, weights = search(X, queries, 10), np.random.default_rng(2).random(len(X))
    setting = [VoteSetting(10, temperature=temperature)]

    (plain,) = vote(found, y, setting, n_classes=3)
    (scaled,) = vote(found, y, setting, n_classes=3, sample_weight=np.full(len(X), 7.0))
    (light,) = vote(found, y, setting, n_classes=3, sample_weight=weights)
    (heavy,) = vote(found, y, setting, n_classes=3, sample_weight=9 * weights)

    np.testing.assert_allclose(scaled, plain, rtol=1e-12)
    np.testing.assert_allclose(heavy, light, rtol=1e-12)
    assert not np.allclose(light, plain)


def test_neighbours_without_weight_leave_all_classes_equal():
    X, y, queries = data()

    (shares,) = vote(
        search(X, queries, 5), y, [VoteSetting(5)], n_classes=3, sample_weight=np.zeros(len(X))
    )

    np.testing.assert_allclose(shares, 1 / 3)


def test_a_variance_that_is_given_scales_squared_distances():
    X, _, queries = data()

    measured, given = search(X, queries, 4), search(X, queries, 4, variance=0.5)

    ratio = given["euclidean"].similarity / measured["euclidean"].similarity
    np.testing.assert_allclose(ratio, ratio[0, 0])
    assert ratio[0, 0] > 1
    np.testing.assert_array_equal(given["cosine"].similarity, measured["cosine"].similarity)


# Degenerate input


@pytest.mark.parametrize("metric", METRICS)
def test_crowds_of_duplicates_are_ordered_by_index(metric):
    X = np.repeat(np.eye(3, dtype=np.float32) + 0.1, 30, axis=0)

    found = search(X, X[[0, 40]], 20)[metric]

    np.testing.assert_array_equal(found.index, [np.arange(20), np.arange(30, 50)])


@pytest.mark.parametrize("metric", METRICS)
def test_near_ties_far_from_the_origin_are_told_apart(metric):
    rng = np.random.default_rng(0)
    X = (1000 + 1e-2 * rng.normal(size=(50, 4))).astype(np.float32)

    found = search(X, X[:10], 5)[metric]

    everyone = np.ones(len(X), bool)
    expected = [naive(X, query, 5, metric, everyone) for query in X[:10]]
    np.testing.assert_array_equal(found.index, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_k_above_the_number_of_samples_asks_all(metric):
    X, y, queries = data(n_samples=4)

    found = search(X, queries, 50)
    (shares,) = vote(found, y, [VoteSetting(50, metric)], n_classes=3)

    assert found[metric].index.shape == (len(queries), 4)
    np.testing.assert_allclose(shares.sum(axis=1), 1)


def test_leaving_one_out_with_k_above_the_others_has_an_empty_place():
    X, y, _ = data(n_samples=4)

    found = search(X, None, 50)
    tables = list(vote(found, y, [VoteSetting(50, "cosine"), VoteSetting(50, "euclidean", None)],
                       n_classes=3))  # fmt: skip

    assert (found["cosine"].index[:, -1] == -1).all()
    assert all(np.isfinite(table).all() for table in tables)


class Scattered:
    """Samples in blocks whose order, within and among them, is not theirs."""

    def __init__(self, X, mean):
        self.X, self.mean, self.shape = torch.from_numpy(X), torch.from_numpy(mean), X.shape
        self.n_passes = 0

    def blocks(self, only=None):
        self.n_passes += 1
        seeded = torch.Generator().manual_seed(self.n_passes)
        numbers = torch.arange(len(self.X)) if only is None else only
        for part in torch.split(numbers[torch.randperm(len(numbers), generator=seeded)], 13):
            yield part, self.X[part]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shift", [0, 2])
def test_blocks_in_any_order_give_the_same(metric, shift):
    X, _, queries = data()
    # Duplicates and near ties: some have to be measured again, crowds searched again.
    X = np.concatenate([X, X[:30], X[:30] + np.float32(1e-7)])
    scattered = Scattered(X, X.mean(axis=0) + np.float32(shift))
    held = search(X, queries, 9, variance=2.0)[metric]

    found = search(scattered, queries, 9, metrics=[metric], variance=2.0)[metric]

    np.testing.assert_array_equal(found.index, held.index)
    np.testing.assert_allclose(found.similarity, held.similarity, atol=1e-5)
    assert scattered.n_passes <= 3


def test_crowds_in_blocks_are_searched_again():
    X = np.repeat(np.eye(3, dtype=np.float32) + 0.1, 30, axis=0)
    scattered = Scattered(X, X.mean(axis=0))

    found = search(scattered, X[[0, 40]], 20, metrics=["cosine"])["cosine"]

    np.testing.assert_array_equal(found.index, [np.arange(20), np.arange(30, 50)])
    assert scattered.n_passes == 3


def test_blocks_need_queries():
    X, _, _ = data()

    with pytest.raises(ValueError, match="queries is None, expected a matrix"):
        search(Scattered(X, X.mean(axis=0)), None, 3)


def test_zero_vectors_have_no_angle():
    X = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)

    found = search(X, np.array([[0, 0], [1, 0]], np.float32), 3, metrics=["cosine"])["cosine"]

    np.testing.assert_array_equal(found.index, [[0, 1, 2], [1, 0, 2]])
    np.testing.assert_allclose(found.similarity, [[0, 0, 0], [1, 0, -1]], atol=1e-12)


def test_constant_features_and_one_class_leave_finite_votes():
    X = np.full((20, 3), 5.0, np.float32)

    tables = list(
        vote(search(X, X[:3], 4), np.zeros(20, int),
             [VoteSetting(4, metric) for metric in METRICS], n_classes=1)
    )  # fmt: skip

    assert all((table == 1).all() for table in tables)


def test_what_is_not_finite_is_named():
    X, _, queries = data()
    X[[3, 8], 1] = np.nan

    with pytest.raises(ValueError, match=r"2 of 60 rows of X hold NaN .* first is row 3\)"):
        search(X, queries, 1)
    with pytest.raises(ValueError, match="2 of 60 rows of queries"):
        search(np.ones((2, 5), np.float32), X, 1)


def test_shapes_and_names_that_do_not_fit_are_refused():
    X, y, queries = data()

    with pytest.raises(ValueError, match="queries have 4 features, expected 5"):
        search(X, queries[:, :4], 1)
    with pytest.raises(ValueError, match="mask has shape"):
        search(X, queries, 1, mask=np.ones(3, bool))
    with pytest.raises(ValueError, match="1 of 1 samples may be found, expected at least 2"):
        search(X[:1], None, 1)
    with pytest.raises(ValueError, match="0 of 60 samples may be found"):
        search(X, queries, 1, mask=np.zeros(60, bool))
    with pytest.raises(ValueError, match="metric is 'hamming', expected one of cosine, euclidean"):
        search(X, queries, 1, metrics=["hamming"])
    with pytest.raises(ValueError, match="k is 0"):
        search(X, queries, 0)
    with pytest.raises(ValueError, match="searched for by cosine"):
        next(vote(search(X, queries, 1, metrics=["cosine"]), y, [VoteSetting(1, "euclidean")],
                  n_classes=3))  # fmt: skip
    with pytest.raises(ValueError, match="expected class indices from 0 to 1"):
        next(vote(search(X, queries, 1), y, [VoteSetting(1)], n_classes=2))
