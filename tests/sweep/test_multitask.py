"""Several label columns learned at once: the protocol, missing labels, the run folder."""

import csv
import json

import numpy as np
import pytest

from pipeline.errors import (
    StoreError,
    TlpipeError,
    TooFewSamplesError,
    UnknownNameError,
    UsageError,
)
from pipeline.heads import HEADS
from pipeline.heads.multitask import MultiTaskMLP
from pipeline.runs.bundle import load_bundle
from pipeline.runs.comparison import read_contenders
from pipeline.runs.tasks import MEAN_NOTE
from pipeline.sweep.multitask import fit_multitask
from tests.heads.toy_stores import cycle, make_store, splits_of

LABELS = ("kind", "side")
ONE = [{"hidden": 16, "epochs": 25, "lr": 1e-2, "batch_size": 32}]
N = 150


def columns_of(n=N):
    return {"kind": cycle(["ant", "bee", "cow"], n), "side": cycle(["left", "right"], n)}


def points(columns, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(scale=0.4, size=(len(columns["kind"]), 6))
    for i, (kind, side) in enumerate(zip(columns["kind"], columns["side"], strict=True)):
        X[i, ("ant", "bee", "cow").index(kind)] += 2
        X[i, 4] += 2 if side == "left" else -2
    return X


def store_of(path, columns, splits, *, missing=(), truth=None):
    """Features that tell the labels; those of ``side`` are missing in some rows."""
    layers = {"penultimate": points(truth or columns)}
    side = [None if i in set(missing) else name for i, name in enumerate(columns["side"])]
    return make_store(path, layers, columns | {"side": side}, splits)


@pytest.fixture
def store(tmp_path):
    return store_of(tmp_path / "s", columns_of(), splits_of(100, 0, 50), missing=range(0, N, 3))


def fit(store, **options):
    return fit_multitask(store, LABELS, **{"settings": ONE} | options)


def test_every_column_is_learned_and_scored_on_its_own_samples(store):
    run = fit(store)

    assert [result.task.label for result in run.tasks] == ["kind", "side"]
    assert run.tasks[0].n_samples == {"train": 100, "test": 50}
    n_labelled = sum(label is not None for label in store.labels("side", split="test"))
    assert run.tasks[1].n_samples["test"] == n_labelled < 50
    assert len(run.tasks[1].predictions.ids) == n_labelled
    for result in run.tasks:
        assert result.scored_on == "test"
        assert result.scores["test"]["top1"].value > 0.9
        assert result.scores["val"]["top1"].low < result.scores["val"]["top1"].high + 1e-9
    means = [np.mean([r.scores[s]["nll"].value for r in run.tasks]) for s in ("test", "val")]
    assert [run.scores[s]["nll"].value for s in ("test", "val")] == pytest.approx(means)
    assert "50 of 150 samples without a label in column 'side': they count in the others." in (
        run.notes
    )
    assert MEAN_NOTE in run.notes


def test_the_run_folder_holds_every_column_and_loads(store, tmp_path):
    run = fit(store, task_weights="uncertainty")

    path = run.save(tmp_path / "runs")

    document = json.loads((path / "run.json").read_text())
    assert document["label"] == "kind + side"
    assert [task["label"] for task in document["tasks"]] == ["kind", "side"]
    assert document["tasks"][1]["classes"] == ["left", "right"]
    assert "classes" not in document
    assert "confusion" not in document
    assert document["task_weighting"] == "uncertainty"
    assert document["task_weights"] == run.task_weights()
    assert len(set(run.task_weights())) == 2
    assert not (path / "predictions.csv").exists()
    bundle = load_bundle(path)
    assert [task.label for task in bundle.tasks] == ["kind", "side"]
    assert bundle.classes == ("ant", "bee", "cow", "left", "right")
    X = store.features(layers=["penultimate"], split="test")[:]
    probabilities = bundle.predict_proba([X])
    np.testing.assert_allclose(probabilities[:, :3].sum(axis=1), 1)
    with (path / "predictions-kind.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == [
        bundle.classes[k] for k in probabilities[:, :3].argmax(axis=1)
    ]
    card = json.loads((path / "card.json").read_text())
    assert "classes" not in card
    assert card["tasks"][0] == {"label": "kind", "classes": ["ant", "bee", "cow"]}


def test_labels_of_test_decide_nothing_but_scores(tmp_path):
    truth = columns_of()
    shuffled = {name: labels[:100] + labels[100:][::-1] for name, labels in truth.items()}
    grid = [ONE[0] | {"lr": lr} for lr in (1e-3, 1e-2)]

    runs = [
        fit(store_of(tmp_path / name, columns, splits_of(100, 0, 50), truth=truth), settings=grid)
        for name, columns in (("a", truth), ("b", shuffled))
    ]

    np.testing.assert_array_equal(*(run.model.to_arrays()["head.weight"] for run in runs))
    assert runs[0].best.setting == runs[1].best.setting
    assert runs[0].scores["test"]["top1"].value > runs[1].scores["test"]["top1"].value


def test_the_mean_over_the_columns_chooses(store):
    grid = [ONE[0] | {"lr": lr} for lr in (1e-4, 1e-2)]

    run = fit(store, settings=grid, metric="nll")

    assert len(run.trials) == 2
    assert run.best.scores["nll"] == min(trial.scores["nll"] for trial in run.trials)
    means = [result.scores["val"]["nll"].value for result in run.tasks]
    assert run.best.scores["nll"] == pytest.approx(np.mean(means))


def test_a_sample_without_any_label_is_left_out(tmp_path):
    columns = columns_of() | {"other": [None] * N}
    columns["kind"] = [None if i < 10 else name for i, name in enumerate(columns["kind"])]
    made = make_store(
        tmp_path / "s",
        {"penultimate": points(columns_of())},
        columns | {"side": [None] * 5 + columns["side"][5:]},
        splits_of(100, 0, 50),
    )

    run = fit(made)

    assert run.n_samples == {"train": 95, "val": 0, "test": 50}
    assert "5 of 150 samples without a label in column 'kind' or 'side': left out." in run.notes


def test_a_column_without_labels_in_test_is_scored_where_it_chose(tmp_path):
    made = store_of(tmp_path / "s", columns_of(), splits_of(100, 0, 50), missing=range(100, N))

    run = fit(made)

    assert [result.scored_on for result in run.tasks] == ["test", "val"]
    assert list(run.scores) == ["val"]
    assert run.scored_on == "val"
    assert "Warning: no test sample has a label in column 'side'." in run.notes


def test_a_column_without_labels_in_val_has_no_say(tmp_path):
    made = store_of(tmp_path / "s", columns_of(), splits_of(80, 30, 40), missing=range(80, 110))

    run = fit(made)

    assert run.chosen_by == "val (given, 30 samples)"
    assert list(run.tasks[1].scores) == ["test"]
    assert run.tasks[1].scores["test"]["top1"].value > 0.9
    assert any("the other columns chose alone" in note for note in run.notes)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (range(100), "The training samples have no label in column 'side'"),
        (
            range(0, 100, 2),
            "The training samples have labels of one class, 'right' in column 'side'",
        ),
    ],
)
def test_a_column_that_train_does_not_have_is_refused(tmp_path, missing, message):
    made = store_of(tmp_path / "s", columns_of(), splits_of(100, 0, 50), missing=missing)

    with pytest.raises(TooFewSamplesError, match=message):
        fit(made)


def test_a_class_that_only_test_has_counts_as_an_error(tmp_path):
    columns = columns_of()
    columns["side"] = [*columns["side"][:-2], "above", "above"]
    made = store_of(tmp_path / "s", columns, splits_of(100, 0, 50), truth=columns_of())

    run = fit(made)

    assert run.tasks[1].score_classes == ("left", "right", "above")
    assert run.tasks[1].confusion[2].sum() == 2
    assert any("column 'side' that train does not have ('above')" in note for note in run.notes)


def test_with_nothing_to_spare_the_first_setting_is_taken(tmp_path):
    columns = {"kind": ["ant", "bee", "cow"] * 11, "side": ["left", "right", "left"] * 11}
    made = store_of(tmp_path / "s", columns, splits_of(3, 0, 30))

    run = fit(made, settings=[ONE[0] | {"lr": lr} for lr in (1e-3, 1e-2)])

    assert run.chosen_by.startswith("nothing")
    assert "lr" not in run.best.setting
    assert list(run.scores) == ["test"]


def test_nothing_to_score_is_said(tmp_path):
    columns = {"kind": ["ant", "bee", "cow"], "side": ["left", "right", "left"]}

    run = fit(store_of(tmp_path / "s", columns, splits_of(3)))

    assert run.scored_on == ""
    assert [result.scored_on for result in run.tasks] == ["", ""]
    assert any("nothing was scored" in note for note in run.notes)
    run.save(tmp_path / "runs")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "logreg"}, UsageError, r"logreg' learns one label column, not several \(kind, "),
        ({"head": "nlp"}, UnknownNameError, "Did you mean: mlp"),
        ({"task_weights": "loud"}, UnknownNameError, "weighting of tasks 'loud'"),
        ({"scaling": "min"}, UnknownNameError, "scaling 'min'"),
        ({"metric": "f1"}, UnknownNameError, "metric to choose by 'f1'"),
        ({"settings": [{"class_weight": "balanced"}]}, UnknownNameError, "with several labels"),
        ({"memory_limit": 1e6}, UsageError, r"GB, and --memory-limit is 0\.00 GB\.\n  Take  --m"),
    ],
)
def test_what_cannot_be_done_is_refused(store, options, error, message):
    with pytest.raises(error, match=message):
        fit(store, **options)


def test_fewer_layers_are_advised_where_there_are_several(tmp_path):
    X, splits = points(columns_of()), splits_of(100, 0, 50)
    one, two = (
        make_store(tmp_path / f"{len(layers)}", layers, columns_of(), splits)
        for layers in ({"low": X}, {"low": X, "high": X})
    )

    with pytest.raises(UsageError, match=r"GB,  or fewer images"):
        fit(one, memory_limit=1e6)
    with pytest.raises(UsageError, match=r"GB, fewer layers \(--layers\),  or fewer images"):
        fit(two, memory_limit=1e6)


def test_scaling_auto_tries_those_that_suit_the_head(store):
    run = fit(store, scaling="auto")

    assert [trial.candidate.scaling for trial in run.trials] == list(HEADS["mlp"].scalings)
    assert run.model.scaler.kind == run.best.candidate.scaling


def test_where_the_best_cannot_be_fitted_on_all_samples_the_next_best_is_taken(store, monkeypatch):
    settings = [ONE[0] | {"lr": lr} for lr in (1e-5, 1e-2, 1e-4)]
    undisturbed = fit(store, settings=settings, metric="nll")
    learn, too_large = MultiTaskMLP.fit, {1e-2}

    def failing(self, X, y, sample_weight=None):
        if self.lr in too_large:
            raise ArithmeticError("not finite")
        return learn(self, X, y, sample_weight)

    monkeypatch.setattr(MultiTaskMLP, "fit", failing)
    run = fit(store, settings=settings, metric="nll")

    assert undisturbed.best.setting["lr"] == 1e-2
    assert run.best.setting["lr"] == 1e-4
    assert run.scores["val"]["nll"].value == pytest.approx(undisturbed.trials[2].scores["nll"])
    assert any("be fitted on all 100 samples: not finite" in note for note in run.notes)

    too_large |= {1e-5, 1e-4}
    with pytest.raises(TlpipeError, match=r"'mlp' failed:\n(.*on all 100 samples(.|\n)*){3}"):
        fit(store, settings=settings)


def test_columns_must_be_there_and_differ(store):
    with pytest.raises(UnknownNameError, match="Unknown label column 'age'"):
        fit_multitask(store, ["kind", "age"])
    with pytest.raises(UsageError, match="1 label columns were given, expected two or more"):
        fit_multitask(store, ["kind"])
    with pytest.raises(UsageError, match="named twice: kind, kind"):
        fit_multitask(store, ["kind", "kind"])


def test_a_setting_that_fails_does_not_stop_the_others(store):
    run = fit(store, settings=[ONE[0] | {"dropout": 2.0}, *ONE])

    assert [bool(trial.failure) for trial in run.trials] == [True, False]
    assert any(note.startswith("Failed: ") and "dropout" in note for note in run.notes)


def test_names_of_columns_that_no_file_can_have_stay_apart(tmp_path):
    names = {"種類": "kind", "年齢": "side"}
    columns = {name: columns_of()[column] for name, column in names.items()}
    layers = {"penultimate": points(columns_of())}
    made = make_store(tmp_path / "s", layers, columns, splits_of(100, 0, 50))

    path = fit_multitask(made, list(names), settings=ONE).save(tmp_path / "runs")

    assert len(list(path.glob("predictions-*.csv"))) == 2
    assert all(len(contender.right) == 50 for contender in read_contenders(path))


def test_groups_are_never_parted(tmp_path):
    columns = columns_of() | {"patient": [f"p{i // 6}" for i in range(N)]}
    made = make_store(
        tmp_path / "s", {"penultimate": points(columns)}, columns, splits_of(102, 0, 48)
    )

    run = fit(made, groups="patient")

    assert run.chosen_by == "5 stratified folds of train (102 samples of 17 groups)"
    assert run.tasks[1].scores["test"]["top1"].value > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card.update(tasks=[]), "'tasks' is"),
        (lambda card: card.update(tasks=["kind", "side"]), "'tasks' is"),
        (lambda card: card["tasks"][0].pop("classes"), "'classes' is None"),
        (lambda card: card["tasks"][0].pop("label"), "'label' is None"),
        (lambda card: card["tasks"].reverse(), "but .2, 3. classes are named"),
        (lambda card: card["params"].pop("n_classes"), "n_classes is empty"),
        (lambda card: card["params"].update(n_classes=[5]), "in parts of .5."),
        (lambda card: card["params"].update(n_classes="35"), "n_classes is '35'"),
        (lambda card: card.update(head="logreg"), "Unknown head for several label columns"),
    ],
)
def test_a_card_that_was_changed_is_refused(store, tmp_path, change, message):
    path = fit(store, settings=[ONE[0] | {"epochs": 1}]).save(tmp_path / "runs")
    card = json.loads((path / "card.json").read_text())
    change(card)
    (path / "card.json").write_text(json.dumps(card))

    with pytest.raises(StoreError, match=message):
        load_bundle(path)
