"""Held-out splits and limits: properties that must hold for any ids and labels."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.splits import stratified_limit, stratified_split
from pipeline.errors import UsageError

LABELS = st.one_of(st.none(), st.sampled_from(["a", "b", "c"]))
SAMPLES = st.dictionaries(st.text(max_size=8), LABELS, max_size=60)


def pick(mask, ids):
    return {id for id, is_in in zip(ids, mask, strict=True) if is_in}


@settings(deadline=None)
@given(SAMPLES, st.floats(0.01, 0.99), st.integers(0, 3))
def test_every_class_gives_its_share_but_never_all(samples, fraction, seed):
    ids, labels = list(samples), list(samples.values())

    held_out = pick(stratified_split(ids, labels, fraction, seed), ids)

    for label, n in Counter(labels).items():
        n_held_out = sum(samples[id] == label for id in held_out)
        if label is None or n == 1:
            assert n_held_out == 0
        else:
            assert n_held_out == min(max(round(n * fraction), 1), n - 1)


@settings(deadline=None)
@given(SAMPLES, st.floats(0.0, 0.99), st.integers(0, 3), st.randoms())
def test_a_split_does_not_depend_on_the_order(samples, fraction, seed, random):
    ids = list(samples)
    shuffled = random.sample(ids, len(ids))

    first = stratified_split(ids, [samples[id] for id in ids], fraction, seed)
    second = stratified_split(shuffled, [samples[id] for id in shuffled], fraction, seed)

    assert pick(first, ids) == pick(second, shuffled)


@settings(deadline=None)
@given(SAMPLES, st.floats(0.01, 0.99))
def test_a_class_is_split_whatever_other_classes_hold(samples, fraction):
    ids = list(samples)
    alone = [id for id in ids if samples[id] == "a"]

    among = pick(stratified_split(ids, list(samples.values()), fraction, 0), ids)

    assert among & set(alone) == pick(
        stratified_split(alone, ["a"] * len(alone), fraction, 0), alone
    )


def test_another_seed_holds_out_others():
    ids = [f"{i}.png" for i in range(100)]

    masks = [stratified_split(ids, ["a"] * 100, 0.2, seed) for seed in (0, 0, 1)]

    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_a_share_outside_of_its_range_is_refused(fraction):
    with pytest.raises(UsageError, match=f"is {fraction}; expected 0 <= share < 1"):
        stratified_split(["a"], ["x"], fraction, 0)


@settings(deadline=None)
@given(SAMPLES, st.integers(1, 60), st.integers(1, 60))
def test_a_smaller_limit_keeps_a_subset(samples, first, second):
    ids, labels = list(samples), list(samples.values())
    low, high = sorted((first, second))

    kept_low = pick(stratified_limit(ids, labels, low, 0), ids)
    kept_high = pick(stratified_limit(ids, labels, high, 0), ids)

    assert len(kept_low) == min(low, len(ids))
    assert kept_low <= kept_high


@settings(deadline=None)
@given(SAMPLES.filter(bool), st.integers(1, 60))
def test_a_limit_keeps_the_proportions_of_classes(samples, limit):
    ids, labels = list(samples), list(samples.values())

    kept = Counter(samples[id] for id in pick(stratified_limit(ids, labels, limit, 0), ids))

    share = min(1, limit / len(ids))
    for label, n in Counter(labels).items():
        assert abs(kept[label] - n * share) < 3
