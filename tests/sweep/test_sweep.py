"""Sweeps: every candidate tried, the best of each head scored once, interrupted ones resumed."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import DataError, TlpipeError, UnknownNameError, UsageError
from pipeline.heads import HEADS
from pipeline.heads.ridge import RidgeHead
from pipeline.report.heads import heads_page, table_of
from pipeline.runs.bundle import load_bundle
from pipeline.runs.folder import read_run
from pipeline.sweep.fit import fit_head
from pipeline.sweep.journal import Journal
from pipeline.sweep.prepare import prepare
from pipeline.sweep.proposals import Grid
from pipeline.sweep.search import best_of
from pipeline.sweep.space import parse_param
from pipeline.sweep.sweep import Plan, sweep
from pipeline.sweep.trials import Candidate, Trial
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of

FAST = ("logreg", "ridge", "knn", "prototype")


def params(*texts):
    return tuple(parse_param(text) for text in texts)


@pytest.fixture
def layers():
    """Three layers: one that says all, one that helps, one of noise."""
    names = cycle("abc", 150)
    rng = np.random.default_rng(0)
    return {
        "noise": rng.normal(size=(150, 6)),
        "good": blobs(names, n_features=6, noise=0.8),
        "weak": blobs(names, n_features=2, noise=1.5, seed=3),
    }


@pytest.fixture
def store(tmp_path, layers):
    columns = {"label": cycle("abc", 150), "patient": [f"p{i // 5}" for i in range(150)]}
    return make_store(tmp_path / "s", layers, columns, splits_of(100, 0, 50))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs"


def test_one_line_a_head_best_on_validation_first(store, out):
    run = sweep(store, Plan(FAST), out=out)

    lines = run.to_dict()["heads"]
    assert {line["head"] for line in lines} == set(FAST)
    values = [line["val_top1"] for line in lines]
    assert values == sorted(values, reverse=True)
    assert run.recommended()[0].run.head == lines[0]["head"]
    assert all(line["scored_on"] == "test" for line in lines)
    assert all(line["size_bytes"] > 0 and line["seconds"] > 0 for line in lines)
    json.dumps(run.to_dict(), allow_nan=False)


def test_one_head_of_a_sweep_is_what_fit_head_finds(store, out):
    settings = [{"C": value} for value in (0.001, 0.1, 10.0)]

    swept = sweep(store, Plan(("logreg",), params=params("C=0.001,0.1,10")), out=out)
    fitted = fit_head(store, settings=settings)

    found = swept.results[0].run
    assert found.best.setting == fitted.best.setting
    assert found.metrics == fitted.metrics
    np.testing.assert_array_equal(found.model.head.coef_, fitted.model.head.coef_)


def test_test_split_has_no_say(tmp_path, layers, out):
    labels = [*cycle("abc", 100), *cycle("abc", 50)]
    other = make_store(tmp_path / "o", layers, {"label": labels}, splits_of(100, 0, 50))
    same = make_store(tmp_path / "t", layers, {"label": cycle("abc", 150)}, splits_of(100, 0, 50))

    first, second = (sweep(one, Plan(FAST), out=out) for one in (other, same))

    assert [r.run.head for r in first.ranked()] == [r.run.head for r in second.ranked()]
    for a, b in zip(first.results, second.results, strict=True):
        assert a.run.best.candidate == b.run.best.candidate
        assert a.top1 != b.top1


def test_layers_each_finds_the_one_that_says_something(store, out):
    run = sweep(store, Plan(("ridge",), layers=("each", "all")), out=out)

    tried = {trial.candidate.layers for _, trial in run.results[0].trials}
    assert tried == {("noise",), ("good",), ("weak",), ("noise", "good", "weak")}
    assert run.results[0].run.best.candidate.layers in {("good",), ("noise", "good", "weak")}


def test_chosen_layers_are_what_the_saved_model_takes(store, out, layers):
    path = sweep(store, Plan(("ridge",), layers=("good,weak", "weak")), out=out).save(out)

    bundle = load_bundle(path)

    assert bundle.inputs[0].layers == ("good", "weak")
    X = np.hstack([layers["good"], layers["weak"]])[100:].astype(np.float16)
    right = bundle.predict_proba([X]).argmax(axis=1) == np.arange(100, 150) % 3
    assert right.mean() == pytest.approx(read_run(path)["metrics"]["test"]["top1"]["value"])


def test_layers_auto_leaves_noise_out_and_says_what_it_saw(store, out):
    run = sweep(store, Plan(("logreg",), layers=("auto",)), out=out)

    chosen = run.results[0].run.best.candidate.layers
    assert "good" in chosen
    assert "noise" not in chosen
    (note,) = [note for note in run.notes if note.startswith("Layers chosen by ridge")]
    assert "noise 0." in note


def test_unknown_layer_is_told(store, out):
    with pytest.raises(UnknownNameError, match="Unknown layer 'god'"):
        sweep(store, Plan(layers=("god",)), out=out)


def test_scaling_is_part_of_the_grid(store, out):
    run = sweep(store, Plan(("knn",), scalings=("auto",)), out=out)

    tried = {trial.candidate.scaling for _, trial in run.results[0].trials}
    assert tried == set(HEADS["knn"].scalings)
    assert run.results[0].run.model.scaler.kind == run.results[0].run.best.candidate.scaling


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_drawn_candidates_are_as_many_as_asked_for_and_repeatable(search, store, out):
    plan = Plan(("logreg", "knn"), search=search, n_trials=12, seed=3)

    first, second = sweep(store, plan, out=out), sweep(store, plan, out=out)

    for a, b in zip(first.results, second.results, strict=True):
        assert len(a.trials) == 12
        assert [t.candidate for _, t in a.trials] == [t.candidate for _, t in b.trials]
        assert a.run.metrics == b.run.metrics
    assert len({t.setting["C"] for _, t in first.results[0].trials}) == 12


def test_params_narrow_the_draws(store, out):
    plan = Plan(("logreg",), params=params("C=0.5:2"), search="random", n_trials=10)

    run = sweep(store, plan, out=out)

    assert all(0.5 <= trial.setting["C"] <= 2 for _, trial in run.results[0].trials)


def test_repeats_hold_out_other_samples_and_give_an_interval(store, out):
    run = sweep(store, Plan(("ridge",), repeats=4), out=out)

    (result,) = run.results
    assert len(result.repeats) == 4
    assert result.top1.value == pytest.approx(np.mean(result.repeats))
    single = result.run.metrics["top1"]
    # Seeds add to the uncertainty that the samples bring, and take nothing from it.
    assert result.top1.high - result.top1.low > 0.8 * (single.high - single.low)
    assert {seed for seed, _ in result.trials} == {0, 1, 2, 3}
    by_seed = [[t.scores for s, t in result.trials if s == seed] for seed in range(4)]
    assert by_seed[0] != by_seed[1]


def test_what_chooses_can_be_named(store, out):
    by_nll = sweep(store, Plan(("logreg",), metric="nll"), out=out).results[0]

    scored = [trial.scores["nll"] for _, trial in by_nll.trials]
    assert by_nll.run.best.scores["nll"] == min(scored)
    with pytest.raises(UnknownNameError, match="Unknown metric to choose by 'top2'"):
        Plan(metric="top2")


def test_one_failing_setting_and_one_failing_head_take_no_other_with_them(store, out):
    diverging = ("mlp.lr=1e30", "mlp.epochs=2", "mlp.hidden=4", "mlp.dropout=0")
    plan = Plan(("mlp", "logreg"), params=params("C=-1,1", *diverging))

    run = sweep(store, plan, out=out)

    assert [result.run.head for result in run.results] == ["logreg"]
    assert "Every setting of head 'mlp' failed" in run.failures["mlp"]
    assert [bool(trial.failure) for _, trial in run.results[0].trials] == [True, False]
    columns, rows = table_of(run.to_dict())
    assert [(row[0], row[columns.index("best setting")]) for row in rows] == [
        ("logreg", "C=1"),
        ("mlp", "failed"),
    ]
    assert "<td>mlp</td>" in heads_page(run.to_dict())


def test_what_fails_when_it_is_tried_again_gives_way_to_the_next_best():
    trials = [
        Trial(Candidate("knn", ("a",), "l2", {"k": k}), 0.0, {"top1": top1, "nll": 1.0})
        for k, top1 in ((1, 0.7), (2, 0.9), (3, 0.8))
    ]

    def once_more(candidate, useless=(2,)):
        trial = trials[candidate.setting["k"] - 1]
        if candidate.setting["k"] in useless:
            return replace(trial, failure="too large"), None
        return trial, np.eye(3)

    best, told, probabilities = best_of(trials, "top1", once_more)

    assert best is told[2] is trials[2]
    assert [trial.failure for trial in told] == ["", "too large", ""]
    np.testing.assert_array_equal(probabilities, np.eye(3))
    with pytest.raises(TlpipeError, match=r"'knn' failed:\n  k=1: too large\n  k=2: too"):
        best_of(trials, "top1", lambda candidate: once_more(candidate, (1, 2, 3)))


def test_parameters_that_cannot_be_are_refused_before_anything_is_read():
    with pytest.raises(UsageError, match="Head 'ridge' cannot be fitted with these parameters"):
        Plan(("ridge",), params=params("alpha=-1"))
    with pytest.raises(UsageError, match="Head 'logreg' cannot be fitted"):
        Plan(("logreg",), params=params("C=abc"))
    with pytest.raises(UsageError, match="No head was named"):
        Plan(())


def test_groups_are_never_parted(store, out):
    seen = []
    run = sweep(store, Plan(("ridge",), repeats=2), groups="patient", out=out)

    assert "of 20 groups" in run.results[0].run.chosen_by
    patients = np.array([f"p{i // 5}" for i in range(150)])
    for seed in range(5):
        protocol = prepare(store, layers=["all"], groups="patient", seed=seed).protocol
        for fold in protocol.folds:
            assert not set(patients[fold.fit]) & set(patients[fold.choose])
            seen.append(tuple(fold.choose))
    assert len(set(seen)) > 5


def test_given_splits_that_part_a_group_are_refused(tmp_path, layers):
    columns = {"label": cycle("abc", 150), "patient": [f"p{i % 10}" for i in range(150)]}
    made = make_store(tmp_path / "g", layers, columns, splits_of(100, 0, 50))

    with pytest.raises(DataError, match=r"10 groups of 10 have samples in more than one split"):
        fit_head(made, head="ridge", groups="patient")


def test_a_split_made_by_sample_is_made_anew_by_group(tmp_path, layers):
    patients = [f"p{i % 10}" for i in range(150)]
    columns = {"label": cycle("abc", 150), "patient": patients}
    made = make_store(tmp_path / "g", layers, columns, splits_of(100, 0, 50))
    made.manifest.source["split_origin"] = "made: 20% of each class held out for test"

    run = fit_head(made, head="ridge", groups="patient")

    tested = {patients[made.ids().index(i)] for i in run.predictions.ids}
    assert len(tested) == 2
    assert run.n_samples["test"] == 30
    assert run.split_origin.startswith("made: a fifth of the groups of patient")


def test_the_saved_run_holds_table_trials_page_and_model(store, out):
    run = sweep(store, Plan(FAST, repeats=2), out=out)

    path = run.save(out, command="tlpipe sweep it", page=heads_page)

    assert path == out / "sweep-toy-0001"
    document = read_run(path)
    assert document["kind"] == "sweep"
    assert document["command"] == "tlpipe sweep it"
    assert len(document["heads"]) == len(FAST)
    lines = (path / "trials.jsonl").read_text().splitlines()
    assert len(lines) == sum(len(result.trials) for result in run.results)
    assert {json.loads(line)["seed"] for line in lines} == {0, 1}
    assert load_bundle(path).model.head.classes_.tolist() == [0, 1, 2]
    assert "it has the best top1 on validation" in (path / "report.html").read_text()
    assert not list(out.glob(".trials*"))


class StopError(Exception):
    pass


def stop_after(n):
    seen = []

    def on_trial(trial):
        seen.append(trial)
        if len(seen) == n:
            raise StopError

    return on_trial, seen


def test_an_interrupted_sweep_goes_on_where_it_was(store, out, dead):
    plan = Plan(("ridge", "knn"), layers=("each",))
    whole = sweep(store, plan, out=out)
    on_trial, _ = stop_after(50)
    with pytest.raises(StopError):
        sweep(store, plan, out=out, on_trial=on_trial)
    (journal,) = out.glob(".trials*")
    kept = len(journal.read_text().splitlines()) - 1
    assert kept >= 50

    dead(out)
    journal.write_text(journal.read_text() + '{"seed": 0, "head": "rid')  # killed mid-line
    resumed = sweep(store, plan, out=out, resume=True)

    for a, b in zip(whole.results, resumed.results, strict=True):
        assert a.run.best.candidate == b.run.best.candidate
        assert a.run.metrics == b.run.metrics
        assert [t.scores for _, t in a.trials] == [t.scores for _, t in b.trials]
    assert not journal.exists()


def test_resume_fits_nothing_twice(store, out, monkeypatch):
    plan = Plan(("ridge",))
    on_trial, seen = stop_after(33)
    with pytest.raises(StopError):
        sweep(store, plan, out=out, on_trial=on_trial)
    assert len(seen) == 33  # all of the grid

    fitted = []
    original = RidgeHead.try_settings.__func__

    def counted(cls, settings, *args, **kwargs):
        fitted.extend(settings)
        return original(cls, settings, *args, **kwargs)

    monkeypatch.setattr(RidgeHead, "try_settings", classmethod(counted))
    sweep(store, plan, out=out, resume=True)

    assert len(fitted) == 1  # the best once more, for its probabilities


def test_without_resume_an_unfinished_sweep_is_left_alone_and_it_is_said(store, out, dead):
    on_trial, _ = stop_after(5)
    with pytest.raises(StopError):
        sweep(store, Plan(("ridge",)), out=out, on_trial=on_trial)
    dead(out)
    notes, tried = [], []

    run = sweep(store, Plan(("ridge",)), out=out, on_note=notes.append, on_trial=tried.append)

    assert len(run.results[0].trials) == len(tried) == 33
    assert "An unfinished sweep of this data left" in notes[0]
    assert "--resume takes them up" in notes[0]
    assert len(list(out.glob(".trials*"))) == 1


def test_sweeps_side_by_side_leave_each_other_alone(store, out):
    data = prepare(store, layers=["all"])
    with Journal(out, data.key(), resume=False) as first:
        with Journal(out, data.key(), resume=True) as second:
            assert first.path != second.path
        assert first.path.exists()
        assert not second.path.exists()


@pytest.fixture
def dead():
    """Make journals look like those of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    def bury(folder):
        for file in folder.glob(".trials*"):
            header, *lines = file.read_text().splitlines()
            text = json.dumps(json.loads(header) | {"process": process.pid})
            file.write_text("\n".join([text, *lines]) + "\n")

    return bury


def test_trials_of_other_data_are_not_taken_up(tmp_path, store, layers, out):
    on_trial, _ = stop_after(5)
    with pytest.raises(StopError):
        sweep(store, Plan(("ridge",)), out=out, on_trial=on_trial)
    other = make_store(tmp_path / "o", layers, {"label": cycle("abcd", 150)}, splits_of(100, 0, 50))

    resumed = sweep(other, Plan(("ridge",)), out=out, resume=True)
    fresh = sweep(other, Plan(("ridge",)), out=tmp_path / "elsewhere")

    assert [t.scores for _, t in resumed.results[0].trials] == [
        t.scores for _, t in fresh.results[0].trials
    ]
    assert len(list(out.glob(".trials*"))) == 1


def test_a_budget_that_is_over_still_gives_every_head_a_result(store, out):
    plan = Plan(("ridge", "logreg"), layers=("each",), time_budget=1e-9)

    run = sweep(store, plan, out=out)

    assert [result.run.head for result in run.results] == ["ridge", "logreg"]
    assert all(0 < len(result.trials) < 93 for result in run.results)
    assert all(
        any(note.startswith("The time was up after") for note in result.run.notes)
        for result in run.results
    )


def test_what_a_budget_tries_first_lies_far_apart():
    values = [{"C": value} for value in range(31)]
    grid = Grid("logreg", values, [(("a",), "l2"), (("b",), "l2")], spread=True)

    first = [(c.setting["C"], c.layers[0]) for c in grid.next(8)]

    assert first == [
        (0, "a"),
        (0, "b"),
        (16, "a"),
        (16, "b"),
        (8, "a"),
        (8, "b"),
        (24, "a"),
        (24, "b"),
    ]
    rest = grid.next(None)
    assert len(rest) == 54
    assert {c.setting["C"] for c in rest} | {0, 16, 8, 24} == set(range(31))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": ("logistic",)}, "Unknown head 'logistic'"),
        ({"scalings": ("whiten",)}, "Unknown scaling 'whiten'"),
        ({"grid": "clop"}, "Unknown grid 'clop'"),
        ({"search": "magic"}, "Unknown search 'magic'"),
        ({"n_trials": 5}, "A grid tries all of its settings"),
        ({"repeats": 0}, "expected 1 or more of each"),
    ],
)
def test_wrong_plans_are_refused_before_anything_is_read(change, message):
    with pytest.raises(UsageError, match=message):
        Plan(**change)
