"""Stored views of a sample: who learns from them, and who does not."""

import numpy as np
import pytest

from pipeline.errors import ResourceError
from pipeline.heads.linear import LinearHead
from pipeline.heads.scaling import fit_scaler
from pipeline.sweep.fit import fit_head
from pipeline.sweep.prepare import plan
from pipeline.sweep.stream import in_memory_bytes
from pipeline.sweep.sweep import Plan, sweep
from tests.heads.toy_stores import make_store

N_VIEWS = 3


@pytest.fixture(scope="module")
def toys():
    """(n, N_VIEWS, 6) features of three classes; views differ by more than classes do."""
    rng = np.random.default_rng(0)
    y = np.arange(240) % 3
    plain = rng.standard_normal((240, 6)) + 1.5 * np.eye(3, 6)[y]
    others = plain[:, None] + 2 * rng.standard_normal((240, N_VIEWS - 1, 6))
    views = np.concatenate([plain[:, None], others], axis=1).astype(np.float16)
    splits = np.where(np.arange(240) < 150, "train", "val")
    splits[200:] = "test"
    return views, y, splits


@pytest.fixture(scope="module")
def stores(toys, tmp_path_factory):
    views, y, splits = toys
    folder = tmp_path_factory.mktemp("stores")
    labels = {"label": [f"class {k}" for k in y]}
    several = make_store(
        folder / "several", {"penultimate": views}, labels, splits, n_views=N_VIEWS
    )
    plain = make_store(folder / "plain", {"penultimate": views[:, 0]}, labels, splits)
    return several, plain


def settings(lr=0.01):
    return [{"lr": lr, "epochs": 5}]


def test_a_gradient_head_learns_from_all_views_and_is_scored_on_the_plain_one(toys, stores):
    views, y, splits = toys
    scaler = fit_scaler(views[splits == "train", 0].astype(np.float32), "standardise")
    known, test = splits != "test", splits == "test"
    expected = LinearHead(lr=0.01, epochs=5, seed=0)
    expected.fit_views(scaler(views[known].astype(np.float32)), y[known])

    run = fit_head(stores[0], head="linear", settings=settings())

    np.testing.assert_allclose(run.model.head.weight_, expected.weight_, atol=1e-6)
    predicted = expected.predict(scaler(views[test, 0].astype(np.float32)))
    assert run.metrics["top1"].value == np.mean(predicted == y[test])
    assert "Learned from all 3 stored views of each sample, scored on the plain one." in run.notes


@pytest.mark.parametrize("head", ["logreg", "knn", "prototype"])
def test_other_heads_see_the_plain_view_alone(stores, head):
    several, plain = (fit_head(store, head=head) for store in stores)

    assert several.metrics_dict() == plain.metrics_dict()
    assert not any("view" in note for note in several.notes)


def test_views_choose_a_setting_as_they_are_learned_from(stores):
    tried = [*settings(1e-5), *settings(0.01)]

    several, plain = (fit_head(store, head="linear", settings=tried) for store in stores)

    assert several.best.setting["lr"] == plain.best.setting["lr"] == 0.01
    assert several.best.scores != plain.best.scores


def test_a_sweep_with_views_scores_as_one_fit_does(stores):
    alone = fit_head(stores[0], head="mlp")

    found = sweep(stores[0], Plan(("mlp",), grid="quick"))

    assert found.results[0].run.metrics_dict() == alone.metrics_dict()


def test_views_count_in_what_a_fit_takes(stores, monkeypatch):
    monkeypatch.setattr("pipeline.sweep.stream.resident_bytes", lambda: 0.0)
    several, plain = (plan(store) for store in stores)
    one = 4.0 * 6  # bytes of a view

    def more(head, n_outputs=None):
        return np.diff(
            [in_memory_bytes(data, head, [{}], n_outputs) for data in (plain, several)]
        ).item()

    # Read beside the plain one; of train and val, raw and scaled.
    assert more("mlp") == more("linear") == one * (240 * N_VIEWS + 2 * 200 * (N_VIEWS - 1))
    assert more("logreg") == more("mlp", n_outputs=5) == 0


def test_views_that_do_not_fit_into_memory_are_refused(stores, monkeypatch):
    monkeypatch.setattr("pipeline.heads.features.available_bytes", lambda: 4.0 * 240 * 6 * 2)

    assert fit_head(stores[0]).metrics
    with pytest.raises(ResourceError, match="240 samples of 3 views of 6 features need"):
        fit_head(stores[0], head="linear", settings=settings())


def test_views_that_not_all_stores_have_are_left_out_and_it_is_said(toys, stores, tmp_path):
    views, y, splits = toys
    labels = {"label": [f"class {k}" for k in y]}
    other = make_store(
        tmp_path / "o", {"penultimate": views[:, 1]}, labels, splits, backbone="other"
    )

    run = fit_head([stores[0], other], head="linear", settings=settings())

    assert "Learned from the plain view alone: the stores hold 3 and 1 views a sample." in run.notes


def test_l2_gives_every_view_length_one(stores):
    run = fit_head(stores[0], head="linear", scaling="l2", settings=settings())
    X = np.ones((2, N_VIEWS, 6), np.float32) * np.arange(1, 4)[None, :, None]

    np.testing.assert_allclose(np.linalg.norm(run.model.scaler(X), axis=2), 1, rtol=1e-6)
