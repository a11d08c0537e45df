"""``tlpipe finetune`` with several label columns, from the outside."""

import json
from pathlib import Path

from tests.commands.test_finetune_command import QUICK
from tests.finetune.test_multitask import write_table


def test_two_columns_are_learned_shown_and_predicted(tlpipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "table")
    labels = ("--label", "species", "--label", "light")

    code, out, err = tlpipe(
        "finetune", table, *labels, *QUICK, "--epochs", "1", "--task-weights", "uncertainty",
        "--group-column", "scene",
    )  # fmt: skip

    run = out.strip().splitlines()[-1]
    assert code == 0
    assert run == str(Path("runs/table/finetune-full-timm-test_efficientnet-0001"))
    assert "species, test (" in out
    assert "light, validation (chose the epoch)" in out
    assert "learned weights of the losses: species 1." in out or "species 0." in out
    assert "3 + 2 classes" in out
    assert "without a label in column 'light'" in err

    code, out, _ = tlpipe("predict", run, table.parent / "00.png", "--format", "csv")
    assert code == 0
    assert [line.split(",")[1] for line in out.splitlines()] == ["task", "species", "light"]

    code, out, _ = tlpipe("inspect", run, "--json")
    assert [task["label"] for task in json.loads(out)["tasks"]] == ["species", "light"]


def test_a_weighting_for_a_single_column_is_refused(tlpipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "table", n=12)

    code, _, err = tlpipe(
        "finetune", table, "--label", "species", *QUICK, "--task-weights", "uncertainty"
    )

    assert code == 2
    assert "Give a second --label, or leave --task-weights out." in err
