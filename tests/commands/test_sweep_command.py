"""``tlpipe sweep`` and ``tlpipe bench-heads`` from the outside."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.commands import cli
from pipeline.errors import UsageError
from pipeline.runs.folder import read_run
from tests.heads.toy_stores import blobs, cycle, make_store, splits_of

HOSTILE = "</script><img onerror=alert(1)>"


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = cycle(["cat", "dög", HOSTILE], 120)
    layers = {"low": blobs(labels, n_features=3), "penultimate": blobs(labels, n_features=5)}
    columns = {"label": labels, "scene": [f"s{i // 5}" for i in range(120)]}
    return make_store(Path("cache/toys/toy-1"), layers, columns, splits_of(90, 0, 30))


def invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)


def test_table_and_recommendation_go_to_stdout_and_the_path_comes_last(store):
    result = invoke("sweep", store.path, "--head", "ridge,prototype")

    assert result.exit_code == 0
    lines = result.stdout.strip().splitlines()
    assert lines[-1] == str(Path("runs/toys/sweep-toy-0001"))
    assert lines[-2] == f"page: {Path('runs/toys/sweep-toy-0001/report.html')}"
    assert "test top-1 [95 %]" in result.stdout
    assert " is recommended: it has the best top1 on validation, " in result.stdout
    assert "34 trials, chosen by 5 stratified folds of train (90 samples)" in result.stdout
    assert "ridge, alpha=1e+06, standardise, penultimate: top-1" in result.stderr
    assert f"tlpipe inspect {lines[-1]}" in result.stderr


def test_json_is_one_document_and_the_run_the_same(store):
    result = invoke("sweep", store.path, "--json", "--head", "ridge", "--param", "alpha=1,10")

    document = json.loads(result.stdout)
    path = document.pop("path")
    saved = read_run(Path(path))
    assert saved.pop("command").startswith("tlpipe")
    assert saved == document
    assert [line["n_trials"] for line in document["heads"]] == [2]


def test_bench_heads_compares_them_all(store):
    result = invoke(
        "bench-heads", store.path, "--grid", "quick", "--quiet", "--group-column", "scene",
        "--param", "linear.epochs=3", "--param", "mlp.epochs=3", "--param", "mlp.hidden=16",
    )  # fmt: skip

    assert result.exit_code == 0
    assert result.stderr == ""
    run = read_run(Path("runs/toys/bench-heads-toy-0001"))
    names = {line["head"] for line in run["heads"]}
    assert names == {"logreg", "linear", "svm", "mlp", "ridge", "knn", "prototype"}
    assert run["failures"] == {}
    assert "groups" in run["chosen_by"]


def test_a_sweep_is_a_run_like_any_other(store):
    path = invoke("sweep", store.path, "--head", "ridge,knn").stdout.splitlines()[-1]

    shown = invoke("inspect", path)

    assert shown.exit_code == 0
    assert "best top1 on validation" in shown.stdout
    assert path in invoke("ls").stdout


def test_page_is_whole_and_shows_text_as_text(store):
    invoke("sweep", store.path, "--head", "ridge,knn")

    html = Path("runs/toys/sweep-toy-0001/report.html").read_text()

    assert "<title>Heads on cache/toys/toy-1</title>" in html
    assert HOSTILE not in html
    assert "<img onerror" not in html
    assert 'src="http' not in html
    assert "ridge" in html
    assert html.count("</table>") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--param", "gamma=1"], "Unknown parameter of logreg 'gamma'"),
        (["--time-budget", "soon"], "expected a time such as 90s, 10m or 2h"),
        (["--trials", "5"], "A grid tries all of its settings"),
        (["--group-column", "patient"], "Unknown group column 'patient'"),
        (["--select", "f1"], "Unknown metric to choose by 'f1'"),
    ],
)
def test_wrong_options_are_told(arguments, message, store):
    with pytest.raises(UsageError, match=message):
        invoke("sweep", store.path, *arguments)


def test_fit_head_takes_parameters(store):
    result = invoke("fit-head", store.path, "--param", "C=0.5", "--json", "--quiet")

    document = json.loads(result.stdout)
    assert document["setting"] == {"C": 0.5}
    assert len(document["trials"]) == 1


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
def test_ctrl_c_keeps_what_was_tried_and_says_how_to_go_on(store):
    command = [
        sys.executable, Path(__file__).parents[2] / "cli.py", "sweep", store.path,
        "--head", "ridge,mlp", "--param", "mlp.epochs=100000", "--param", "mlp.hidden=512",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    runs = Path("runs/toys")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        journals = list(runs.glob(".trials*.jsonl"))
        if journals and len(journals[0].read_text().splitlines()) == 34:
            break
        time.sleep(0.1)
    time.sleep(1)  # into the fits of the other head

    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "What was tried is kept. To go on:  tlpipe sweep" in told
    assert "--resume" in told
    resumed = invoke("sweep", store.path, "--head", "ridge", "--resume")
    assert resumed.exit_code == 0
    assert not list(runs.glob(".trials*"))
