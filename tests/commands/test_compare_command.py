"""``tlpipe compare`` from the outside: runs that exist, and a small contest from images."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.commands import cli
from pipeline.data import open_source
from pipeline.errors import TlpipeError, UsageError
from pipeline.finetune import by_size
from pipeline.finetune import contest as contests
from pipeline.finetune.checkpoint import StoppedError
from pipeline.finetune.contest import Contest, hold_contest
from pipeline.finetune.fit import Watcher, finetune
from pipeline.finetune.policies import MissingExtraError
from pipeline.finetune.settings import Settings
from pipeline.runs.folder import read_run
from pipeline.sweep.search import take_layers
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of

ROOT = Path(__file__).parents[2]
SMALL = "timm:test_efficientnet"
RESNET = ("--backbone", "resnet18", "--weights", "random", "--image-size", "32")
HEADS = ("--head", "ridge,prototype", "--grid", "quick", "--no-sizes")


def invoke(*arguments):
    return CliRunner().invoke(
        cli, list(map(str, arguments)), catch_exceptions=False, standalone_mode=False
    )


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = cycle("abc", 90)
    store = make_store(
        Path("cache/toys/toy-12345678"), {"penultimate": blobs(labels, noise=1.0)},
        {"label": labels}, splits_of(60, 0, 30),
    )  # fmt: skip
    return [
        invoke("fit-head", store.path, "--head", head, "--quiet").stdout.splitlines()[-1]
        for head in ("ridge", "prototype")
    ]


def test_runs_are_compared_with_a_verdict_a_page_and_a_run_of_its_own(runs):
    result = invoke("compare", *runs)

    assert result.return_value == 0
    lines = result.stdout.strip().splitlines()
    assert lines[-1] == str(Path("runs/toys/compare-0001"))
    assert "against the one above" in result.stdout
    assert "The best on validation is" in result.stdout
    document = read_run(Path(lines[-1]))
    assert [line["path"] for line in document["lines"]] != []
    assert (Path(lines[-1]) / "report.html").stat().st_size > 1_000_000
    shown = invoke("inspect", lines[-1])
    assert document["verdict"] in shown.stdout
    assert lines[-1] in invoke("ls").stdout


def test_a_run_and_something_else_is_refused(runs):
    with pytest.raises(UsageError, match="nowhere is no run"):
        invoke("compare", runs[0], "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "most"], "Unknown policy 'most'"),
        (
            ["--policy", "scratch,scratch:fresh"],
            "scratch:fresh is no other policy.\n  Name scratch",
        ),
        (["--head", "logistic"], "Unknown head 'logistic'"),
        (["--head", "none", "--policy", "full"], "needs a backbone, and two heads or policies"),
        (["--budget", "soon"], "--budget 'soon': expected a time such as"),
        (["--augment", "some"], "Unknown augmentation 'some'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        invoke("compare", tmp_path / "missing", *options)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Dark and bright images: even a random network tells them apart."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(48):
        bright = i % 2
        folder = tmp_path / "photos" / ("bright" if bright else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (40, 40, 3)) + 150 * bright
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return Path("photos")


def test_a_contest_from_images_to_verdict(photos):
    result = invoke(
        "compare", photos, *RESNET, "--head", "ridge,prototype", "--grid", "quick",
        "--policy", "last:1,scratch", "--epochs", "1", "--budget", "60s", "--no-flip",
        "--augment", "none", "--json", "--quiet",
    )  # fmt: skip

    assert result.return_value == 0

    document = json.loads(result.stdout)
    names = {line["name"] for line in document["lines"]}
    assert names == {
        "ridge (resnet18, penultimate)",
        "prototype (resnet18, penultimate)",
        "fine-tuning, last:1 (resnet18)",
        "fine-tuning, scratch (resnet18)",
    }
    assert document["failures"] == {}
    by_name = {line["name"].split(" (")[0]: line for line in document["lines"]}
    assert by_name["ridge"]["extract_seconds"] > 0
    # One started from a head on the store's features, the other from nothing.
    of_the_store = by_name["ridge"]["extract_seconds"]
    assert by_name["fine-tuning, last:1"]["extract_seconds"] == of_the_store
    assert by_name["fine-tuning, scratch"]["extract_seconds"] == 0
    assert by_name["fine-tuning, scratch"]["budget_seconds"] == 30
    settings = read_run(Path(by_name["fine-tuning, scratch"]["path"]))["settings"]
    assert (settings["flip"], settings["augment"]) == (False, "none")
    assert by_name["ridge"]["n_tried"] > 1
    trained = by_name["fine-tuning, scratch"]["n_trained"]
    assert trained > by_name["fine-tuning, last:1"]["n_trained"] > by_name["ridge"]["n_trained"]
    (curve,) = document["sizes"]  # full is not among the policies
    assert curve["name"] in ("ridge (resnet18)", "prototype (resnet18)")
    assert [point["n_per_class"] for point in curve["points"]][:3] == [1, 2, 5]
    assert "Fine-tuning, last:1" in document["verdict"]
    assert all(Path(line["path"], "predictions.csv").exists() for line in document["lines"])


def test_a_comparison_is_refused_as_a_run(runs):
    compared = invoke("compare", *runs, "--quiet").stdout.splitlines()[-1]

    with pytest.raises(UsageError, match="compare-0001 is a comparison itself"):
        invoke("compare", compared, runs[0])


def test_what_cannot_be_learned_is_refused_before_anything_is_embedded(photos):
    rows = [f"{path},{i % 2},{i % 3}" for i, path in enumerate(sorted(photos.rglob("*.png")))]
    Path("two.csv").write_text("path,kind,side\n" + "\n".join(rows))

    for options, error, message in (
        (["two.csv"], UsageError, "has several label columns: kind, side"),
        (["two.csv", "--label", "kind", "--group-column", "x"], UsageError, "group column 'x'"),
        ([photos, "--policy", "full,last:9"], UsageError, "resnet18: Policy last:9 asks for more"),
    ):
        with pytest.raises(error, match=message):
            invoke("compare", *options, *RESNET, "--cache", "none-yet")

    assert not Path("none-yet").exists()


def test_a_missing_package_is_missed_before_anything_is_embedded(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)

    with pytest.raises(MissingExtraError, match="--policy lora needs the package peft"):
        invoke("compare", photos, *RESNET, "--policy", "lora", "--cache", "none-yet")

    assert not Path("none-yet").exists()


def test_groups_are_never_parted(photos):
    rows = [f"{path},{i % 2},{i // 4}" for i, path in enumerate(sorted(photos.rglob("*.png")))]
    Path("grouped.csv").write_text("path,label,scene\n" + "\n".join(rows))

    result = invoke(
        "compare", "grouped.csv", "--group-column", "scene", "--label", "label", "--backbone",
        "pixels", *HEADS, "--policy", "none", "--quiet",
    )  # fmt: skip

    assert result.return_value == 0
    assert (
        "of the groups of scene" in read_run(Path(result.stdout.splitlines()[-1]))["split_origin"]
    )


def test_images_that_were_skipped_are_named(photos):
    (photos / "dark" / "broken.png").write_bytes(b"no image")

    result = invoke("compare", photos, "--backbone", "pixels", *HEADS, "--policy", "none")

    assert result.return_value == 3
    assert "Skipped dark/broken.png: " in result.stderr
    run = Path(result.stdout.splitlines()[-1])
    assert list(read_run(run)["skipped"]) == ["dark/broken.png"]
    assert "Skipped dark/broken.png" in (run / "report.html").read_text()


def contest(**options):
    given = {
        "backbones": ("resnet18",), "heads": ("ridge",), "weights": "random", "image_size": 32,
        "grid": "quick", "policies": ("head", "scratch"), "sizes": False,
        "training": Settings(epochs=2, lr=1e-3, batch_size=16, flip=False),
    }  # fmt: skip
    return Contest(**given | options)


def hold(photos, contest, **options):
    return hold_contest(
        open_source(str(photos)), contest, cache_dir=Path("cache"), out=Path("runs"), **options
    )


def test_a_policy_that_fails_is_told_though_quiet_and_the_others_are_compared(photos):
    result = invoke(
        "compare", photos, "--backbone", "pixels", *HEADS, "--policy", "bitfit", "--quiet"
    )

    assert result.return_value == 3
    assert "Error: bitfit (pixels) failed: Policy 'bitfit' finds nothing" in result.stderr
    document = read_run(Path(result.stdout.splitlines()[-1]))
    assert len(document["lines"]) == 2
    assert list(document["failures"]) == ["bitfit (pixels)"]


def test_with_one_run_left_the_reasons_and_the_run_are_named(photos):
    pixels = contest(backbones=("pixels",), weights="default", policies=("bitfit",))

    with pytest.raises(TlpipeError, match=r"Only 1 of the 2 runs came about") as raised:
        hold(photos, pixels)

    assert "bitfit (pixels): Policy 'bitfit' finds nothing" in str(raised.value)
    assert "It is kept in runs/ridge-pixels-32-0001" in str(raised.value)
    assert raised.value.exit_code == 1


def test_a_contest_that_was_stopped_goes_on_where_it_was(photos):
    epochs = []
    stops = Watcher(on_epoch=lambda entry: epochs.append(entry["epoch"]))

    with pytest.raises(StoppedError, match=r"Stopped at scratch \(resnet18\); the parts that were"):
        # Both epochs of "head" with the state before them, and the first ones of "scratch".
        hold(photos, contest(), watcher=stops, should_stop=lambda: len(epochs) > 4)
    n_before, notes = len(epochs), []
    outcome = hold(photos, contest(), watcher=stops, on_note=notes.append)

    assert [path.name for path in outcome.paths] == [
        "ridge-resnet18-0001", "finetune-head-resnet18-0001", "finetune-scratch-resnet18-0001",
    ]  # fmt: skip
    assert notes.count("Taken up: frozen (resnet18) is done.") == 1
    assert notes.count("Taken up: head (resnet18) is done.") == 1
    assert n_before > 4
    assert len(epochs) == 6
    assert not [path.name for path in Path("runs").iterdir() if path.name.startswith(".")]


def test_heads_that_were_stopped_are_taken_up(photos):
    told = []

    with pytest.raises(StoppedError, match=r"Stopped at frozen \(resnet18\); the parts"):
        hold(
            photos, contest(heads=("ridge", "prototype"), policies=()),
            on_note=told.append, should_stop=lambda: bool(told),
        )  # fmt: skip

    assert list(Path("runs").glob(".*"))


@pytest.fixture
def trained(monkeypatch):
    """Every run of a training, as it comes about."""
    found = []

    def spy(*args, **options):
        found.append(finetune(*args, **options))
        return found[-1]

    monkeypatch.setattr(contests, "finetune", spy)
    return found


def test_training_all_of_the_network_has_a_curve_that_the_table_does_not_pay_for(photos, trained):
    epochs = []
    watcher = Watcher(on_epoch=epochs.append)

    outcome = hold(
        photos, contest(backbones=(SMALL,), policies=("full",), sizes=True), watcher=watcher
    )

    ridge, full = outcome.sizes
    assert (ridge.name, full.name) == (f"ridge ({SMALL})", f"fine-tuning, full ({SMALL})")
    assert full.how.startswith("each of 2 epochs at learning rate 0.001")
    (run,) = (path for path in outcome.paths if "finetune" in path.name)
    document = read_run(run)
    few, whole = full.points
    assert (few.n_per_class, few.n_samples, len(few.draws)) == (2, 4, 3)
    assert whole.draws == (document["metrics"]["test"]["top1"]["value"],)
    # What is told of a point trained it, and all of that: nobody of so few chooses an epoch.
    assert [run.n_fit for run in trained] == [whole.n_samples, 4, 4, 4]
    assert [run.best_epoch for run in trained[1:]] == [2, 2, 2]
    assert whole.n_samples < ridge.points[-1].n_samples
    assert full.n_fits == 3
    assert full.seconds == pytest.approx(sum(run.seconds["total"] for run in trained[1:]))
    # Told of are the epochs of the run, which is the only one that is kept.
    assert [entry["epoch"] for entry in epochs] == [0, 1, 2]
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted(
        path.name for path in outcome.paths
    )
    assert [curve["name"] for curve in outcome.to_dict()["sizes"]] == [ridge.name, full.name]


def test_a_fitted_head_against_a_fresh_one(photos):
    outcome = hold(photos, contest(heads=("ridge",), policies=("full", "full:fresh")))

    lines = {line["name"]: line for line in outcome.comparison.lines()}
    assert set(lines) == {
        "ridge (resnet18, penultimate)",
        "fine-tuning, full from ridge-resnet18-0001 (resnet18)",
        "fine-tuning, full from a fresh head (resnet18)",
    }
    fitted, fresh = (
        read_run(path)["head_start"] for path in outcome.paths if "finetune" in path.name
    )
    assert (Path(fitted).name, fresh) == ("ridge-resnet18-0001", "fresh")
    with pytest.raises(UsageError, match="Unknown policy 'ful'"):
        contest(policies=("ful:fresh",))


def test_the_budget_has_a_part_for_fewer_samples(photos, trained):
    timed = contest(
        backbones=(SMALL,), heads=(), policies=("head", "full"), budget_seconds=60.0, sizes=True
    )

    (full,) = hold(photos, timed).sizes

    assert full.how.startswith("each of at most 2 epochs or a share of the budget at learning rate")
    budgets = [run.settings.budget_seconds for run in trained]
    assert budgets[:2] == [20, 20]
    assert sum(budgets) == pytest.approx(60)
    assert contest(policies=("head", "last:1"), sizes=True).training_seconds(0) is None


def test_without_a_test_split_no_part_of_the_budget_waits_for_a_curve(photos, trained):
    rows = [
        f"{path},{path.parent.name},{'val' if i % 3 == 0 else 'train'}"
        for i, path in enumerate(sorted(photos.rglob("*.png")))
    ]
    Path("no_test.csv").write_text("path,label,split\n" + "\n".join(rows))
    timed = contest(
        backbones=(SMALL,), heads=(), policies=("head", "full"), budget_seconds=60.0, sizes=True
    )

    outcome = hold("no_test.csv", timed)

    assert [run.settings.budget_seconds for run in trained] == [30, 30]
    assert outcome.sizes == []


def test_a_training_with_fewer_samples_that_fails_is_named_and_has_no_curve(photos, monkeypatch):
    def fails_with_few(source, *args, **options):
        if len(source.samples) < 48:
            raise TlpipeError("no room\nmore")
        return finetune(source, *args, **options)

    monkeypatch.setattr(contests, "finetune", fails_with_few)
    told = []

    outcome = hold(
        photos, contest(backbones=(SMALL,), policies=("full",), sizes=True), on_note=told.append
    )

    few = [f"full with 2 a class, draw {draw} ({SMALL})" for draw in (1, 2, 3)]
    assert list(outcome.failures) == few
    assert f"{few[0]} failed: no room" in told
    assert [curve.name for curve in outcome.sizes] == [f"ridge ({SMALL})"]


def test_without_a_fitted_head_a_fresh_one_is_said_to_be_the_same(photos):
    told = []

    small = contest(backbones=(SMALL,), heads=(), policies=("full", "full:fresh"))
    hold(photos, small, on_note=told.append)

    assert (
        f"No run of a head suits {SMALL}, so full started from a fresh head and is the same "
        "training as full:fresh." in told
    )


def test_what_another_release_wrote_down_is_done_anew(photos):
    told = []
    mine = contest(
        backbones=("pixels",), weights="default", heads=("ridge", "prototype"), policies=("bitfit",)
    )
    hold(photos, mine)  # bitfit fails, so that the record stays
    (record,) = Path("runs").glob(".compare-*.json")
    document = json.loads(record.read_text())
    del document["parts"]["frozen (pixels)"]["curves"]
    record.write_text(json.dumps(document))

    outcome = hold(photos, mine, on_note=told.append)

    assert not [note for note in told if note.startswith("Taken up: frozen")]
    assert len(outcome.paths) == 2


def test_groups_have_curves_too(photos):
    rows = [f"{path},{i % 2},{i // 4}" for i, path in enumerate(sorted(photos.rglob("*.png")))]
    Path("grouped.csv").write_text("path,label,scene\n" + "\n".join(rows))
    grouped = contest(
        backbones=(SMALL,), policies=("full",), sizes=True, label="label", groups="scene"
    )

    outcome = hold("grouped.csv", grouped)

    assert outcome.failures == {}
    ridge, full = outcome.sizes
    assert [point.n_per_class for point in ridge.points][:2] == [1, 2]
    assert full.points[0].n_per_class == 2


@pytest.mark.parametrize("curve", ["frozen", "full"])
def test_curves_that_were_stopped_are_taken_up(photos, monkeypatch, curve):
    told, asked = [], []
    monkeypatch.setattr(by_size, "take_layers", lambda *args: asked.append(1) or take_layers(*args))

    def stop():
        # The first fit of the frozen curve, or in the second training of the other one.
        return bool(asked) if curve == "frozen" else sum("samples: " in n for n in told) == 1

    mine = contest(backbones=(SMALL,), policies=("full",), sizes=True)
    part = "frozen, with fewer samples" if curve == "frozen" else "full with 2 a class, draw 2"
    with pytest.raises(StoppedError) as stopped:
        hold(photos, mine, on_note=told.append, should_stop=stop)
    assert str(stopped.value) == f"Stopped at {part} ({SMALL}); the parts that were done are kept."
    n_before = len(told)
    outcome = hold(photos, mine, on_note=told.append)

    taken = [note for note in told[n_before:] if note.startswith("Taken up")]
    assert taken[0] == f"Taken up: frozen ({SMALL}) is done."
    assert (f"Taken up: full with 2 a class, draw 1 ({SMALL}) is done." in taken) == (
        curve == "full"
    )
    assert [(one.name, one.n_fits) for one in outcome.sizes][1] == (
        f"fine-tuning, full ({SMALL})", 3
    )  # fmt: skip
    assert len(outcome.paths) == 2
    assert not [path.name for path in Path("runs").iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
def test_control_c_says_how_to_go_on(photos, tmp_path, interrupted):
    words = [
        "compare",
        "photos",
        *RESNET,
        "--head",
        "none",
        "--policy",
        "head,full",
        "--epochs",
        "4000",
    ]
    code, out, err = interrupted(words, tmp_path, "runs/photos/.finetune-*")

    assert code == 130
    assert out == ""
    assert "Go on with:" in err
    assert err.splitlines()[-1].strip().startswith("tlpipe compare photos")
