"""``tlpipe finetune`` from the outside."""

import json
import sys
from pathlib import Path

import pytest

from tests.finetune.conftest import write_photos

ROOT = Path(__file__).parents[2]
QUICK = (
    "--backbone", "timm:test_efficientnet", "--weights", "random", "--image-size", "32",
    "--lr", "0.001", "--batch-size", "8", "--threads", "2", "--device", "cpu",
)  # fmt: skip


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_photos(tmp_path / "photos")


def test_a_run_is_printed_inspected_listed_and_predicts(tlpipe, photos):
    code, out, err = tlpipe("finetune", "photos", *QUICK, "--epochs", "2")

    run = out.strip().splitlines()[-1]
    assert code == 0
    assert run == str(Path("runs/photos/finetune-full-timm-test_efficientnet-0001"))
    assert "top-1 [95 %]" in out
    assert "learning rate 0.001, epoch" in out
    assert "epoch 2 of 2: loss" in err
    assert f"tlpipe predict {run} image.jpg" in err

    code, out, _ = tlpipe("inspect", run)
    assert code == 0
    assert "timm:test_efficientnet, weights random:seed=0" in out
    assert "20% of train (stratified, seed 0, 6 samples)" in out

    code, out, _ = tlpipe("ls")
    assert run in out
    assert "finetune full" in out

    code, out, _ = tlpipe("predict", run, "photos/a", "--format", "csv", "--device", "cpu")
    assert code == 0
    assert len(out.strip().splitlines()) == 11

    code, out, _ = tlpipe("inspect", run, "--json")
    assert json.loads(out)["kind"] == "finetune"


def test_json_is_one_document_and_quiet_is_quiet(tlpipe, photos):
    code, out, err = tlpipe("finetune", "photos", *QUICK, "--epochs", "1", "--json", "--quiet")

    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["settings"]["epochs"] == 1
    saved = json.loads(Path(document.pop("path"), "run.json").read_text())
    assert saved.pop("command").startswith("tlpipe finetune photos")
    assert saved == document


def test_skipped_images_are_listed_and_make_the_exit_code(tlpipe, photos):
    (photos / "b" / "03.png").write_bytes(b"nothing")

    code, _, err = tlpipe("finetune", "photos", *QUICK, "--epochs", "1", "--policy", "head")

    assert code == 3
    assert "Skipped b/03.png: " in err
    code, _, err = tlpipe(
        "predict", "runs/photos/finetune-head-timm-test_efficientnet-0001", "photos/b"
    )
    assert code == 3
    assert "Skipped photos/b/03.png" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--policy", "ful"], 2, "Did you mean: full"),
        (["--lr", "fast"], 2, "--lr takes auto or a number"),
        (["--policy", "last:9"], 2, "asks for more blocks than the 5"),
        (["--budget", "soon"], 2, "expected a time such as"),
        (["--init-head", "nowhere"], 4, "nowhere is not a run"),
        (["--precision", "fp16"], 2, "CPUs are slow in fp16"),
        (["--log", "tensorbord"], 2, "Did you mean: tensorboard"),
        (["--log", "mlflow"], 1, "--log mlflow needs the package mlflow"),
    ],
)
def test_what_does_not_fit_is_said(tlpipe, photos, words, code, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)

    found, _, err = tlpipe("finetune", "photos", *QUICK, *words)

    assert found == code
    assert said in err
    assert "Traceback" not in err


def test_a_card_from_a_stranger_is_data(tlpipe, photos):
    _, out, _ = tlpipe("finetune", "photos", *QUICK, "--epochs", "1", "--policy", "head")
    run = Path(out.strip().splitlines()[-1])
    card = json.loads((run / "card.json").read_text())
    for change, said in (
        ({"model_sha256": "0" * 64}, "one of the two was changed or damaged"),
        ({"classes": ["a"]}, "classes are"),
        ({"architecture": {**card["architecture"], "hidden": [10**9]}}, "hidden is"),
        (
            {"architecture": {**card["architecture"], "hidden": [4]}},
            "does not hold the network of its card",
        ),
        (
            {
                "architecture": {
                    **card["architecture"],
                    "origin": {**card["architecture"]["origin"], "weights": "evil.pth"},
                }
            },
            "origin is",
        ),
    ):
        (run / "card.json").write_text(json.dumps(card | change))
        code, _, err = tlpipe("predict", run, "photos/a/00.png")
        assert code == 4
        assert said in err


def test_control_c_keeps_everything_and_says_how_to_go_on(photos, tmp_path, interrupted):
    words = ["finetune", "photos", *QUICK, "--epochs", "400", "--patience", "0"]
    code, out, err = interrupted(words, tmp_path, "runs/photos/.finetune-*/metrics.jsonl")

    assert code == 130
    assert out == ""
    assert "all of it is kept" in err
    assert "tlpipe finetune photos" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("--resume")
    assert list(tmp_path.glob("runs/photos/.finetune-*/checkpoint.pt"))
