"""Fitting a head from stores: what chose, what scored, and what is said about it."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipeline.errors import TlpipeError, TooFewSamplesError, UnknownNameError
from pipeline.heads import HEADS
from pipeline.heads.logistic import LogisticHead
from pipeline.sweep.fit import fit_head
from pipeline.sweep.trials import described
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of

QUICK = {"linear": [{"epochs": 5, "lr": 0.1}], "mlp": [{"epochs": 40, "hidden": 16, "lr": 0.03}]}


def store_of(folder, labels, splits, *, n_features=8, noise=0.5, **options):
    names = [label or "none" for label in labels]
    features = {"penultimate": blobs(names, n_features=n_features, noise=noise)}
    return make_store(folder, features, {"label": labels}, splits, **options)


@pytest.fixture
def store(tmp_path):
    """60 training samples and 30 to test, of three classes that overlap a little."""
    return store_of(tmp_path / "s", cycle("abc", 90), splits_of(60, 0, 30), noise=1.0)


def test_raw_digits(tmp_path):
    X, y = load_digits(return_X_y=True)
    splits = cycle(["train", "train", "train", "test"], len(X))
    labels = [str(label) for label in y]
    made = make_store(tmp_path / "digits", {"penultimate": X}, {"label": labels}, splits)

    run = fit_head(made)

    assert run.metrics["top1"].value >= 0.94
    assert run.metrics["top1"].low > 0.9
    assert run.converged
    assert run.seconds["total"] < 60
    assert run.chosen_by.startswith("5 stratified folds of train (1,348")


@pytest.mark.parametrize("head", HEADS)
def test_every_head_fits(head, store):
    run = fit_head(store, head=head, settings=QUICK.get(head))

    assert run.scored_on == "test"
    assert set(run.scores) == {"test", "val"}
    assert run.metrics["top1"].value > 0.6
    assert run.metrics["ece"].value < 0.35
    assert len(run.predictions.ids) == 30
    assert (run.model.temperature != 1.0) == HEADS[head].calibrated
    json.dumps(run.to_dict(), allow_nan=False)


def test_predictions_are_those_of_the_model(store):
    run = fit_head(store, head="ridge")
    X = np.asarray(store.features("test"))

    assert run.predictions.ids.tolist() == store.ids("test")
    assert run.predictions.labels.tolist() == store.labels(split="test").tolist()
    assert run.predictions.predicted.tolist() == run.model.predict(X)
    right = np.mean(run.predictions.predicted == run.predictions.labels)
    assert run.metrics["top1"].value == pytest.approx(right)
    assert np.trace(run.confusion) == round(30 * right)
    np.testing.assert_allclose(run.predictions.probability, run.model.predict_proba(X).max(axis=1))


def test_test_split_changes_neither_choice_nor_model(tmp_path, store):
    labels = [*cycle("abc", 60), *cycle("bca", 30)]
    features = blobs(cycle("abc", 90), noise=1.0)
    features[60:] = 60
    other = make_store(
        tmp_path / "o", {"penultimate": features}, {"label": labels}, splits_of(60, 0, 30)
    )

    first, second = fit_head(store), fit_head(other)

    assert first.best.setting == second.best.setting
    np.testing.assert_array_equal(first.model.head.coef_, second.model.head.coef_)
    assert first.scores["val"] == second.scores["val"]
    assert first.metrics["top1"].value > second.metrics["top1"].value


def test_given_val_chooses_and_is_then_fitted_but_does_not_scale(tmp_path):
    labels = cycle("abc", 90)
    made = store_of(tmp_path / "s", labels, splits_of(45, 21, 24))
    train = np.asarray(made.features("train"), dtype=np.float64)

    run = fit_head(made, head="knn")

    assert run.chosen_by == "val (given, 21 samples)"
    assert len(run.model.head.index_) == 45 + 21
    scaled = fit_head(made, head="logreg")
    np.testing.assert_allclose(scaled.model.scaler.mean, train.mean(axis=0), rtol=1e-6)


def test_without_test_split_validation_scores_and_it_is_said(tmp_path):
    made = store_of(tmp_path / "s", cycle("abc", 60), splits_of(40, 20))

    run = fit_head(made)

    assert run.scored_on == "val"
    assert set(run.predictions.splits) == {"val"}
    assert any(
        note.startswith("Warning: there is no test split. The scores are of the samples that chose")
        for note in run.notes
    )


def test_out_of_fold_scores_where_there_is_train_only(tmp_path):
    run = fit_head(store_of(tmp_path / "s", cycle("abc", 60), [""] * 60))

    assert run.scored_on == "val"
    assert len(run.predictions.ids) == 60
    assert set(run.predictions.splits) == {"train"}


def test_one_sample_a_class_is_fitted_unseen(tmp_path):
    made = store_of(tmp_path / "s", cycle("abc", 33), splits_of(3, 0, 30))

    run = fit_head(made, head="prototype")

    assert run.chosen_by.startswith("nothing")
    assert run.metrics["top1"].value > 0.6
    assert run.notes == [
        "No sample could be held out to choose a setting: nothing to choose was taken unseen, "
        "without a temperature."
    ]


def test_nothing_to_score_is_said(tmp_path):
    run = fit_head(store_of(tmp_path / "s", list("abc"), splits_of(3)))

    assert run.metrics == {}
    assert run.scored_on == ""
    assert any("nothing was scored" in note for note in run.notes)
    json.dumps(run.to_dict(), allow_nan=False)


def test_class_that_train_lacks_counts_as_errors(tmp_path):
    labels = [*cycle("ab", 40), *cycle("abz", 30)]
    made = store_of(tmp_path / "s", labels, splits_of(40, 0, 30), noise=0.01)

    run = fit_head(made)

    assert run.classes == ("a", "b")
    assert run.score_classes == ("a", "b", "z")
    assert run.metrics["top1"].value == pytest.approx(20 / 30)
    assert run.metrics["mean_per_class_accuracy"].value == pytest.approx(2 / 3)
    assert (
        "10 test samples of 1 class that train does not have ('z'): counted as errors." in run.notes
    )


def test_class_that_test_lacks_is_no_obstacle(tmp_path):
    labels = [*cycle("abc", 60), *cycle("ab", 20)]

    run = fit_head(store_of(tmp_path / "s", labels, splits_of(60, 0, 20)))

    assert run.classes == ("a", "b", "c")
    assert run.metrics["mean_per_class_accuracy"].value > 0.5


def test_class_that_only_val_has_is_learned_in_the_end(tmp_path):
    labels = [*cycle("ab", 40), *cycle("abz", 30), *cycle("abz", 30)]
    made = store_of(tmp_path / "s", labels, splits_of(40, 30, 30), noise=0.1)

    run = fit_head(made)

    assert run.classes == ("a", "b", "z")
    assert run.metrics["top1"].value > 0.9
    assert run.best.top1 == pytest.approx(20 / 30)
    assert "Only val has samples of 1 class ('z')." in run.notes


def test_same_image_in_train_and_test_is_warned_about(tmp_path):
    contents = [f"image {i}" for i in range(90)]
    contents[70] = contents[0]
    contents[80] = contents[1]
    made = store_of(tmp_path / "s", cycle("abc", 90), splits_of(60, 0, 30), contents=contents)

    run = fit_head(made)

    assert any(
        note.startswith("Warning: 2 of 30 test images also in train, byte for byte")
        for note in run.notes
    )


def test_failing_setting_is_kept_and_the_others_go_on(store):
    run = fit_head(store, settings=[{"C": 1.0}, {"C": -1.0}, {"C": 0.1}])

    assert [bool(trial.failure) for trial in run.trials] == [False, True, False]
    assert "Failed: C=-1: ValueError: C is -1.0, expected a number above 0" in run.notes
    assert run.best.setting["C"] in (0.1, 1.0)


def test_where_the_best_cannot_be_fitted_on_all_samples_the_next_best_is_taken(store, monkeypatch):
    settings = [{"C": 1e-6}, {"C": 0.1}, {"C": 1.0}]
    undisturbed = fit_head(store, settings=settings)
    best = undisturbed.best.setting["C"]
    fit = LogisticHead.fit

    def too_large(self, X, y, sample_weight=None):
        if best == self.C:
            raise MemoryError("too large")
        return fit(self, X, y, sample_weight)

    monkeypatch.setattr(LogisticHead, "fit", too_large)
    run = fit_head(store, settings=settings)

    others = [t for t in undisturbed.trials if t.setting["C"] != best]
    second = max(others, key=lambda trial: trial.rank("top1"))
    assert run.best.setting == second.setting
    assert run.scores["val"]["top1"].value == second.top1
    assert any("could not be fitted on all 60 samples: too large" in note for note in run.notes)

    monkeypatch.setattr(LogisticHead, "fit", lambda *_: too_large(undisturbed.model.head, 0, 0))
    with pytest.raises(TlpipeError, match="could not be fitted on all 60 samples"):
        fit_head(store, settings=settings)


def test_scaling_auto_tries_those_that_suit_the_head(store):
    run = fit_head(store, head="knn", scaling="auto", settings=[{"k": 5}])

    assert [trial.candidate.scaling for trial in run.trials] == list(HEADS["knn"].scalings)
    assert run.model.scaler.kind == run.best.candidate.scaling
    assert described(run.best.candidate, run.trials) == f"k=5, {run.model.scaler.kind}"
    assert described(run.best.candidate, run.trials[:1]) == "k=5"


def test_all_settings_failing_is_an_error(store):
    with pytest.raises(TlpipeError, match=r"Every setting of head 'logreg' failed:\n  C=-1: Value"):
        fit_head(store, settings=[{"C": -1.0}, {"C": 0.0}])


def test_solver_that_stops_early_is_told(store):
    run = fit_head(store, settings=[{"C": 1000.0, "max_iter": 1}])

    assert not run.converged
    assert any("did not converge with C=1000" in note for note in run.notes)
    assert run.to_dict()["converged"] is False


def test_edge_of_the_grid_is_told(store):
    run = fit_head(store, settings=[{"C": 1e-9}, {"C": 1e-8}, {"C": 1e-3}])

    assert run.best.setting == {"C": 1e-3}
    assert any("C = 0.001 is the largest that was tried" in note for note in run.notes)


def test_same_seed_same_run(store):
    first, second = (fit_head(store, head="mlp", settings=QUICK["mlp"], seed=4) for _ in range(2))

    assert first.scores == second.scores
    assert first.best.setting["seed"] == 4


def test_one_class_only_is_refused(tmp_path):
    made = store_of(tmp_path / "s", ["a"] * 20, splits_of(15, 0, 5))

    with pytest.raises(TooFewSamplesError, match="are of one class, 'a'"):
        fit_head(made)


@pytest.mark.parametrize("head", HEADS)
def test_more_classes_than_samples_a_fold_and_constant_features(head, tmp_path):
    names = [f"c{i}" for i in range(12)]
    features = {"penultimate": blobs(cycle(names, 36), n_features=40, noise=0.1)}
    features["penultimate"][:, :5] = 7.0
    made = make_store(tmp_path / "s", features, {"label": cycle(names, 36)}, splits_of(24, 0, 12))

    run = fit_head(made, head=head, settings=QUICK.get(head))

    assert len(run.classes) == 12
    assert "top5" in run.metrics
    assert all(np.isfinite(score.value) for score in run.metrics.values())


def test_k_is_cut_to_the_samples_there_are(store):
    run = fit_head(store, head="knn", settings=[{"k": 500}])

    assert "k was cut to 60: there are no more training samples." in run.notes


def test_two_stores_side_by_side(tmp_path, store):
    other = make_store(
        tmp_path / "o",
        {"penultimate": blobs(cycle("abc", 90), n_features=4, seed=7)},
        {"label": cycle("abc", 90)},
        [""] * 90,
        backbone="other",
    )

    run = fit_head([store, other.path])

    assert [block.n_features for block in run.inputs] == [8, 4]
    assert run.model.head.n_features_in_ == 12
    assert run.n_samples == {"train": 60, "val": 0, "test": 30}


def test_unknown_names_are_told_before_anything_is_read(tmp_path):
    with pytest.raises(UnknownNameError, match="Unknown head 'logistic'"):
        fit_head(tmp_path / "missing", head="logistic")
    with pytest.raises(UnknownNameError, match="Unknown scaling 'std'"):
        fit_head(tmp_path / "missing", scaling="std")


def test_empty_label_and_strange_names_are_classes(tmp_path):
    names = ["", "=cmd()", 'a,"b"\nc', "dög 🐕", "</script>"]
    made = store_of(tmp_path / "s", cycle(names, 100), splits_of(60, 0, 40), noise=0.05)

    run = fit_head(made)

    assert run.classes == tuple(sorted(names))
    assert run.metrics["top1"].value == 1
