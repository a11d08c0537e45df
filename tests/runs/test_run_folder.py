"""Run folders are whole or not there, and never overwritten."""

import csv
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import CorruptStoreError, ResourceError, StoreError, StoreFormatError
from pipeline.runs.folder import create_run, read_run, safe_name, write_json
from pipeline.runs.predictions import Predictions
from pipeline.sweep.fit import fit_head


def write_something(folder: Path) -> None:
    (folder / "run.json").write_text("{}")


def test_runs_are_numbered(tmp_path):
    names = [create_run(tmp_path / "a", "logreg-toy", write_something).name for _ in range(3)]

    assert names == ["logreg-toy-0001", "logreg-toy-0002", "logreg-toy-0003"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names


def test_number_follows_the_highest(tmp_path):
    (tmp_path / "knn-toy-0041").mkdir()
    (tmp_path / "knn-toy-later").mkdir()

    assert create_run(tmp_path, "knn-toy", write_something).name == "knn-toy-0042"


def test_many_at_once_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: create_run(tmp_path, "r", write_something), range(24)))

    assert len(set(runs)) == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(run.name for run in runs)


def test_failure_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        write_something(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_run(tmp_path, "r", fail)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_told_and_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        write_something(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ResourceError, match=r"No space left[^$]*nothing is left of it[^$]*--out"):
        create_run(tmp_path, "r", fail)
    assert list(tmp_path.iterdir()) == []


def test_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "runs").write_text("")

    with pytest.raises(StoreError, match="cannot be written to"):
        create_run(tmp_path / "runs", "r", write_something)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("logreg-efficientnet_lite0", "logreg-efficientnet_lite0"),
        ("timm:vit/16", "timm-vit-16"),
        ("../../etc", "..-etc"),
        ("..", "run"),
        ("", "run"),
        ("dög\n", "d-g"),
        ("x" * 300, "x" * 100),
    ],
)
def test_names_of_strangers_are_made_safe(name, safe):
    assert safe_name(name) == safe


def test_run_says_what_was_done(store, tmp_path):
    fitted = fit_head(store)

    path = fitted.save(tmp_path / "runs", command="tlpipe fit-head store")

    assert path.name == "logreg-toy-0001"
    assert sorted(file.name for file in path.iterdir()) == [
        "card.json",
        "model.safetensors",
        "predictions.csv",
        "run.json",
    ]
    run = read_run(path)
    assert run["command"] == "tlpipe fit-head store"
    assert run["chosen_by"] == "5 stratified folds of train (60 samples)"
    assert run["scored_on"] == "test"
    assert len(run["trials"]) == 6
    assert run["metrics"]["test"]["top1"].keys() == {"value", "low", "high"}
    assert np.sum(run["confusion"]["counts"]) == 30
    assert run["n_samples"] == {"train": 60, "val": 0, "test": 30}
    assert {"tlpipe", "scikit-learn", "torch"} <= run["versions"].keys()


def test_default_place_is_named_after_the_data_source(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert fit_head(store, head="ridge").save() == Path("runs/toys/ridge-toy-0001")


def test_predictions_are_a_plain_csv_file(tmp_path):
    names = ["=cmd()", 'a,"b"', "line\nbreak", "dög\udc80"]
    columns = np.array(names, dtype=object)
    predictions = Predictions(columns, columns, columns, columns, np.linspace(0.25, 1, 4))

    predictions.write(tmp_path / "p.csv")

    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["id", "split", "label", "predicted", "probability"]
    assert [row[0] for row in rows[1:]] == [*names[:3], "dög\\udc80"]
    assert [float(row[4]) for row in rows[1:]] == [0.25, 0.5, 0.75, 1]


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(StoreFormatError, match=r"is not a run: it has no run.json.\n  List the ru"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CorruptStoreError, match="not valid JSON"):
        read_run(tmp_path)
    write_json(tmp_path / "run.json", {"format": "tlpipe-run", "format_version": 7})
    with pytest.raises(StoreFormatError, match="format version 7; this release reads 1"):
        read_run(tmp_path)
    write_json(tmp_path / "run.json", [1])
    with pytest.raises(StoreFormatError, match="has format None"):
        read_run(tmp_path)
