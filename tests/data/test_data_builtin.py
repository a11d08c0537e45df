"""digits and Fashion-MNIST: written out once, whole or not at all; IDX files are checked."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.data import builtin, open_source, written
from pipeline.data.idx import read_idx
from pipeline.data.names import class_folders
from pipeline.errors import DataError, ResourceError, UsageError


def idx_bytes(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion_mnist(folder, n_train=20, n_test=10, compress=True):
    """The four files, of another size; returns the training pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    pixels = {}
    for prefix, n in (("train", n_train), ("t10k", n_test)):
        pixels[prefix] = random.integers(0, 256, (n, 28, 28))
        contents = {"images-idx3": pixels[prefix], "labels-idx1": np.arange(n) % 10}
        for kind, array in contents.items():
            data = idx_bytes(array)
            name = f"{prefix}-{kind}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
    return pixels["train"]


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_digits_are_scikit_learns(digits_cache):
    source = open_source("digits", cache_dir=digits_cache)
    digits = load_digits()

    assert source.name == source.layout == source.spec == "digits"
    assert source.root == digits_cache / "data" / "digits"
    assert len(source.samples) == 1797
    assert source.split_origin.startswith("made: 20% of each class")
    for sample in source.samples[::100]:
        number = int(sample.id.rpartition("/")[2].removesuffix(".png"))
        pixels = np.asarray(Image.open(sample.file))
        assert sample.id == f"{digits.target[number]}/{number:04d}.png"
        assert np.array_equal(pixels, np.rint(digits.images[number] * 255 / 16))


def test_a_written_set_is_used_again(digits_cache):
    first = open_source("digits", cache_dir=digits_cache)
    written_at = (first.root / "0" / "0000.png").stat().st_mtime_ns

    second = open_source("digits", cache_dir=digits_cache)

    assert second.samples == first.samples
    assert (first.root / "0" / "0000.png").stat().st_mtime_ns == written_at


def test_fashion_mnist_has_its_official_splits_and_class_names(tmp_path):
    pixels = write_fashion_mnist(tmp_path / "idx")

    source = open_source(f"fashion-mnist:{tmp_path / 'idx'}", cache_dir=tmp_path / "cache")

    assert source.layout == "fashion-mnist"
    assert source.split_origin == "given"
    assert sum(sample.split == "train" for sample in source.samples) == 20
    first = next(s for s in source.samples if s.id == "train/T-shirt-top/00000.png")
    assert first.labels == ("T-shirt-top",)
    assert np.array_equal(np.asarray(Image.open(first.file)), pixels[0])
    assert {label for s in source.samples for label in s.labels} == {
        "T-shirt-top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    }  # fmt: skip


def test_fashion_mnist_is_looked_for_where_its_package_puts_it(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path / "package")
    monkeypatch.setattr(builtin, "FASHION_MNIST_PACKAGE", tmp_path / "package")

    source = open_source("fashion-mnist", cache_dir=tmp_path / "cache")

    assert source.root == tmp_path / "cache" / "data" / "fashion-mnist"
    assert len(source.samples) == 30


@pytest.mark.parametrize("place", ["cache/data/torchvision", "shared"])
def test_fashion_mnist_is_taken_from_torchvisions_download(tmp_path, monkeypatch, place):
    write_fashion_mnist(tmp_path / place / "FashionMNIST" / "raw", compress=False)
    monkeypatch.setattr(builtin, "FASHION_MNIST_PACKAGE", tmp_path / "nowhere")
    monkeypatch.setenv("TLPIPE_DATA", str(tmp_path / "shared"))

    assert len(open_source("fashion-mnist", cache_dir=tmp_path / "cache").samples) == 30


def test_fashion_mnist_offline_names_both_ways(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(builtin, "FASHION_MNIST_PACKAGE", tmp_path / "nowhere")

    with pytest.raises(DataError) as error:
        open_source("fashion-mnist", cache_dir=tmp_path / "cache")

    assert "apt install dataset-fashion-mnist" in str(error.value)
    assert "fashion-mnist:FOLDER" in str(error.value)
    assert not list((tmp_path / "cache" / "data").glob("fashion*"))


@pytest.fixture
def offline(monkeypatch):
    """A proxy that refuses every connection at once."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_folder_without_the_four_files_is_a_wrong_use(tmp_path):
    write_fashion_mnist(tmp_path / "idx")
    (tmp_path / "idx" / "t10k-labels-idx1-ubyte.gz").unlink()

    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte.gz is not there"):
        open_source(f"fashion-mnist:{tmp_path / 'idx'}", cache_dir=tmp_path / "cache")


def test_another_folder_of_files_is_another_set(tmp_path):
    write_fashion_mnist(tmp_path / "a")
    write_fashion_mnist(tmp_path / "b", n_train=10)

    a = open_source(f"fashion-mnist:{tmp_path / 'a'}", cache_dir=tmp_path / "cache")
    b = open_source(f"fashion-mnist:{tmp_path / 'b'}", cache_dir=tmp_path / "cache")

    assert (len(a.samples), len(b.samples)) == (30, 20)
    assert a.name != b.name


def test_images_and_labels_of_another_number_are_refused(tmp_path):
    write_fashion_mnist(tmp_path / "idx")
    labels = tmp_path / "idx" / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx_bytes(np.arange(19) % 10)))

    with pytest.raises(DataError, match=r"holds 20 images, but .*train-labels.* 19 labels"):
        open_source(f"fashion-mnist:{tmp_path / 'idx'}", cache_dir=tmp_path / "cache")

    assert not list((tmp_path / "cache" / "data").glob("*.writing"))


def test_a_killed_write_is_done_again_from_the_start(tmp_path):
    unfinished = tmp_path / "data" / ".digits.writing"
    (unfinished / "0").mkdir(parents=True)
    (unfinished / "0" / "9999.png").touch()

    source = open_source("digits", cache_dir=tmp_path)

    assert len(source.samples) == 1797
    assert not unfinished.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "1.png").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="No space left to write"):
        written.write_once(tmp_path / "data" / "set", build)

    assert [p.name for p in (tmp_path / "data").iterdir()] == [".set.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")

    with pytest.raises(DataError, match=r"Cannot write .*digits: .*\n  Name a cache"):
        open_source("digits", cache_dir=tmp_path / "cache")


def test_a_written_set_that_lost_images_says_how_to_mend_it(tmp_path):
    source = open_source("digits", cache_dir=tmp_path)
    (source.root / "0" / "0000.png").unlink()

    with pytest.raises(DataError) as error:
        open_source("digits", cache_dir=tmp_path)

    assert f"{source.root} holds 1,796 images, but 1,797 were written there." in str(error.value)
    assert f"rm -r {source.root}" in str(error.value)


def test_a_strange_folder_in_the_place_of_a_set_is_left_alone(tmp_path):
    mine = tmp_path / "data" / "digits" / "0" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.touch()

    with pytest.raises(DataError, match="was not written by tlpipe"):
        open_source("digits", cache_dir=tmp_path)

    assert mine.exists()


GOOD = idx_bytes(np.zeros((2, 3, 4)))
DAMAGE = {
    "empty": (b"", "it starts with nothing, not with 00 00 08 03"),
    "other magic": (b"\x89PNG" + GOOD, "it starts with 89 50 4e 47, not with 00 00 08 03"),
    "labels": (idx_bytes(np.zeros(5)), "it starts with 00 00 08 01, not with 00 00 08 03"),
    "cut header": (GOOD[:10], "it ends inside its header"),
    "cut": (GOOD[:-1], "its header says 2 x 3 x 4 = 24 bytes, and 23 follow"),
    "too long": (GOOD + b"x", "its header says 2 x 3 x 4 = 24 bytes, and more follow"),
    "absurd sizes": (
        GOOD[:4] + b"\xff" * 12,
        "its header says 4294967295 x 4294967295 x 4294967295",
    ),
    "cut gzip": (gzip.compress(GOOD)[:-12], "its compression is damaged"),
    "bad gzip": (gzip.compress(GOOD)[:-8] + b"\xff" * 8, "its compression is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_idx_file_is_named(tmp_path, name):
    data, reason = DAMAGE[name]
    file = tmp_path / "images"
    file.write_bytes(data)

    with pytest.raises(DataError) as error:
        read_idx(file, 3)

    assert f"{file} is not a whole IDX file of unsigned bytes: {reason}" in str(error.value)
    assert "Fetch the file again" in str(error.value)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_idx_files_are_read_plain_or_gzipped(tmp_path, compress):
    array = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "images").write_bytes(compress(idx_bytes(array)))

    assert np.array_equal(read_idx(tmp_path / "images", 3), array)


def test_class_folders_never_meet():
    folders = class_folders(["T-shirt/top", "T-shirt-top", "a", "A", "..", "x: y?"])

    assert folders == ["T-shirt-top", "T-shirt-top-1", "a", "A-3", "-", "x- y-"]
