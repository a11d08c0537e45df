"""What the options of `tlpipe extract` do, as a user types them."""

import json
from pathlib import Path

import pytest

from pipeline.store import open_store
from tests.faults.conftest import write_photo

PIXELS = ("--backbone", "pixels:4", "--backbone", "pixels:8")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The working directory, with a folder of twelve photographs."""
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        write_photo(tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i:02d}.png", seed=i)
    return tmp_path


def test_several_backbones_fill_a_store_each(tlpipe):
    code, out, err = tlpipe("extract", "photos", *PIXELS)
    stores = [Path(line) for line in out.splitlines()]
    assert code == 0
    assert [open_store(store).manifest.recipe["backbone"] for store in stores] == [
        "pixels:4", "pixels:8",
    ]  # fmt: skip
    assert "24 of 24 images to do" in err
    for store in stores:
        assert str(store) in err
    code, out, _ = tlpipe("extract", "photos", *PIXELS, "--json")
    documents = json.loads(out)["stores"]
    assert [document["n_cached"] for document in documents] == [12, 12]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tlpipe, here):
    before = sorted(here.rglob("*"))
    code, out, _ = tlpipe("extract", "photos", *PIXELS, "--dry-run")
    assert code == 0
    assert out.count("12: 0 found in the store, 12 to embed") == 2
    assert "images/s, measured on 12" in out
    assert "free" in out
    assert sorted(here.rglob("*")) == before
    code, out, _ = tlpipe("extract", "photos", *PIXELS, "--dry-run", "--json")
    document = json.loads(out)
    assert (code, document["dry_run"], document["n_tried"]) == (0, True, 12)
    assert tlpipe("extract", "photos", "--backbone", "pixels:4")[0] == 0
    code, out, _ = tlpipe("extract", "photos", *PIXELS, "--dry-run", "--json")
    assert [store["n_todo"] for store in json.loads(out)["stores"]] == [0, 12]


def test_views_are_stored_beside_the_plain_one(tlpipe):
    _, out, _ = tlpipe("extract", "photos", "--backbone", "pixels:4", "--views", 3)
    store = open_store(Path(out.strip()))
    assert store.n_views == 3
    _, out, _ = tlpipe("extract", "photos", "--backbone", "pixels:4")
    plain = open_store(Path(out.strip()))
    assert plain.path != store.path
    assert (store.features(view=0)[:] == plain.features()[:]).all()
    assert (store.features(view=1)[:] != plain.features()[:]).any()
    assert tlpipe("fit-head", store.path, "--head", "prototype")[0] == 0


@pytest.mark.parametrize("text", ["x", "0", "-3", "1.5"])
def test_a_batch_size_is_a_number_or_auto(tlpipe, text):
    code, _, err = tlpipe("extract", "photos", "--backbone", "pixels:4", "--batch-size", text)
    assert code == 2
    assert f"'{text}' is neither auto nor a number of images." in err
    assert tlpipe("extract", "photos", "--backbone", "pixels:4", "--batch-size", "auto")[0] == 0


def test_an_engine_that_is_missing_is_told_before_anything_is_read(tlpipe, here, monkeypatch):
    from pipeline.extract.engines import choose

    monkeypatch.setitem(
        choose.OFFERS, "openvino", choose.Offer(None, package="no_such_package", extra="openvino")
    )
    code, _, err = tlpipe("extract", "photos", "--backbone", "pixels:4", "--engine", "openvino")
    assert code == 2
    assert "The engine openvino is not installed." in err
    assert "pip install 'tlpipe[openvino]'" in err
    assert not any((here / "cache").iterdir())


@pytest.mark.parametrize("device", ["0,1", "all", "cuda:0,cuda:1"])
def test_gpus_that_are_not_there_are_told(tlpipe, device):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, err = tlpipe("extract", "photos", "--backbone", "pixels:4", "--devices", device)
    assert code == 2
    assert "No CUDA device can be used" in err
