"""Which samples fit and which choose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, TooFewSamplesError
from pipeline.heads import describe_setting
from pipeline.sweep.grids import QUICK, edge_note
from pipeline.sweep.protocol import plan_protocol
from tests.heads.toy_stores import cycle, splits_of


def plan(labels, splits, seed=0):
    ids = np.array([f"{i}.png" for i in range(len(labels))], dtype=object)
    return plan_protocol(ids, np.array(labels, dtype=object), np.array(splits), seed=seed)


def test_given_val_split_chooses():
    protocol = plan(cycle("ab", 30), splits_of(10, 8, 12))

    assert protocol.kind == "val"
    assert protocol.chosen_by == "val (given, 8 samples)"
    assert protocol.folds[0].fit.tolist() == list(range(10))
    assert protocol.folds[0].choose.tolist() == list(range(10, 18))
    assert protocol.refit.tolist() == list(range(18))
    assert protocol.test.tolist() == list(range(18, 30))


def test_small_train_is_folded():
    protocol = plan(cycle("abc", 60), splits_of(45, 0, 15))

    assert protocol.chosen_by == "5 stratified folds of train (45 samples)"
    chosen = np.concatenate([fold.choose for fold in protocol.folds])
    assert sorted(chosen) == list(range(45))
    for fold in protocol.folds:
        assert not set(fold.fit) & set(fold.choose)
        labels = np.array(cycle("abc", 60))[fold.choose]
        assert np.unique(labels, return_counts=True)[1].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("n_train", "n_held_out"), [(2000, 400), (50_000, 10_000), (50_010, 5_000)]
)
def test_large_train_lends_a_part(n_train, n_held_out):
    protocol = plan(cycle("abcde", n_train), splits_of(n_train))

    (fold,) = protocol.folds
    assert protocol.kind == "holdout"
    assert len(fold.choose) == pytest.approx(n_held_out, abs=5)
    assert sorted([*fold.fit, *fold.choose]) == list(range(n_train))
    assert f"{len(fold.choose):,} samples" in protocol.chosen_by


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["train", "val", "test"]))),
    st.integers(0, 3),
)
def test_no_plan_lets_test_in_or_the_choosing_samples_fit(samples, seed):
    labels, splits = [label for label, _ in samples], [split for _, split in samples]
    try:
        protocol = plan(labels, splits, seed)
    except DataError:
        train = {label for label, split in samples if split == "train"}
        assert len(train) < 2
        return

    test = {i for i, split in enumerate(splits) if split == "test"}
    assert set(protocol.test) == test
    assert not test & set(protocol.refit)
    for fold in protocol.folds:
        assert not (set(fold.fit) | set(fold.choose)) & test
        assert not set(fold.fit) & set(fold.choose)
        assert len({labels[i] for i in fold.fit}) > 1


def test_folds_depend_on_ids_and_not_on_the_order():
    ids = np.array([f"{i}.png" for i in range(40)], dtype=object)
    labels = np.array(cycle("ab", 40), dtype=object)
    splits = np.full(40, "train")
    order = np.random.default_rng(0).permutation(40)

    first = plan_protocol(ids, labels, splits, seed=0)
    second = plan_protocol(ids[order], labels[order], splits, seed=0)
    other = plan_protocol(ids, labels, splits, seed=1)

    parts = [
        [set(names[fold.choose]) for fold in protocol.folds]
        for names, protocol in ((ids, first), (ids[order], second), (ids, other))
    ]
    assert parts[0] == parts[1]
    assert parts[0] != parts[2]


def test_one_sample_a_class_leaves_nobody_to_choose():
    protocol = plan(list("abc"), splits_of(3))

    assert protocol.kind == "none"
    assert protocol.folds == ()
    assert protocol.chosen_by == "nothing (no class has a sample to spare)"


def test_class_of_one_sample_beside_others_is_no_obstacle():
    protocol = plan([*cycle("ab", 20), "rare"], splits_of(21))

    assert len(protocol.folds) == 5


def test_one_class_only_is_refused():
    with pytest.raises(TooFewSamplesError, match=r"All 4 training samples.*'a'[^$]*--label"):
        plan(["a"] * 4 + ["b"], splits_of(4, n_test=1))


def test_no_train_split_is_refused():
    with pytest.raises(DataError, match="belongs to the train split; splits found: test, val"):
        plan(cycle("ab", 4), splits_of(0, 2, 2))


@pytest.mark.parametrize("name", QUICK)
def test_default_grids_are_small_and_valid(name):
    from pipeline.heads import make_head

    assert len(QUICK[name]) <= 8
    for setting in QUICK[name]:
        make_head(name, **setting).check_params()


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("logreg", {"C": 1e-4}, "C = 0.0001 is the smallest that was tried."),
        ("logreg", {"C": 10.0}, "C = 10 is the largest that was tried."),
        ("logreg", {"C": 0.1}, None),
        ("svm", {"kernel": "linear", "C": 1e-2}, "C = 0.01 is the largest that was tried."),
        ("svm", {"kernel": "rbf", "C": 1.0}, None),
        ("knn", {"k": 100}, "k = 100 is the largest that was tried."),
        ("knn", {"k": 1}, None),
        ("prototype", {}, None),
    ],
)
def test_edge_of_the_grid_is_told(name, chosen, expected):
    note = edge_note(chosen, QUICK[name])

    assert note is None if expected is None else note.endswith(expected)


def test_settings_read_well():
    assert describe_setting({"kernel": "rbf", "C": 10.0, "seed": 3}) == "kernel=rbf, C=10"
    assert describe_setting({}) == "nothing to choose"
