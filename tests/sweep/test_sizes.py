"""Accuracy against the number of training samples."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.sweep.prepare import prepare
from pipeline.sweep.sizes import accuracy_by_size
from pipeline.sweep.trials import Candidate, Trial
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of


@pytest.fixture
def data(tmp_path):
    labels = cycle("abc", 300)
    features = {"penultimate": blobs(labels, n_features=20, noise=2.5)}
    return prepare(make_store(tmp_path / "s", features, {"label": labels}, splits_of(150, 0, 150)))


def best(head="ridge", **setting):
    return Trial(Candidate(head, ("penultimate",), "standardise", setting), 0.0)


def test_more_samples_help_and_the_last_point_is_all_of_them(data):
    points = accuracy_by_size(data, best(alpha=10.0), sizes=(1, 5, 20, 50, 500))

    assert [p.n_per_class for p in points] == [1, 5, 20, 50]
    assert [p.n_samples for p in points] == [3, 15, 60, 150]
    means = [np.mean(p.draws) for p in points]
    assert means[0] < means[2] < means[3] + 0.02
    assert [len(p.draws) for p in points] == [5, 5, 5, 1]


def test_draws_differ_and_are_repeatable(data):
    first, second = (accuracy_by_size(data, best(alpha=10.0), sizes=(3,)) for _ in range(2))

    assert first == second
    assert len(set(first[0].draws)) > 1
    told = first[0].to_dict()
    assert told["low"] < told["mean"] < told["high"]


def test_test_samples_are_never_fitted_on(data):
    wrong = data.codes.copy()
    wrong[150:] = (wrong[150:] + 1) % 3
    right = accuracy_by_size(data, best(alpha=1.0), sizes=(20,))
    shifted = accuracy_by_size(replace(data, codes=wrong), best(alpha=1.0), sizes=(20,))

    # The same predictions, scored against other labels.
    assert np.mean(right[0].draws) > 0.6
    assert np.mean(shifted[0].draws) < 0.3
