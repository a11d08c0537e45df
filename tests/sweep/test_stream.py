"""Fitting within a memory limit: the same protocol and result, by passes over the store."""

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands.sweep_options import parse_size
from pipeline.errors import MismatchError, ResourceError, StoreError, TlpipeError, UsageError
from pipeline.heads.scaling import SCALINGS
from pipeline.heads.streaming.ridge import solve_ridge
from pipeline.runs.bundle import load_bundle
from pipeline.sweep import fit, stream
from pipeline.sweep.fit import fit_head
from pipeline.sweep.prepare import plan
from pipeline.sweep.space import parse_param
from pipeline.sweep.stream import resident_bytes
from pipeline.sweep.sweep import Plan, sweep
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of

LINEAR = [{"kernel": "linear", "C": C, "tol": 1e-6} for C in (1e-4, 1e-2, 1.0)]
LIMIT = 1e10
# The limit is above what the process holds when the fit begins, whatever torch weighs here.
FIT_WITHIN = """
import sys
from pipeline.commands import main
from pipeline.sweep.fit import fit_head
from pipeline.sweep.space import parse_param
from pipeline.sweep.stream import resident_bytes
from pipeline.sweep.sweep import Plan, sweep

limit = int(resident_bytes() + float(sys.argv.pop()))
print(limit, file=sys.stderr)
sys.argv += ["--memory-limit", str(limit), "--json"]
main()
"""
# A child's peak counts in what its parent held when it was started: that one must be small.
WATCH = """
import resource, subprocess, sys

code = subprocess.run(sys.argv[1:]).returncode
print(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def tiny_memory(monkeypatch):
    """Features never fit in memory, and a block holds 150 rows at most."""
    monkeypatch.setattr(fit, "must_stream", lambda *_: True)
    monkeypatch.setattr("pipeline.heads.streaming.fit._MAX_BLOCK_ROWS", 150)


@pytest.fixture
def files_by_class(monkeypatch):
    """Rows lie class by class in the files, so that no block has samples of all classes."""

    def sorted_rows(self):
        labels = np.array([str(label) for label in self.stores[0].labels("label")])[self.rows[0]]
        return np.argsort(np.argsort(labels, kind="stable"))

    monkeypatch.setattr("pipeline.heads.features.StoredFeatures.file_positions", sorted_rows)


def store_of(folder, n_train, n_val, n_test, names="abc"):
    labels = cycle(names, n_train + n_val + n_test)
    X = 2 + blobs(labels, noise=1.3) * np.geomspace(0.1, 10, 8)
    return make_store(
        folder, {"penultimate": X}, {"label": labels}, splits_of(n_train, n_val, n_test)
    )


@pytest.mark.parametrize("head", ["ridge", "logreg", "svm", "prototype", "knn", "linear"])
@pytest.mark.parametrize("sizes", [(240, 90, 90), (240, 0, 90)], ids=["val", "folds"])
def test_run_is_the_one_in_memory(tmp_path, tiny_memory, files_by_class, head, sizes):
    made = store_of(tmp_path / "s", *sizes)
    settings = LINEAR if head == "svm" else None

    held = fit_head(made, head=head, settings=settings)
    streamed = fit_head(made, head=head, settings=settings, memory_limit=LIMIT)

    assert streamed.notes[0].startswith("The features were streamed from disk, in ")
    assert streamed.notes[1 + (head == "knn") :] == held.notes
    assert streamed.best.setting == held.best.setting
    assert streamed.chosen_by == held.chosen_by
    assert [t.setting for t in streamed.trials] == [t.setting for t in held.trials]
    for ours, theirs in zip(streamed.trials, held.trials, strict=True):
        assert ours.top1 == pytest.approx(theirs.top1, abs=0.005)
        assert ours.scores["nll"] == pytest.approx(theirs.scores["nll"], rel=0.01)
    assert streamed.metrics["top1"] == held.metrics["top1"]
    assert streamed.predictions.ids.tolist() == held.predictions.ids.tolist()
    np.testing.assert_allclose(
        streamed.predictions.probability, held.predictions.probability, atol=0.01
    )
    np.testing.assert_array_equal(streamed.confusion, held.confusion)
    assert streamed.chosen_right.mean() == pytest.approx(held.chosen_right.mean(), abs=0.005)
    assert streamed.data_digest == held.data_digest
    assert streamed.model.temperature == pytest.approx(held.model.temperature, rel=0.01)
    json.dumps(streamed.to_dict(), allow_nan=False)


def test_held_out_part_of_a_large_train(tmp_path, tiny_memory):
    made = store_of(tmp_path / "s", 2100, 0, 0, "ab")

    held, streamed = fit_head(made, head="ridge"), fit_head(made, head="ridge", memory_limit=LIMIT)

    assert streamed.chosen_by.startswith("20% of train")
    assert streamed.scored_on == "val"
    assert streamed.metrics["top1"] == held.metrics["top1"]
    assert streamed.metrics["nll"].value == pytest.approx(held.metrics["nll"].value)
    np.testing.assert_allclose(streamed.model.head.coef_, held.model.head.coef_, rtol=1e-3)
    np.testing.assert_allclose(streamed.model.scaler.mean, held.model.scaler.mean)


def test_two_stores_in_different_orders(tmp_path, tiny_memory):
    first = store_of(tmp_path / "s", 240, 90, 90)
    ids = first.ids()[::-1]
    other = make_store(
        tmp_path / "o",
        {"penultimate": blobs(cycle("cba", 420), n_features=4, noise=2.0, seed=7)},
        {"label": cycle("cba", 420)},
        [""] * 420,
        ids=ids,
        backbone="other",
    )

    held = fit_head([first, other], head="ridge")
    streamed = fit_head([first, other], head="ridge", memory_limit=LIMIT)

    assert streamed.model.head.n_features_in_ == 12
    assert streamed.metrics["top1"] == held.metrics["top1"]
    np.testing.assert_allclose(
        streamed.model.head.coef_, held.model.head.coef_, rtol=1e-3, atol=1e-5
    )


def test_temperature_of_few_samples_is_near(tmp_path, tiny_memory, monkeypatch):
    made = store_of(tmp_path / "s", 2100, 900, 90)
    everything = fit_head(made, head="ridge", memory_limit=LIMIT)
    monkeypatch.setattr(stream, "_MIN_CALIBRATION", 300)
    monkeypatch.setattr(stream, "_LOGITS_SHARE", 0.0)

    few = fit_head(made, head="ridge", memory_limit=LIMIT)

    assert few.model.temperature != everything.model.temperature
    assert few.model.temperature == pytest.approx(everything.model.temperature, rel=0.3)
    assert few.metrics["top1"] == everything.metrics["top1"]


def test_one_sample_a_class_and_classes_of_test_alone(tmp_path, tiny_memory):
    labels = [*"abc", *cycle("abcz", 40)]
    features = {"penultimate": blobs(labels, noise=0.1)}
    made = make_store(tmp_path / "s", features, {"label": labels}, splits_of(3, 0, 40))

    run = fit_head(made, head="prototype", memory_limit=LIMIT)

    assert run.chosen_by.startswith("nothing")
    assert run.score_classes == ("a", "b", "c", "z")
    assert run.metrics["top1"].value == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ("logreg", None),
        ("ridge", None),
        ("svm", LINEAR),
        ("prototype", None),
        ("knn", None),
        ("linear", [{"lr": 0.05, "epochs": 20}]),
    ],
)
def test_classes_of_test_alone_count_as_errors(tmp_path, tiny_memory, head, settings):
    labels = [*cycle("ab", 60), *cycle("abz", 30)]
    features = {"penultimate": blobs(labels, noise=0.1)}
    made = make_store(tmp_path / "s", features, {"label": labels}, splits_of(60, 0, 30))

    run = fit_head(made, head=head, settings=settings, memory_limit=LIMIT)

    assert run.metrics["top1"].value == pytest.approx(20 / 30)


def test_where_the_best_cannot_be_fitted_on_all_samples_the_next_best_is_taken(
    tmp_path, tiny_memory, monkeypatch
):
    made = store_of(tmp_path / "s", 240, 90, 90)
    settings = [{"alpha": alpha} for alpha in (1.0, 1e6, 10.0)]
    undisturbed = fit_head(made, head="ridge", settings=settings, memory_limit=LIMIT)
    best = undisturbed.best.setting["alpha"]
    too_large = {best}

    def solve(moments, grams, weights, scaler, alphas):
        if weights.all() and too_large & set(alphas):
            raise MemoryError("too large")
        return solve_ridge(moments, grams, weights, scaler, alphas)

    monkeypatch.setattr("pipeline.heads.streaming.fit.solve_ridge", solve)
    run = fit_head(made, head="ridge", settings=settings, memory_limit=LIMIT)

    others = [t for t in undisturbed.trials if t.setting["alpha"] != best]
    second = max(others, key=lambda trial: trial.rank("top1"))
    assert run.best.setting == second.setting
    assert run.scores["val"]["top1"].value == second.top1
    assert any("be fitted on all 330 samples: MemoryError" in note for note in run.notes)

    too_large |= {1.0, 1e6, 10.0}
    with pytest.raises(TlpipeError, match=r"'ridge' failed:\n(.*on all 330 samples(.|\n)*){3}"):
        fit_head(made, head="ridge", settings=settings, memory_limit=LIMIT)


def test_class_of_val_alone_is_learned_in_the_end(tmp_path, tiny_memory):
    labels = [*cycle("ab", 40), *cycle("abz", 30), *cycle("abz", 30)]
    features = {"penultimate": blobs(labels, noise=0.1)}
    made = make_store(tmp_path / "s", features, {"label": labels}, splits_of(40, 30, 30))

    run = fit_head(made, memory_limit=LIMIT)

    assert run.best.top1 == pytest.approx(20 / 30)
    assert run.metrics["top1"].value > 0.9


def test_settings_that_need_all_features_are_left_out(tmp_path, tiny_memory):
    made = store_of(tmp_path / "s", 240, 90, 90)

    run = fit_head(made, head="svm", memory_limit=LIMIT)

    assert {trial.setting["kernel"] for trial in run.trials} == {"linear"}
    assert "2 settings left out: they need all features in memory." in run.notes


def test_heads_that_do_not_stream_name_those_that_do(tmp_path, tiny_memory):
    made = store_of(tmp_path / "s", 240, 90, 90)

    with pytest.raises(UsageError, match=r"Head 'mlp' needs all features in memory.*\n.*ridge"):
        fit_head(made, head="mlp", memory_limit=LIMIT)
    with pytest.raises(UsageError, match="Head 'logreg' with penalty=l1, C=1 needs all features"):
        fit_head(made, settings=[{"penalty": "l1", "C": 1.0}], memory_limit=LIMIT)


@pytest.mark.parametrize("head", ["knn", "linear", "ridge", "prototype"])
def test_samples_without_label_are_left_out(tmp_path, tiny_memory, head):
    labels = [None if i % 5 == 0 else name for i, name in enumerate(cycle("abc", 420))]
    X = blobs([str(label) for label in labels], noise=0.8)
    made = make_store(tmp_path / "s", {"penultimate": X}, {"label": labels}, splits_of(240, 90, 90))

    held = fit_head(made, head=head)
    streamed = fit_head(made, head=head, memory_limit=LIMIT)

    assert sum(streamed.n_samples.values()) == 336
    assert streamed.best.setting == held.best.setting
    assert streamed.metrics["top1"] == held.metrics["top1"]


SETTINGS = [
    {"k": k, "metric": metric, "temperature": temperature}
    for k in (1, 7, 500)
    for metric in ("cosine", "euclidean")
    for temperature in (None, 0.07)
]


@pytest.mark.parametrize(
    ("scaling", "held_rows"), [("l2", 10_000), ("standardise", 40), ("none", 1)]
)
def test_votes_are_those_in_memory(tmp_path, tiny_memory, monkeypatch, scaling, held_rows):
    monkeypatch.setattr("pipeline.heads.streaming.fit._HELD_BYTES", 1.0)
    monkeypatch.setattr("pipeline.heads.streaming.fit._MIN_HELD_ROWS", held_rows)
    made = store_of(tmp_path / "s", 240, 90, 90)

    held = fit_head(made, head="knn", scaling=scaling, settings=SETTINGS)
    streamed = fit_head(made, head="knn", scaling=scaling, settings=SETTINGS, memory_limit=LIMIT)

    for ours, theirs in zip(streamed.trials, held.trials, strict=True):
        assert ours.setting == theirs.setting
        assert ours.top1 == theirs.top1
        assert ours.scores["nll"] == pytest.approx(theirs.scores["nll"], rel=1e-4)
    np.testing.assert_allclose(
        streamed.predictions.probability, held.predictions.probability, atol=1e-4
    )
    assert streamed.predictions.predicted.tolist() == held.predictions.predicted.tolist()
    assert streamed.model.head.index_.tolist() == held.model.head.index_.tolist()


@pytest.fixture
def run_of_places(tmp_path, tiny_memory, monkeypatch):
    """A saved knn run and its store, which it reads."""
    monkeypatch.chdir(tmp_path)
    made = store_of(Path("s"), 240, 90, 90)
    run = fit_head(made, head="knn", memory_limit=LIMIT)
    return run, run.save(Path("runs")), made


def test_knn_run_holds_places_and_predicts_from_the_store(run_of_places):
    run, folder, made = run_of_places
    X = made.features(layers=["penultimate"])[:]

    bundle = load_bundle(folder)

    assert "The model holds the places of its training samples" in run.notes[1]
    assert f"them from {Path('s').resolve()}, so keep it there" in run.notes[1]
    assert not any(array.shape == (330, 8) for array in run.model.to_arrays().values())
    found = bundle.predict_proba([X])[-90:].max(axis=1)
    np.testing.assert_allclose(found, run.predictions.probability, atol=1e-6)
    assert bundle.model.head.n_trained() == 0


def test_knn_run_is_read_from_any_folder(run_of_places, tmp_path, monkeypatch):
    run, folder, _ = run_of_places
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    bundle = load_bundle(".." / folder)

    assert bundle.model.head.samples_.shape == (330, 8)
    assert run.to_dict()["stores"] == [str(tmp_path.resolve() / "s")]


def test_knn_run_without_its_store_says_so(run_of_places):
    _, folder, made = run_of_places
    made.path.rename("elsewhere")

    with pytest.raises(StoreError, match=r"reads from the store .*/s:(.|\n)*Put the store back"):
        load_bundle(folder)


def test_knn_run_over_another_store_is_refused(run_of_places):
    _, folder, made = run_of_places
    made.path.rename("elsewhere")
    labels = cycle("abc", 420)
    features, splits = {"penultimate": blobs(labels)}, splits_of(240, 90, 90)
    other = make_store(Path("s"), features, {"label": labels}, splits, backbone="other")

    with pytest.raises(MismatchError, match=f"now of recipe {other.key[:8]}, not {made.key[:8]}"):
        load_bundle(folder)


@pytest.mark.parametrize("n", [419, 100])
def test_knn_run_over_other_samples_is_refused(run_of_places, n):
    _, folder, made = run_of_places
    made.path.rename("elsewhere")
    labels = cycle("abc", n)
    make_store(
        Path("s"), {"penultimate": blobs(labels)}, {"label": labels}, splits_of(n),
        ids=[f"{i:05d}.png" for i in range(1, n + 1)],
    )  # fmt: skip

    with pytest.raises(MismatchError, match="samples were added or removed there since"):
        load_bundle(folder)


def test_knn_over_two_stores_comes_back(tmp_path, tiny_memory):
    first = store_of(tmp_path / "s", 240, 90, 90)
    features = {"penultimate": blobs(cycle("cba", 420), n_features=4, noise=2.0, seed=7)}
    other = make_store(
        tmp_path / "o", features, {"label": cycle("cba", 420)}, [""] * 420,
        ids=first.ids()[::-1], backbone="other",
    )  # fmt: skip
    held = fit_head([first, other], head="knn")
    run = fit_head([first, other], head="knn", memory_limit=LIMIT)

    bundle = load_bundle(run.save(tmp_path / "runs"))

    assert run.metrics["top1"] == held.metrics["top1"]
    X = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float16)
    np.testing.assert_allclose(
        bundle.predict_proba([X[:, :8], X[:, 8:]]), held.model.predict_proba(X), atol=1e-5
    )


def test_knn_over_two_stores_refuses_when_the_second_has_other_samples(tmp_path, tiny_memory):
    first, labels = store_of(tmp_path / "s", 240, 90, 90), cycle("abc", 427)
    features, ids = blobs(labels, n_features=4), [f"000_{i}.png" for i in range(7)] + first.ids()

    def second(start):
        return make_store(
            tmp_path / "o", {"penultimate": features[start:]}, {"label": labels[start:]},
            [""] * (427 - start), ids=ids[start:], backbone="other",
        )  # fmt: skip

    run = fit_head([first, second(7)], head="knn", memory_limit=LIMIT)
    folder = run.save(tmp_path / "runs")
    shutil.rmtree(tmp_path / "o")
    second(0)

    with pytest.raises(MismatchError, match=r"store .*/o, but samples were added or removed there"):
        load_bundle(folder)


def test_limit_that_leaves_no_room_says_what_is_needed(tmp_path, tiny_memory):
    made = store_of(tmp_path / "s", 240, 90, 90)

    with pytest.raises(
        ResourceError, match=r"0\.10 GB leaves too little room: Python, (.|\n)* needs about"
    ):
        fit_head(made, memory_limit=1e8)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in other units elsewhere")
@pytest.mark.parametrize(
    ("words", "shape", "room", "note"),
    [
        (["svm", "--param", "kernel=rbf", "--param", "C=1"], (3600, 8), 4.5e8, ""),
        (["logreg", "--param", "C=0.01"], (4500, 512), 2.8e8, "streamed from disk"),
        (["linear", "--param", "epochs=2"], (4500, 1024), 2.8e8, "streamed from disk"),
        (["knn"], (9000, 2048), 4.6e8, "streamed from disk"),
    ],
    ids=["in memory", "logreg", "linear", "knn"],
)
def test_process_stays_within_its_limit(tmp_path, words, shape, room, note):
    features = {"penultimate": np.random.default_rng(0).normal(size=shape)}
    labels, splits = cycle("ab", shape[0]), splits_of(shape[0] - 800, 400, 400)
    made = make_store(tmp_path / "s", features, {"label": labels}, splits)
    command = ["fit-head", str(made.path), "--out", str(tmp_path / "runs"), "--head", *words]

    done = subprocess.run(
        [sys.executable, "-c", WATCH, sys.executable, "-c", FIT_WITHIN, *command, str(room)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert note in " ".join(json.loads(done.stdout)["notes"])
    assert ("streamed" in done.stdout) == bool(note)
    limit, *_, peak = done.stderr.splitlines()
    assert int(peak) < int(limit)


def test_kernel_that_exceeds_the_limit_is_refused(tmp_path):
    made = store_of(tmp_path / "s", 1500, 500, 90)
    limit = resident_bytes() + 2.4e8  # 64 MB more are needed for distances and kernel
    rbf = [{"kernel": "rbf", "C": 1.0}]

    with pytest.raises(UsageError) as caught:
        fit_head(made, head="svm", settings=rbf, memory_limit=limit)

    assert "Head 'svm' with kernel=rbf, C=1 needs all features in memory: this fit takes up to" in (
        str(caught.value)
    )
    needed = float(str(caught.value).split("Take  --memory-limit ")[1].split("GB")[0]) * 1e9
    assert limit < needed < limit + 3e8
    assert fit_head(made, head="svm", settings=rbf, memory_limit=needed).best.top1


def test_limit_that_is_not_reached_changes_nothing(tmp_path):
    made = store_of(tmp_path / "s", 240, 90, 90)

    held, limited = fit_head(made), fit_head(made, memory_limit=1e11)

    assert held.notes == limited.notes
    np.testing.assert_array_equal(held.model.head.coef_, limited.model.head.coef_)


def test_features_larger_than_the_memory_name_the_option(tmp_path, monkeypatch):
    made = store_of(tmp_path / "s", 240, 90, 90)
    monkeypatch.setattr("pipeline.heads.features.available_bytes", lambda: 1000.0)

    with pytest.raises(ResourceError, match="--memory-limit"):
        fit_head(made)


def test_sweep_within_a_limit_is_the_one_in_memory(tmp_path, tiny_memory, monkeypatch):
    monkeypatch.setattr("pipeline.sweep.sweep.must_stream", lambda _, head, *__: head != "mlp")
    made = store_of(tmp_path / "s", 240, 0, 90)
    heads = ("ridge", "knn", "mlp")
    given = (parse_param("mlp.hidden=4"), parse_param("epochs=2"), parse_param("k=1,5,20"))

    held = sweep(made, Plan(heads, params=given, repeats=2), out=tmp_path)
    limited = sweep(made, Plan(heads, params=given, repeats=2, memory_limit=LIMIT), out=tmp_path)

    for ours, theirs in zip(limited.results, held.results, strict=True):
        assert ours.run.best.setting == theirs.run.best.setting
        assert ours.run.metrics["top1"] == theirs.run.metrics["top1"]
        assert ours.repeats == theirs.repeats
        streamed = "streamed from disk" in " ".join(ours.run.notes)
        assert streamed == (ours.run.head != "mlp")
    assert limited.recommended()[0].run.head == held.recommended()[0].run.head
    bundle = load_bundle(limited.save(tmp_path))
    assert bundle.classes == ("a", "b", "c")


def test_head_that_fails_within_a_limit_lets_go_of_the_features(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(
        "pipeline.sweep.sweep.plan_data",
        lambda *args, **options: planned.append(plan(*args, **options)) or planned[-1],
    )
    made = store_of(tmp_path / "s", 240, 0, 90)
    diverging = ("mlp.lr=1e30", "mlp.epochs=2", "mlp.hidden=4", "mlp.dropout=0")
    given = tuple(parse_param(text) for text in diverging)

    run = sweep(made, Plan(("ridge", "mlp"), params=given, memory_limit=1e11), out=tmp_path)

    assert "Every setting of head 'mlp' failed" in run.failures["mlp"]
    assert not {"X", "X_views"} & set(vars(planned[0].inputs))


def test_sweep_within_a_limit_that_cannot_be_shared_is_refused(tmp_path, tiny_memory, monkeypatch):
    monkeypatch.setattr("pipeline.sweep.sweep.must_stream", lambda *_: True)
    X = blobs(cycle("ab", 200))
    layers = {"low": X, "high": X}
    made = make_store(tmp_path / "s", layers, {"label": cycle("ab", 200)}, splits_of(150, 0, 50))

    with pytest.raises(UsageError, match=r"goes with --search grid, and without --time-budget"):
        Plan(search="random", memory_limit=LIMIT)
    with pytest.raises(UsageError, match=r"one set of layers is swept, not each\.\n.*--layers"):
        sweep(made, Plan(layers=("each",), memory_limit=LIMIT), out=tmp_path)
    with pytest.raises(
        UsageError, match=r"one scaling is tried, not standardise, l2\.\n.*--scaling"
    ):
        sweep(made, Plan(("ridge",), scalings=("auto",), memory_limit=LIMIT), out=tmp_path)


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2e9), ("1.5 gb", 1.5e9), ("512MiB", 2**29), ("800000", 8e5)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["lots", "0GB", "-1GB", "2TBs"])
def test_no_size(text):
    with pytest.raises(UsageError, match="expected a size such as 800MB or 2GB"):
        parse_size(text)


def test_one_scaled_copy_at_a_time_where_memory_is_limited(tmp_path, monkeypatch):
    # What a scaling is learned from takes more than a copy of so few samples.
    monkeypatch.setattr("pipeline.heads.scaling._BLOCK_ROWS", 100)
    labels = cycle("abc", 1500)
    X = np.random.default_rng(0).normal(size=(1500, 400)).astype(np.float32)
    made = make_store(
        tmp_path / "s", {"penultimate": X}, {"label": labels}, splits_of(900, 300, 300)
    )

    def peak_bytes(scaling, memory_limit=None):
        tracemalloc.start()
        run = fit_head(made, head="linear", scaling=scaling, memory_limit=memory_limit)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, [(trial.candidate, trial.scores) for trial in run.trials]

    peak_bytes("none")  # what is loaded stays
    alone = max(peak_bytes(scaling)[0] for scaling in SCALINGS)
    all_kept, expected = peak_bytes("auto")
    sparing, found = peak_bytes("auto", 1e12)

    assert found == expected
    assert len({candidate.scaling for candidate, _ in found}) > 1
    copy_bytes = 1200 * 400 * 4
    assert all_kept > alone + 0.5 * copy_bytes
    assert sparing < alone + 0.2 * copy_bytes
