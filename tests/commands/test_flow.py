"""The commands as a user types them: exit codes, what goes where, and the texts of errors."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from pipeline.store import open_store

ROOT = Path(__file__).parents[2]


def write_photo(path: Path, seed: int, size=(64, 48)) -> None:
    """A smooth image; classes differ by their colour."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 90, (4, 5, 3), dtype=np.uint8)
    small[..., 0 if path.parent.name == "rose" else 2] += 160
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with 40 photographs of two classes in mixed sizes."""
    monkeypatch.chdir(tmp_path)
    for i in range(40):
        write_photo(tmp_path / "photos" / ("rose", "iris")[i % 2] / f"{i:02d}.jpg", i,
                    size=(30 + i, 70 - i))  # fmt: skip
    return tmp_path


def run_process(*words, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, words)],
        capture_output=True, text=True, timeout=120, check=False, **options,
    )  # fmt: skip


def test_from_images_to_classes_of_new_images(here, tlpipe):
    code, out, err = tlpipe("extract", "photos", "--backbone", "pixels:4")
    assert code == 0
    store = out.splitlines()[-1]
    assert "40 samples: 0 found in the store, 40 embedded, 0 skipped" in err
    assert f"tlpipe fit-head {store}" in err

    code, out, err = tlpipe("fit-head", store)
    assert code == 0
    run = out.splitlines()[-1]
    assert f"tlpipe predict {run}" in err
    assert (Path(run) / "run.json").is_file()

    write_photo(here / "new" / "rose" / "a.png", 1000)
    write_photo(here / "new" / "iris" / "b.png", 1001)
    code, out, _ = tlpipe("predict", run, "new", "--format", "csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["image"], row["class"]) for row in rows] == [
        ("new/iris/b.png", "iris"),
        ("new/rose/a.png", "rose"),
    ]
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows)

    code, out, _ = tlpipe("predict", run, "new/rose/a.png", "--format", "jsonl", "--top", "2")
    (line,) = out.splitlines()
    assert json.loads(line)["classes"] == ["rose", "iris"]

    assert "rose" in tlpipe("inspect", store)[1]
    assert "logreg" in tlpipe("inspect", run)[1]
    code, out, _ = tlpipe("ls")
    assert store in out
    assert run in out


def test_predictions_are_those_of_the_run(here, tlpipe):
    store = tlpipe("extract", "photos", "--backbone", "pixels:4")[1].splitlines()[-1]
    run = tlpipe("fit-head", store)[1].splitlines()[-1]
    with (Path(run) / "predictions.csv").open(newline="") as file:
        expected = {row["id"]: row for row in csv.DictReader(file)}
    files = [f"photos/{sample_id}" for sample_id in expected]
    document = json.loads(tlpipe("predict", run, *files, "--json")[1])
    assert len(document["predictions"]) == len(expected) == 8
    for found, row in zip(document["predictions"], expected.values(), strict=True):
        assert found["classes"] == [row["predicted"]]
        assert found["probabilities"][0] == pytest.approx(float(row["probability"]), abs=1e-4)


def test_the_second_extraction_decodes_nothing_and_says_so(here, tlpipe):
    tlpipe("extract", "photos", "--backbone", "pixels:4")
    code, _, err = tlpipe("extract", "photos", "--backbone", "pixels:4")
    assert code == 0
    assert "40 found in the store, 0 embedded" in err
    assert "Nothing was decoded" in err
    for i in range(5):
        write_photo(here / "photos" / "rose" / f"new{i}.jpg", 500 + i)
    assert (
        "40 found in the store, 5 embedded"
        in tlpipe("extract", "photos", "--backbone", "pixels:4")[2]
    )


def test_skipped_images_are_listed_and_make_the_exit_code_3(here, tlpipe):
    (here / "photos" / "rose" / "zero.jpg").write_bytes(b"")
    (here / "photos" / "rose" / "text.jpg").write_text("<html>404</html>")
    whole = (here / "photos" / "rose" / "00.jpg").read_bytes()
    (here / "photos" / "rose" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    code, out, err = tlpipe("extract", "photos", "--backbone", "pixels:4")
    assert code == 3
    assert "3 skipped" in err
    for name in ("zero.jpg", "text.jpg", "cut.jpg"):
        assert f"rose/{name}: " in err
    store = out.splitlines()[-1]
    assert len(open_store(store)) == 40
    code, out, _ = tlpipe("inspect", store, "--failures")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "rose/cut.jpg", "rose/text.jpg", "rose/zero.jpg",
    ]  # fmt: skip
    run = tlpipe("fit-head", store)[1].splitlines()[-1]
    code, out, err = tlpipe("predict", run, "photos/rose/zero.jpg", "photos/rose/00.jpg")
    assert code == 3
    assert "Skipped photos/rose/zero.jpg: empty file" in err
    assert "photos/rose/00.jpg" in out


def test_json_is_one_document_and_quiet_is_silent(here, tlpipe):
    code, out, err = tlpipe("extract", "photos", "--backbone", "pixels:4", "--json", "--quiet")
    assert (code, err) == (0, "")
    store = json.loads(out)["store"]
    assert json.loads(tlpipe("inspect", store, "--json")[1])["n_with_features"] == 40
    run = json.loads(tlpipe("fit-head", store, "--json")[1])["path"]
    assert json.loads(tlpipe("inspect", run, "--json")[1])["head"] == "logreg"
    listed = json.loads(tlpipe("ls", "--json")[1])
    assert [one["path"] for one in listed["stores"]] == [store]
    assert [one["path"] for one in listed["runs"]] == [run]


@pytest.fixture
def made(here, tlpipe):
    """Paths of a store and a run."""
    store = tlpipe("extract", "photos", "--backbone", "pixels:4", "--quiet")[1].splitlines()[-1]
    return store, tlpipe("fit-head", store, "--quiet")[1].splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "exit_code", "texts"),
    [
        (["extract", "fotos"], 2, ["fotos", "digits"]),
        (["extract", "photos", "--backbone", "resnet51"], 2, ["resnet51", "Did you mean"]),
        (["extract", "photos", "--backbone", "pixels", "--layers", "x"], 2, ["layer", "'x'"]),
        (["extract", "{store}"], 2, ["feature store", "tlpipe fit-head"]),
        (["extract", "{run}"], 2, ["run", "tlpipe inspect"]),
        (["extract", "empty"], 4, ["empty", ".jpg"]),
        (
            ["extract", "photos", "--weights", "no.safetensors", "--backbone", "resnet18"],
            4,
            ["no."],
        ),
        (["fit-head", "{store}", "--head", "logreq"], 2, ["logreq", "logreg"]),
        (["fit-head", "{store}", "--layers", "blocks.4"], 2, ["layer", "blocks.4"]),
        (["fit-head", "{store}", "--label", "colour"], 2, ["label column", "colour"]),
        (["fit-head", "photos"], 4, ["photos", "not a feature store"]),
        (["fit-head", "nowhere"], 4, ["nowhere"]),
        (["inspect", "photos"], 4, ["neither a feature store nor a run"]),
        (["predict", "photos", "photos"], 4, ["not a run"]),
        (["predict", "{run}", "nothing.jpg"], 2, ["no image or folder nothing.jpg"]),
        (["predict", "{run}", "empty"], 2, ["no image in empty"]),
        (["predict", "{run}", "words.jpg"], 4, ["None of the images", "not an image"]),
        (["extrac", "photos"], 2, ["No such command"]),
        (["extract", "photos", "--bakbone", "x"], 2, ["--backbone"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_clear_message(here, tlpipe, made, words, exit_code, texts):
    (here / "empty").mkdir()
    (here / "words.jpg").write_text("hello")
    store, run = made
    code, out, err = tlpipe(*(word.format(store=store, run=run) for word in words))
    assert code == exit_code
    assert out == ""
    assert err.count("Error: ") == 1
    assert "Traceback" not in err
    for text in texts:
        assert text in err


def test_one_class_can_be_embedded_but_not_learned(here, tlpipe):
    for path in (here / "photos" / "iris").iterdir():
        path.unlink()
    code, out, _ = tlpipe("extract", "photos", "--backbone", "pixels:4")
    assert code == 0
    code, _, err = tlpipe("fit-head", out.splitlines()[-1])
    assert code == 4
    assert "class" in err


def test_a_head_is_not_used_on_another_network(here, tlpipe, made):
    card = Path(made[1]) / "card.json"
    document = json.loads(card.read_text())
    document["inputs"][0]["recipe"]["preprocess"]["interpolation"] = "nearest"
    card.write_text(json.dumps(document))
    code, _, err = tlpipe("predict", made[1], "photos")
    assert code == 4
    assert "preprocess" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_extraction_says_how_to_go_on(here, number):
    for i in range(300):
        write_photo(here / "photos" / "rose" / f"more{i}.jpg", 600 + i, size=(300, 200))
    words = ["extract", "photos", "--image-size", "64", "--batch-size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "cli.py"), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "340 of 340 images to do" in process.stderr.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"tlpipe {' '.join(words)}" in err
    (path,) = (here / "cache" / "photos").iterdir()
    n_kept = len(open_store(path))
    assert 0 < n_kept < 340
    with h5py.File(path / "features.h5") as file:  # written at the end of a run
        assert len(file["id"]) == n_kept
    result = run_process(*words, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert f"{n_kept} found in the store, {340 - n_kept} embedded" in result.stderr


def test_a_closed_pipe_is_no_failure(made):
    command = (
        f"{sys.executable} {ROOT / 'cli.py'} inspect {made[0]} | true; exit ${{PIPESTATUS[0]}}"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_terminal_that_is_not_utf8(here, made):
    result = run_process("inspect", made[0], env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert "rose" in result.stdout


@pytest.mark.parametrize(
    "words", [["--help"], ["ls"], ["inspect", "{store}"], ["inspect", "{run}"]]
)
def test_looking_around_needs_no_torch(here, made, words):
    words = [word.format(store=made[0], run=made[1]) for word in words]
    code = (
        f"import sys; sys.argv = ['tlpipe', *{words!r}]\n"
        "from pipeline.commands import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'sklearn', 'timm', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_head_on_an_unfinished_store_says_what_is_missing(here, tlpipe):
    from pipeline.backbones import load_backbone
    from pipeline.data import open_source
    from pipeline.extract.extractor import Settings, extract

    (here / "photos" / "rose" / "zero.jpg").write_bytes(b"")
    batches = iter([False, False, False, True])
    report = extract(
        open_source("photos"),
        load_backbone("pixels:4"),
        Settings(batch_size=8),
        should_stop=lambda: next(batches),
    )
    assert report.interrupted
    code, _, err = tlpipe("fit-head", report.store, "--head", "prototype")
    assert code == 0
    assert "9 of 41 samples" in err
    assert "not embedded yet" in err
    tlpipe("extract", "photos", "--backbone", "pixels:4")
    err = tlpipe("fit-head", report.store, "--head", "prototype")[2]
    assert "1 sample of" in err
    assert "skipped when it was extracted" in err


def test_a_renamed_folder_keeps_its_store(here, tlpipe):
    first = tlpipe("extract", "photos", "--backbone", "pixels:4")[1]
    (here / "photos").rename(here / "pictures")
    code, out, err = tlpipe("extract", "pictures", "--backbone", "pixels:4")
    assert (code, out) == (0, first)
    assert "0 embedded" in err


def test_names_that_are_not_utf8(here, tlpipe):
    folder = here / os.fsdecode(b"caf\xe9")
    (here / "photos").rename(folder)
    code, out, err = tlpipe("extract", folder.name, "--backbone", "pixels:4")
    assert code == 0, err
    assert len(open_store(out.splitlines()[-1])) == 40


def test_the_next_command_that_is_printed_works(here, tlpipe):
    import shlex

    lines = ["path,colour,kind"]
    for path in sorted((here / "photos").rglob("*.jpg")):
        lines.append(f"{path.relative_to(here).as_posix()},{path.parent.name},x{len(lines) % 2}")
    (here / "my list.csv").write_text("\n".join(lines))
    _, _, err = tlpipe("extract", "my list.csv", "--cache", "my cache", "--backbone", "pixels:4")
    (step,) = [line.strip() for line in err.splitlines() if "tlpipe fit-head" in line]
    assert tlpipe(*shlex.split(step)[1:])[0] == 0


def test_weights_are_found_from_another_folder(here, tlpipe, monkeypatch):
    import torch

    from pipeline.backbones import load_backbone

    backbone = load_backbone("resnet18", weights="random", image_size=32)
    torch.save(backbone.module.state_dict(), "w.pth")
    words = ["--backbone", "resnet18", "--weights", "w.pth", "--image-size", "32"]
    store = tlpipe("extract", "photos", *words)[1].splitlines()[-1]
    run = (here / tlpipe("fit-head", store, "--head", "ridge")[1].splitlines()[-1]).resolve()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert tlpipe("predict", run, here / "photos" / "rose" / "00.jpg")[0] == 0
    (here / "w.pth").unlink()
    code, _, err = tlpipe("predict", run, here / "photos" / "rose" / "00.jpg")
    assert code == 4
    assert str(here / "w.pth") in err
    assert "put them back there" in err
