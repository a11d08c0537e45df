"""Whether one classifier beats another on the same samples."""

import numpy as np
import pytest
from scipy.stats import binom

from pipeline.heads.paired import accuracy_difference, mcnemar


def right(*counts):
    """(both, only the first, only the second, neither) -> right_a, right_b."""
    both, a, b, neither = counts
    first = np.repeat([True, True, False, False], [both, a, b, neither])
    second = np.repeat([True, False, True, False], [both, a, b, neither])
    return first, second


def test_p_value_is_that_of_a_fair_coin():
    a, b = right(50, 9, 1, 40)

    assert mcnemar(a, b) == pytest.approx(2 * binom.cdf(1, 10, 0.5))
    assert mcnemar(a, b) == mcnemar(b, a)


def test_equal_classifiers_cannot_be_told_apart():
    a, b = right(10, 0, 0, 5)

    assert mcnemar(a, b) == 1.0
    assert accuracy_difference(a, b).value == 0


def test_samples_that_both_have_right_say_nothing_of_significance():
    few, many = right(10, 9, 1, 0), right(10_000, 9, 1, 0)

    assert mcnemar(*few) == mcnemar(*many)


def test_difference_holds_its_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        outcome = rng.choice(3, size=300, p=[0.15, 0.10, 0.75])
        found = accuracy_difference(outcome == 0, outcome == 1, seed=seed)
        held += found.low <= 0.05 <= found.high

    assert 0.9 < held / 200 < 0.99


def test_difference_changes_sign_with_its_sides():
    a, b = right(40, 20, 5, 35)

    forth, back = accuracy_difference(a, b), accuracy_difference(b, a)

    assert forth.value == -back.value == pytest.approx(0.15)
    assert 0 < forth.low < forth.value < forth.high
