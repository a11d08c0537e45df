"""Several label columns on the command line: fit-head, inspect, ls, compare, predict."""

import csv
import io
import json
from pathlib import Path

import pytest

from tests.commands.test_flow import write_photo

FEW = ("--param", "hidden=16", "--param", "epochs=15", "--param", "lr=1e-2")


@pytest.fixture
def store(tmp_path, monkeypatch, tlpipe):
    """Features of 40 photographs by flower and by parity; every fourth has no parity."""
    monkeypatch.chdir(tmp_path)
    lines = ["path,flower,parity,split"]
    for i in range(40):
        flower = ("rose", "iris")[i % 4 // 2]
        write_photo(tmp_path / "photos" / flower / f"{i:02d}.png", i)
        parity = "" if i % 4 == 0 else ("even", "odd")[i % 2]
        lines.append(
            f"photos/{flower}/{i:02d}.png,{flower},{parity},{'test' if i > 27 else 'train'}"
        )
    Path("photos.csv").write_text("\n".join(lines))
    return tlpipe("extract", "photos.csv", "--backbone", "pixels:4")[1].splitlines()[-1]


@pytest.fixture
def run(store, tlpipe):
    words = ("--label", "flower", "--label", "parity", *FEW)
    return tlpipe("fit-head", store, "--head", "mlp", *words)[1].splitlines()[-1]


def test_fit_head_prints_a_line_for_each_label(store, tlpipe):
    words = ("--head", "mlp", "--label", "flower", "--label", "parity", *FEW)

    code, out, err = tlpipe("fit-head", store, *words, "--task-weights", "uncertainty")

    assert code == 0
    assert "flower, test (12)" in out
    assert "parity, test (9)" in out
    assert "10 of 40 samples without a label in column 'parity': they count in the others." in err
    assert "means over its labels" in err
    path = Path(out.splitlines()[-1])
    assert json.loads((path / "run.json").read_text())["task_weighting"] == "uncertainty"


def test_inspect_and_ls_tell_every_label(run, tlpipe):
    _, out, _ = tlpipe("inspect", run)
    listed = tlpipe("ls")[1]

    assert "flower, 2 classes, weight 0.50; parity, 2 classes, weight 0.50" in out
    lines = [line.split()[:2] for line in out.splitlines() if "[" in line]
    assert lines == [["flower", "test"], ["parity", "test"]]
    assert "(mean of 2 labels)" in listed


def test_predict_prints_a_line_for_each_image_and_label(run, tlpipe):
    files = (run, "photos/iris/02.png", "photos/rose/04.png")

    rows = list(csv.DictReader(io.StringIO(tlpipe("predict", *files, "--format", "csv")[1])))
    document = json.loads(tlpipe("predict", *files, "--json", "--top", "2")[1])

    assert list(rows[0]) == ["image", "task", "class", "probability"]
    assert [row["task"] for row in rows] == ["flower", "parity"] * 2
    assert [row["class"] for row in rows[::2]] == ["iris", "rose"]
    found = document["predictions"]
    assert [one["task"] for one in found] == ["flower", "parity"] * 2
    assert [one["classes"][0] for one in found] == [row["class"] for row in rows]
    assert all(sum(one["probabilities"]) == pytest.approx(1, abs=1e-5) for one in found)


def test_compare_has_a_line_for_each_label(store, run, tlpipe):
    alone = tlpipe("fit-head", store, "--head", "ridge", "--label", "parity")[1].splitlines()[-1]

    code, out, _ = tlpipe("compare", run, alone)

    assert code == 0
    assert sum("pixels" in line and ", parity " in line for line in out.splitlines()) == 2
    assert sum("pixels" in line and ", flower " in line for line in out.splitlines()) == 1


def test_one_label_prints_what_it_always_has(store, tlpipe):
    out = tlpipe("fit-head", store, "--head", "ridge", "--label", "flower")[1]
    run = out.splitlines()[-1]

    assert "\n test (12)" in out
    assert "task" not in tlpipe("predict", run, "photos/iris/02.png", "--json")[1]
    document = json.loads((Path(run) / "run.json").read_text())
    assert (document["label"], document["classes"]) == ("flower", ["iris", "rose"])
    assert "tasks" not in document


@pytest.mark.parametrize("command", ["sweep", "bench-heads", "compare"])
def test_commands_of_one_label_refuse_several(store, tlpipe, command):
    target = "photos.csv" if command == "compare" else store

    code, _, err = tlpipe(command, target, "--label", "flower", "--label", "parity")

    assert code == 2
    assert f"{command} learns one label column, not several (flower, parity)" in err
    assert "tlpipe fit-head --head mlp --label flower --label parity" in err


def test_other_heads_refuse_several(store, tlpipe):
    code, _, err = tlpipe("fit-head", store, "--label", "flower", "--label", "parity")

    assert code == 2
    assert "Head 'logreg' learns one label column, not several (flower, parity)." in err
    assert "tlpipe fit-head --head mlp --label flower --label parity" in err


def test_weights_of_one_label_are_refused(store, tlpipe):
    code, _, err = tlpipe("fit-head", store, "--label", "flower", "--task-weights", "uncertainty")

    assert code == 2
    assert "--task-weights uncertainty weighs several label columns" in err
