"""What a user may type, what is refused and what the refusal says; limits."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data import open_source
from pipeline.errors import UnknownNameError, UsageError


def touch(root, *names):
    for name in names:
        file = Path(root) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, pipeline.data; print({'torch', 'sklearn', 'PIL', 'h5py'} & set(sys.modules))"
    )

    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert output.stdout == "set()\n"


def test_a_name_that_is_nothing_lists_the_built_ins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UnknownNameError) as error:
        open_source("digts")

    assert error.value.exit_code == 2
    assert str(error.value) == (
        "Unknown data source 'digts'.\n"
        "  Did you mean: digits?\n"
        "  No such path exists, and the built-in ones are digits, fashion-mnist and "
        "torchvision:NAME."
    )


def test_a_mistyped_path_offers_what_lies_beside_it(tmp_path):
    touch(tmp_path, "flowers/a/1.png")

    with pytest.raises(UnknownNameError, match=f"Did you mean: {tmp_path}/flowers?"):
        open_source(f"{tmp_path}/flwers")


@pytest.mark.parametrize(
    "spec", ["", " ", "a\0b", "a" * 5000, "torchvision", "fashion-mnist:", "x:y"]
)
def test_impossible_names_are_unknown_too(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UnknownNameError, match="the built-in ones are digits"):
        open_source(spec)


def test_a_store_says_what_takes_it(tmp_path):
    touch(tmp_path, "my store/store.json")

    with pytest.raises(UsageError) as error:
        open_source(str(tmp_path / "my store"))

    assert "is a feature store, not a data source" in str(error.value)
    assert f"tlpipe fit-head '{tmp_path}/my store'" in str(error.value)


def test_a_run_says_what_takes_it(tmp_path):
    touch(tmp_path, "run/run.json")

    with pytest.raises(
        UsageError, match=f"is a run, not a data source.\n.*tlpipe inspect {tmp_path}/run"
    ):
        open_source(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat.JPG", "is one image; a data source is a folder or a manifest of many"),
        ("cat.JPG", "tlpipe predict RUN"),
        ("images.zip", "is an archive.\n  Unpack it"),
        ("notes.txt", "expected a folder of images, or a manifest that ends in .csv or .parquet"),
    ],
)
def test_other_files_are_refused(tmp_path, name, expected):
    touch(tmp_path, name)

    with pytest.raises(UsageError) as error:
        open_source(str(tmp_path / name))

    assert expected in str(error.value)


def test_a_folder_called_as_a_built_in_is_told_apart(tmp_path, monkeypatch):
    touch(tmp_path, "digits/a/1.png")
    monkeypatch.chdir(tmp_path)

    builtin, folder = open_source("digits"), open_source("./digits")

    assert len(builtin.samples) == 1797
    assert any("give ./digits" in note for note in builtin.notes)
    assert len(folder.samples) == 1


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, limit):
    with pytest.raises(UsageError, match=f"The limit is {limit}; expected at least one sample"):
        open_source(str(tmp_path), limit=limit)


@pytest.mark.parametrize("test_fraction", [-0.5, 1, 20])
def test_a_test_fraction_outside_of_its_range_is_refused(tmp_path, test_fraction):
    with pytest.raises(UsageError, match=f"is {test_fraction}; expected 0 <= fraction < 1"):
        open_source(str(tmp_path), test_fraction=test_fraction)


def test_a_limit_holds_for_each_split_and_keeps_the_order(tmp_path):
    touch(tmp_path, *(f"{c}/{i:02d}.png" for c in "ab" for i in range(50)))
    whole = open_source(str(tmp_path))

    few, more = open_source(str(tmp_path), limit=10), open_source(str(tmp_path), limit=15)

    ids = [sample.id for sample in few.samples]
    assert [sample.split for sample in few.samples].count("train") == 10
    assert [sample.split for sample in few.samples].count("test") == 10
    assert ids == [sample.id for sample in whole.samples if sample.id in set(ids)]
    assert set(few.samples) < set(more.samples) < set(whole.samples)
    assert few.notes == [
        "Limited to 10 a split, chosen by id, seed 0: 10 of 80 train, 10 of 20 test."
    ]
    assert open_source(str(tmp_path), limit=100).notes == []


def test_an_image_keeps_its_split_when_others_come(tmp_path):
    touch(tmp_path, *(f"a/{i}.png" for i in range(40)))
    before = {s.id for s in open_source(str(tmp_path)).samples if s.split == "test"}
    touch(tmp_path, "b/1.png", "b/2.png")

    after = {s.id for s in open_source(str(tmp_path)).samples if s.split == "test"}

    assert {id for id in after if id.startswith("a/")} == before
