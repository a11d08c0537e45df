"""torchvision's sets, laid out by hand with tiny files: official splits, classes by name."""

import bz2
import inspect
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.data import open_source
from pipeline.data.torchvision_sets import SETS, class_names
from pipeline.errors import DataError, UnknownNameError


def touch(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def downloads(cache):
    return cache / "data" / "torchvision"


def seen(source):
    return {(sample.id, *sample.labels, sample.split) for sample in source.samples}


@pytest.fixture
def offline(monkeypatch):
    """A proxy that refuses every connection at once."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_asked_for_as_its_constructor_wants(name):
    from torchvision import datasets

    official = SETS[name]
    constructor = getattr(datasets, official.constructor)
    parameters = inspect.signature(constructor.__init__).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    for arguments in official.splits.values():
        assert takes_more or set(arguments) <= set(parameters)
    assert takes_more or not official.is_downloadable or "download" in parameters


def test_dtd_is_used_in_place_and_mapped_by_name(tmp_path):
    base = downloads(tmp_path) / "dtd" / "dtd"
    touch(base / "images", "banded/1.jpg", "zig/1.jpg", "banded/2.jpg", "zig/2.jpg")
    write(base / "labels" / "train1.txt", "banded/1.jpg\nzig/1.jpg\n")
    write(base / "labels" / "val1.txt", "zig/2.jpg\n")
    write(base / "labels" / "test1.txt", "banded/2.jpg\n")

    source = open_source("torchvision:dtd", cache_dir=tmp_path)

    assert source.name == "dtd"
    assert source.layout == "torchvision:DTD"
    assert source.root == downloads(tmp_path)
    assert source.split_origin == "given"
    # zig is class 1 of train, but class 0 of val, which has no other.
    assert seen(source) == {
        ("dtd/dtd/images/banded/1.jpg", "banded", "train"),
        ("dtd/dtd/images/zig/1.jpg", "zig", "train"),
        ("dtd/dtd/images/zig/2.jpg", "zig", "val"),
        ("dtd/dtd/images/banded/2.jpg", "banded", "test"),
    }
    assert source.samples[0].file == str(base / "images" / "banded" / "1.jpg")
    assert any("In train but not in val" in note for note in source.notes)


def test_aircraft_is_found_in_the_folder_that_the_environment_names(tmp_path, monkeypatch):
    data = tmp_path / "shared" / "fgvc-aircraft-2013b" / "data"
    touch(data / "images", "001.jpg", "002.jpg", "003.jpg")
    write(data / "variants.txt", "Boeing 737\nA320\n")
    for number, split in enumerate(("train", "val", "test"), start=1):
        write(data / f"images_variant_{split}.txt", f"00{number} A320\n")
    monkeypatch.setenv("TLPIPE_DATA", str(tmp_path / "shared"))

    source = open_source("torchvision:FGVCAircraft", cache_dir=tmp_path / "cache")

    assert {(sample.labels[0], sample.split) for sample in source.samples} == {
        ("A320", "train"),
        ("A320", "val"),
        ("A320", "test"),
    }
    assert not (tmp_path / "cache").exists()


def test_pets_have_trainval_as_train(tmp_path):
    base = downloads(tmp_path) / "OxfordIIITPet" / "oxford-iiit-pet"
    touch(base / "images", "great_dane_1.jpg", "great_dane_2.jpg", "Birman_1.jpg", "Birman_2.jpg")
    write(base / "annotations" / "trainval.txt", "Birman_1 1 1 1\ngreat_dane_1 2 2 1\n")
    write(base / "annotations" / "test.txt", "Birman_2 1 1 1\ngreat_dane_2 2 2 1\n")

    source = open_source("torchvision:oxfordiiitpet", cache_dir=tmp_path)

    assert seen(source) == {
        (f"oxford-iiit-pet/images/{file}_{number}.jpg", label, split)
        for file, label in (("Birman", "Birman"), ("great_dane", "Great Dane"))
        for number, split in ((1, "train"), (2, "test"))
    }


def test_imagenette_keeps_train_and_val(tmp_path):
    base = downloads(tmp_path) / "imagenette2"
    touch(base, *(f"{s}/{w}/1.JPEG" for s in ("train", "val") for w in ("n01440764", "n03425413")))

    source = open_source("torchvision:Imagenette", cache_dir=tmp_path)

    assert {(sample.labels[0], sample.split) for sample in source.samples} == {
        (label, split) for label in ("tench", "gas pump") for split in ("train", "val")
    }


def test_a_set_without_splits_gets_a_test_split(tmp_path):
    touch(downloads(tmp_path), *(f"eurosat/2750/{c}/{i}.jpg" for c in "AB" for i in range(5)))

    source = open_source("torchvision:EuroSAT", cache_dir=tmp_path)

    assert source.split_origin.startswith("made: 20% of each class")
    assert [s.labels[0] for s in source.samples if s.split == "test"] == ["A", "B"]


def test_caltech_101_has_classes_by_folder(tmp_path):
    base = downloads(tmp_path) / "caltech101" / "101_ObjectCategories"
    touch(base, "ant/image_0001.jpg", "ant/image_0002.jpg", "yin/image_0001.jpg")
    (base / "BACKGROUND_Google").mkdir()

    source = open_source("torchvision:caltech101", cache_dir=tmp_path)

    assert {
        (sample.id.partition("Categories/")[2], *sample.labels) for sample in source.samples
    } == {
        ("ant/image_0001.jpg", "ant"),
        ("ant/image_0002.jpg", "ant"),
        ("yin/image_0001.jpg", "yin"),
    }


def write_idx(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    file.write_bytes(header + array.astype(np.uint8).tobytes())


def test_kmnist_is_written_out_once(tmp_path):
    raw = downloads(tmp_path) / "KMNIST" / "raw"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28))
    for prefix in ("train", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.array([0, 1, 1, 9]))

    source = open_source("torchvision:KMNIST", cache_dir=tmp_path)

    assert source.root == tmp_path / "data" / "kmnist"
    assert ("train/ki/00001.png", "ki", "train") in seen(source)
    assert ("test/wo/00003.png", "wo", "test") in seen(source)
    file = next(s.file for s in source.samples if s.id == "train/wo/00003.png")
    assert np.array_equal(np.asarray(Image.open(file)), pixels[3])


def test_a_written_set_needs_torchvision_no_more(tmp_path):
    raw = downloads(tmp_path) / "KMNIST" / "raw"
    for prefix in ("train", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", np.zeros((2, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.array([0, 1]))
    first = open_source("torchvision:KMNIST", cache_dir=tmp_path)
    code = (
        "import sys; from pathlib import Path; from pipeline.data import open_source\n"
        f"source = open_source('torchvision:kmnist', cache_dir=Path({str(tmp_path)!r}))\n"
        "print(len(source.samples), {'torch', 'sklearn', 'PIL'} & set(sys.modules))"
    )

    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert again.stdout == f"{len(first.samples)} set()\n"


def test_emnist_letters_that_differ_by_case_alone_are_kept_apart(tmp_path):
    raw = downloads(tmp_path) / "EMNIST" / "raw"
    for part in ("train", "test"):
        # 10 is "A" and 36 is "a" of the balanced variant.
        write_idx(raw / f"emnist-balanced-{part}-images-idx3-ubyte", np.zeros((2, 28, 28)))
        write_idx(raw / f"emnist-balanced-{part}-labels-idx1-ubyte", np.array([10, 36]))

    source = open_source("torchvision:EMNIST", cache_dir=tmp_path)

    assert {sample.labels[0] for sample in source.samples} == {"A", "a-36"}


def test_usps_reads_its_own_text(tmp_path):
    row = " ".join(f"{i}:{-1 if i % 2 else 1}" for i in range(1, 257))
    downloads(tmp_path).mkdir(parents=True)
    for name in ("usps.bz2", "usps.t.bz2"):
        (downloads(tmp_path) / name).write_bytes(bz2.compress(f"1 {row}\n10 {row}\n".encode()))

    source = open_source("torchvision:USPS", cache_dir=tmp_path)

    assert seen(source) == {
        (f"{split}/{label}/0000{i}.png", label, split)
        for split in ("train", "test")
        for i, label in enumerate(("0", "9"))
    }


@pytest.mark.parametrize("name", ["KMNIST", "DTD", "SVHN", "EMNIST-letters", "Food101", "USPS"])
def test_offline_says_where_to_put_the_files(tmp_path, name, offline):
    with pytest.raises(DataError) as error:
        open_source(f"torchvision:{name}", cache_dir=tmp_path)

    own = downloads(tmp_path) / SETS[name].constructor
    assert f"torchvision's {name} is not on this machine, and its download failed" in str(
        error.value
    )
    assert str(own) in str(error.value)
    assert "TLPIPE_DATA" in str(error.value)
    assert not own.exists()


def test_talk_of_torchvision_stays_off_stdout(tmp_path, offline, capsys):
    with pytest.raises(DataError):
        open_source("torchvision:SVHN", cache_dir=tmp_path)

    assert capsys.readouterr().out == ""


def test_a_set_that_cannot_be_downloaded_says_so(tmp_path):
    with pytest.raises(DataError, match="torchvision cannot download it"):
        open_source("torchvision:ImageNet", cache_dir=tmp_path)


def test_a_folder_with_something_else_in_it_is_named(tmp_path):
    touch(downloads(tmp_path) / "DTD", "readme.txt")

    with pytest.raises(DataError, match=r"DTD does not hold torchvision's DTD, laid out as"):
        open_source("torchvision:DTD", cache_dir=tmp_path)


def test_a_damaged_set_is_named(tmp_path):
    base = downloads(tmp_path) / "dtd" / "dtd"
    for split in ("train", "val", "test"):
        write(base / "labels" / f"{split}1.txt", "no slash in this line\n")

    with pytest.raises(DataError, match=r"torchvision's DTD below .* cannot be read: ValueError"):
        open_source("torchvision:DTD", cache_dir=tmp_path)


def test_an_unknown_set_offers_close_names(tmp_path):
    with pytest.raises(UnknownNameError) as error:
        open_source("torchvision:flower101", cache_dir=tmp_path)

    assert "Unknown torchvision classification set 'flower101'." in str(error.value)
    assert "Did you mean: flowers102" in str(error.value)
    assert "Known: Caltech101, Caltech256, CIFAR10," in str(error.value)


class Named:
    def __init__(self, classes):
        self.classes = classes


def test_class_names_are_told_apart():
    dataset = Named(
        [("crane",), ("crane",), ("maillot",), ("maillot", "tank suit"), ("tench", "T.")]
    )

    assert class_names(dataset) == [
        "crane (0)",
        "crane (1)",
        "maillot",
        "maillot, tank suit",
        "tench",
    ]
