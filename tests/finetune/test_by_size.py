"""Fewer training samples, at a bounded cost."""

import numpy as np
import pytest

from pipeline.data.samples import DataSource, Sample
from pipeline.finetune.by_size import MAX_DRAWS, MAX_SHARE, Curve, joined, plan_few, point_of_all
from pipeline.sweep.prepare import plan
from pipeline.sweep.sizes import SizePoint
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of


@pytest.fixture
def data(tmp_path):
    labels = cycle("abc", 480)
    features = {"penultimate": blobs(labels)}
    return plan(make_store(tmp_path / "s", features, {"label": labels}, splits_of(300, 60, 120)))


def test_trainings_together_see_a_stated_share_of_the_images(data):
    planned = plan_few(data, batch_size=32, epochs=20)

    assert [(few.n_per_class, few.draw) for few in planned] == [
        *[(2, 0), (10, 0), (2, 1), (10, 1), (2, 2), (10, 2)]
    ]
    assert max(few.draw for few in planned) < MAX_DRAWS
    # Of 360 images to train on and 120 to score, each of which costs half as much.
    assert cost(planned, 20) <= MAX_SHARE * (20 * 360 + 60)
    assert sum(few.share for few in planned) == pytest.approx(1)
    assert planned[1].share / planned[0].share == pytest.approx(660 / 180)
    # Steps enough to learn something, though samples are few.
    assert [len(few.ids) // few.batch_size for few in planned[:2]] == [6, 5]


def cost(planned, epochs):
    return sum(epochs * len(few.ids) + 60 for few in planned)


@pytest.mark.parametrize(("epochs", "n_most"), [(1, 2), (3, 5)])
def test_scoring_test_again_and_again_counts(data, epochs, n_most):
    planned = plan_few(data, batch_size=32, epochs=epochs)

    assert 0 < len(planned) <= n_most
    assert cost(planned, epochs) <= MAX_SHARE * (epochs * 360 + 60)


def test_the_point_of_all_samples_leaves_out_those_that_chose(data):
    assert point_of_all(data, 288, 0.9) == SizePoint(96, 288, (0.9,))


def test_larger_draws_hold_smaller_ones_and_test_samples_are_in_none(data):
    small, large, other, *_ = plan_few(data, batch_size=32, epochs=20)
    test = set(data.inputs.ids[data.protocol.test])

    assert small.ids < large.ids
    assert small.ids != other.ids
    assert not test & large.ids
    labels = data.inputs.labels[np.isin(data.inputs.ids, sorted(large.ids))]
    assert sorted(np.unique(labels, return_counts=True)[1]) == [10, 10, 10]


def test_the_source_has_these_samples_and_the_whole_test_split(data, tmp_path):
    samples = [
        Sample(str(name), f"{name}", (str(label),), str(split))
        for name, label, split in zip(
            data.inputs.ids, data.inputs.labels, data.inputs.splits, strict=True
        )
    ]
    source = DataSource("toys", "toys/", tmp_path, "classes", samples, ("label",), "made: by hash")
    few = plan_few(data, batch_size=32, epochs=20)[0]

    found = few.source(source, data)

    splits = {sample.id: sample.split for sample in found.samples}
    assert {name for name, split in splits.items() if split == "train"} == few.ids
    assert list(splits.values()).count("test") == 120
    assert len(splits) == 126
    assert found.split_origin == "given"


def test_without_a_test_split_nothing_is_planned(tmp_path):
    labels = cycle("ab", 60)
    store = make_store(
        tmp_path / "s", {"penultimate": blobs(labels)}, {"label": labels}, splits_of(40, 20, 0)
    )

    assert plan_few(plan(store), batch_size=8, epochs=20) == []


def test_parts_of_a_curve_are_put_together_and_kept():
    parts = [
        Curve("full", "fits", (SizePoint(10, 30, (0.5,)),), 1, 2.0),
        Curve("ridge", "fits", (SizePoint(1, 3, (0.2, 0.4)),), 2, 1.0),
        Curve("full", "fits", (SizePoint(2, 6, (0.3,)),), 1, 1.0),
        Curve("full", "fits", (SizePoint(10, 30, (0.7,)),), 1, 2.5),
    ]

    full, ridge = joined(parts)

    assert full == Curve(
        "full", "fits", (SizePoint(2, 6, (0.3,)), SizePoint(10, 30, (0.5, 0.7))), 3, 5.5
    )
    assert ridge == parts[1]
    assert Curve.from_dict(full.to_dict()) == full
    one, two = full.to_dict()["points"]
    assert two["mean"] == pytest.approx(0.6)
    assert (one["mean"], one["low"], one["high"]) == (pytest.approx(0.3), None, None)
