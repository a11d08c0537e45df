"""``tlpipe compare`` from the outside: runs that exist, and a small contest from images."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.commands import cli
from pipeline.errors import UsageError
from pipeline.runs.folder import read_run
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of


def invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)


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

    assert result.exit_code == 0
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
        (["--head", "logistic"], "Unknown head 'logistic'"),
        (["--head", "none", "--policy", "full"], "needs a backbone, and two heads or policies"),
        (["--budget", "soon"], "expected a time such as"),
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
        "compare", photos, "--backbone", "resnet18", "--weights", "random", "--image-size", "32",
        "--head", "ridge,prototype", "--grid", "quick", "--policy", "last:1,scratch",
        "--epochs", "1", "--budget", "60s", "--json", "--quiet",
    )  # fmt: skip

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
    assert by_name["fine-tuning, last:1"]["extract_seconds"] == 0
    trained = by_name["fine-tuning, scratch"]["n_trained"]
    assert trained > by_name["fine-tuning, last:1"]["n_trained"] > by_name["ridge"]["n_trained"]
    assert [p["n_per_class"] for p in document["sizes"]["resnet18"]][:3] == [1, 2, 5]
    assert "Fine-tuning, last:1" in document["verdict"]
    assert all(Path(line["path"], "predictions.csv").exists() for line in document["lines"])
