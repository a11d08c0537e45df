"""``tlpipe fit-head`` from the outside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.commands import cli
from pipeline.errors import DataError, StoreError, UnknownNameError, UsageError
from pipeline.runs.bundle import load_bundle
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = cycle(["cat", "dög", "[red]=cmd()"], 90)
    layers = {"low": blobs(labels, n_features=3), "penultimate": blobs(labels, n_features=5)}
    columns = {"label": labels, "sex": cycle("fm", 90)}
    return make_store(Path("cache/toys/toy-1"), layers, columns, splits_of(60, 0, 30))


def invoke(*arguments):
    return CliRunner().invoke(cli, ["fit-head", *map(str, arguments)], catch_exceptions=False)


def test_results_go_to_stdout_and_the_path_comes_last(store):
    result = invoke(store.path)

    assert result.exit_code == 0
    lines = result.stdout.strip().splitlines()
    assert lines[-1] == str(Path("runs/toys/logreg-toy-0001"))
    assert "top-1 [95 %]" in result.stdout
    assert "chosen by 5 stratified folds of train (60 samples) among 6" in result.stdout
    assert "C=0.01: top-1" in result.stderr
    assert f"tlpipe predict {lines[-1]} image.jpg" in result.stderr
    assert f"tlpipe inspect {lines[-1]}" in result.stderr
    assert load_bundle(lines[-1]).classes == ("[red]=cmd()", "cat", "dög")


def test_json_is_one_document(store):
    result = invoke(store.path, "--json", "--head", "ridge", "--out", "elsewhere")

    document = json.loads(result.stdout)
    assert document["path"] == str(Path("elsewhere/ridge-toy-0001"))
    assert document["metrics"]["test"]["top1"]["low"] <= 1
    assert document["scored_on"] == "test"
    saved = json.loads(Path(document["path"], "run.json").read_text())
    assert saved.pop("command").startswith("tlpipe")
    assert {"path": document["path"]} | saved == document


def test_quiet_leaves_stderr_empty(store):
    result = invoke(store.path, "--quiet", "--head", "prototype")

    assert result.stderr == ""
    assert "prototype-toy-0001" in result.stdout


def test_options_reach_the_head(store):
    result = invoke(
        store.path, "--json", "--quiet", "--head", "knn", "--layers", "penultimate, low",
        "--label", "sex", "--scaling", "none", "--seed", "3",
    )  # fmt: skip

    document = json.loads(result.stdout)
    assert document["layers"] == [["penultimate", "low"]]
    assert document["classes"] == ["f", "m"]
    assert (document["scaling"], document["seed"]) == ("none", 3)


def test_runs_are_never_overwritten(store):
    first, second = (invoke(store.path, "--quiet").stdout.split()[-1] for _ in range(2))

    assert (Path(first).name, Path(second).name) == ("logreg-toy-0001", "logreg-toy-0002")


def test_warnings_are_told_on_stderr(store, tmp_path):
    labels = cycle("ab", 40)
    made = make_store(
        tmp_path / "s", {"penultimate": blobs(labels)}, {"label": labels}, splits_of(30, 10)
    )

    result = invoke(made.path)

    assert "Warning: there is no test split. The scores are of the samples" in result.stderr
    assert "validation (chose the setting)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--head", "logrge"], UnknownNameError, "Did you mean: logreg"),
        (["--layers", "penultimat"], UnknownNameError, "Did you mean: penultimate"),
        (["--label", "lable"], UnknownNameError, "Did you mean: label"),
        (["--scaling", "std"], UnknownNameError, "Unknown scaling 'std'"),
    ],
)
def test_wrong_names_are_usage_errors(arguments, error, message, store):
    with pytest.raises(error, match=message) as caught:
        invoke(store.path, *arguments)

    assert isinstance(caught.value, UsageError)
    assert caught.value.exit_code == 2
    assert not Path("runs").exists()


def test_what_is_no_store_is_a_store_error(tmp_path):
    with pytest.raises(StoreError) as caught:
        invoke(tmp_path / "nowhere")

    assert caught.value.exit_code == 4


def test_unlabelled_store_is_a_data_error(tmp_path):
    made = make_store(tmp_path / "s", {"penultimate": np.zeros((4, 2))}, {}, [""] * 4)

    with pytest.raises(DataError, match="has no labels") as caught:
        invoke(made.path)

    assert caught.value.exit_code == 4


def test_error_is_one_message_without_traceback(store):
    main = "from pipeline.commands import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", main, "fit-head", store.path, "--head", "transformer"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: Unknown head 'transformer'.")
    assert "Traceback" not in done.stderr
