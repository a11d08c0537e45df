"""FAULTS, store and compute: a stale row is never served, and only what has to be is redone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.backbones import load_backbone
from pipeline.data.decode import DECODING
from pipeline.store import open_store

from .conftest import (
    SMALL,
    as_an_ordinary_user,
    assert_same_features,
    extract,
    snapshot,
    tlpipe,
    write_photo,
    write_photos,
)

ROOT = Path(__file__).parents[2]

# What happened to the images since the last run. All of a set's BMP files have one size.


def change(photos):
    write_photo(photos / "iris/0.bmp", seed=50, size=(30, 20))


def change_and_keep_the_size(photos):
    write_photo(photos / "iris/0.bmp", seed=50)


def change_and_keep_size_and_time(photos):
    stat = (photos / "iris/0.bmp").stat()
    write_photo(photos / "iris/0.bmp", seed=50)
    os.utime(photos / "iris/0.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def touch(photos):
    os.utime(photos / "iris/0.bmp", (1, 1))


def swap_two(photos):
    one, other = photos / "iris/0.bmp", photos / "rose/1.bmp"
    one.rename("aside")
    other.rename(one)
    Path("aside").rename(other)


def delete(photos):
    (photos / "iris/0.bmp").unlink()


def add(photos):
    write_photo(photos / "iris/00.bmp", seed=60)
    write_photo(photos / "rose/9.bmp", seed=61)


def rename(photos):
    (photos / "iris").rename(photos / "violet")


CHANGES = {
    "33-other-size": (change, (), {"n_cached": 5, "n_embedded": 1}),
    "33-other-time": (change_and_keep_the_size, (), {"n_cached": 5, "n_embedded": 1}),
    "33-only-touched": (touch, (), {"n_cached": 5, "n_linked": 1, "n_decoded": 0}),
    "33-two-that-changed-places": (swap_two, (), {"n_embedded": 0, "n_decoded": 0}),
    "34-same-size-and-time": (
        change_and_keep_size_and_time,
        ("--verify", "content"),
        {"n_linked": 5, "n_embedded": 1},
    ),
    "35-deleted": (delete, (), {"n_cached": 5, "n_removed": 1, "n_decoded": 0}),
    "36-added": (add, (), {"n_cached": 6, "n_embedded": 2, "n_decoded": 2}),
    "36-renamed": (rename, (), {"n_cached": 3, "n_linked": 3, "n_decoded": 0}),
}


@pytest.fixture
def bitmaps(here):
    """As ``photos``, uncompressed."""
    return write_photos(".bmp")


@pytest.mark.parametrize(("happen", "options", "counts"), CHANGES.values(), ids=CHANGES)
def test_after_a_change_the_store_is_as_if_made_anew(bitmaps, happen, options, counts):
    first = extract()
    happen(bitmaps)

    ran = extract("photos", *options)

    assert ran.code == 0
    assert ran.document["store"] == first.document["store"]
    assert {name: ran.document[name] for name in counts} == counts
    anew = extract("photos", "--cache", "anew")
    assert_same_features(ran.features, anew.features)
    assert ran.store.labels().tolist() == anew.store.labels().tolist()
    again = extract()
    assert again.document["n_cached"] == again.document["n_samples"] == len(anew.features)


def test_34_what_size_and_time_do_not_show_is_trusted_unless_asked(bitmaps):
    before = extract().features
    change_and_keep_size_and_time(bitmaps)

    trusting = extract()

    assert "6 found in the store, 0 embedded" in trusting.err
    assert_same_features(trusting.features, before)


def test_36_reordered(photos):
    names = sorted(path.as_posix() for path in photos.rglob("*.png"))
    Path("list.csv").write_text("\n".join(["path", *names]))
    before = extract("list.csv").features
    Path("list.csv").write_text("\n".join(["path", *names[::-1]]))

    ran = extract("list.csv")

    assert (ran.document["n_cached"], ran.document["n_decoded"]) == (6, 0)
    assert_same_features(ran.features, {name: before[name] for name in names[::-1]})


NETWORK = ("--backbone", "timm:test_resnet", "--image-size", 32, "--precision", "fp32")


def write_weights(path, *, seed=0, **scales):
    """Random weights of the network of these tests, some tensors positive and scaled."""
    backbone = load_backbone("timm:test_resnet", weights="random", image_size=32, seed=seed)
    state = backbone.module.state_dict()
    for name, scale in scales.items():
        state[name] = state[name].abs() * scale
    torch.save(state, path)


def test_37_other_weights_under_one_name_get_a_store_of_their_own(photos):
    words = ("photos", *NETWORK, "--weights", "w.pth")
    write_weights("w.pth")
    first = extract(*words)
    kept = first.features
    write_weights("w.pth", seed=1)

    ran = extract(*words)

    assert ran.document["store"] != first.document["store"]
    assert ran.document["n_embedded"] == 6
    assert_same_features(first.features, kept)
    assert all(not np.array_equal(ran.features[name], kept[name]) for name in kept)
    write_weights("w.pth")
    back = extract(*words)
    assert (back.document["store"], back.document["n_cached"]) == (first.document["store"], 6)
    assert_same_features(back.features, kept)


@pytest.mark.parametrize(
    ("words", "decoding"),
    [
        pytest.param(("--image-size", 48), {}, id="38-another-crop"),
        # Another release has other code, which is noticed; here nothing but the constant changes.
        pytest.param(
            ("--verify", "content"),
            {"background": [0, 0, 0]},
            id="38-another-release-decodes-otherwise",
        ),
    ],
)
def test_other_preprocessing_gets_a_store_of_its_own(photos, monkeypatch, words, decoding):
    network = ("photos", *NETWORK, "--weights", "random")
    first = extract(*network)
    kept = first.features
    for name, value in decoding.items():
        monkeypatch.setitem(DECODING, name, value)

    ran = extract(*network, *words)

    assert ran.document["store"] != first.document["store"]
    assert ran.document["n_embedded"] == 6
    assert_same_features(first.features, kept)
    assert ran.store.recipe["backbone"] == first.store.recipe["backbone"]


def copy(old, new):
    shutil.copytree(old, new, copy_function=shutil.copy2)


def copy_without_times(old, new):
    shutil.copytree(old, new, copy_function=shutil.copy)


MOVES = {
    "39-moved": (Path.rename, "elsewhere/photos"),
    "39-renamed": (Path.rename, "pictures"),
    "39-copied": (copy, "elsewhere/photos"),
    "39-copied-without-times": (copy_without_times, "elsewhere/photos"),
}


@pytest.mark.parametrize(("move", "place"), MOVES.values(), ids=MOVES)
def test_a_moved_folder_still_hits(photos, move, place):
    first = extract()
    Path("elsewhere").mkdir()
    move(photos, Path(place))

    ran = extract(place)

    assert ran.document["store"] == first.document["store"]
    assert (ran.document["n_decoded"], ran.document["n_embedded"]) == (0, 0)
    assert "Nothing was decoded." in ran.err
    assert_same_features(ran.features, first.features)


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        pytest.param("file", "cannot be made (File exists)", id="50-a-file-in-its-place"),
        pytest.param("file/new", "cannot be made (Not a directory)", id="50-below-a-file"),
        pytest.param("locked", "cannot be written to", id="50-read-only-folder"),
        pytest.param(
            "locked/new", "cannot be made (Permission denied)", id="50-below-a-read-only-folder"
        ),
    ],
)
def test_a_cache_that_cannot_be_written_to_is_said_before_the_model_loads(
    shared_photos, cache, says
):
    Path("file").touch()
    Path("locked").mkdir(mode=0o555)

    with as_an_ordinary_user():
        ran = tlpipe("extract", "photos", "--backbone", "no-such-model", "--cache", cache)

    assert (ran.code, ran.out) == (4, "")
    assert f"Error: The cache folder {cache} {says}" in ran.err
    assert "Give another with --cache" in ran.err
    assert "no-such-model" not in ran.err


def test_50_a_read_only_folder_in_the_cache_is_said_before_the_model_loads(shared_photos):
    Path("cache").mkdir(mode=0o777)
    Path("cache").chmod(0o777)
    Path("cache/photos").mkdir(mode=0o555)

    with as_an_ordinary_user():
        ran = tlpipe("extract", "photos", "--backbone", "no-such-model")

    assert (ran.code, ran.out) == (4, "")
    assert "Error: The cache folder cache/photos cannot be written to.\n" in ran.err
    assert "no-such-model" not in ran.err


def test_50_beside_data_of_another_user_there_is_a_folder_of_one_s_own(shared_photos):
    write_photo("theirs/photos/rose/1.png", seed=60)
    store = Path(tlpipe("extract", "theirs/photos", *SMALL).document["store"])
    Path("cache").chmod(0o777)

    with as_an_ordinary_user():
        ran = tlpipe("extract", "photos", *SMALL)

    assert ran.code == 0
    assert Path(ran.document["store"]).parent.name.startswith("photos-")
    assert open_store(store).ids() == ["rose/1.png"]


def test_50_a_store_of_another_user_can_be_read_but_not_added_to(shared_photos):
    store = Path(tlpipe("extract", "photos", *SMALL).document["store"])
    shown = tlpipe("inspect", store)
    for path in (store, *store.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    Path("cache").chmod(0o777)
    before = snapshot(store)
    write_photo(shared_photos / "rose/7.png", seed=7)

    with as_an_ordinary_user():
        ran = tlpipe("extract", "photos", *SMALL)
        inspected = tlpipe("inspect", store)

    assert (ran.code, ran.out) == (4, "")
    assert f"Error: {store} cannot be written to (Permission denied)." in ran.err
    assert "or change its permissions." in ran.err
    assert inspected == shown
    assert snapshot(store) == before


@pytest.fixture
def greys(here):
    """Three images of about the mean of what the network was trained on, and a white one."""
    Path("photos").mkdir()
    for name, level in {"a": 126, "b": 128, "c": 130, "white": 255}.items():
        Image.new("RGB", (32, 32), (level, 128, level)).save(f"photos/{name}.png")
    return Path("photos")


@pytest.mark.parametrize(
    ("scales", "precision", "reason", "options"),
    [
        pytest.param(
            {"conv1.0.weight": 1e38},
            "fp32",
            "features of layer penultimate are not a number",
            ("--dtype", "float32"),
            id="53-not-a-number",
        ),
        pytest.param(
            {"layer4.0.downsample.2.weight": 1e6},
            "fp32",
            "features of layer penultimate are larger than float16 holds; "
            "--dtype float32 can hold larger values",
            (),
            id="54-overflow-when-stored",
        ),
        pytest.param(
            {"layer4.0.downsample.2.weight": 1e6},
            "bf16",
            "features of layer penultimate are larger than float16 holds; "
            "--dtype float32 can hold larger values",
            (),
            id="54-overflow-when-computed-in-half-precision-and-stored",
        ),
    ],
)
def test_features_that_are_not_finite_are_refused(greys, scales, precision, reason, options):
    write_weights("w.pth", **scales)
    words = (*NETWORK, "--weights", "w.pth", "--precision", precision, *options)
    Path("fine").mkdir()
    for path in greys.glob("?.png"):
        shutil.copy(path, "fine")
    fine = extract("fine", *words).features

    ran = extract("photos", *words)

    assert ran.code == 3
    assert ran.document["failures"] == {"white.png": reason}
    assert_same_features(ran.features, fine)
    assert all(np.isfinite(row).all() for row in ran.features.values())


def test_54_float32_holds_what_float16_does_not(greys):
    write_weights("w.pth", **{"layer4.0.downsample.2.weight": 1e6})

    ran = extract("photos", *NETWORK, "--weights", "w.pth", "--dtype", "float32")

    assert (ran.code, ran.document["failures"]) == (0, {})
    assert np.abs(ran.features["white.png"]).max() > np.finfo(np.float16).max


def test_54_nothing_but_overflow_is_an_error_with_the_remedy(greys):
    write_weights("w.pth", **{"layer4.0.downsample.2.weight": 1e12})

    ran = extract("photos", *NETWORK, "--weights", "w.pth")

    assert (ran.code, ran.out) == (4, "")
    assert "None of the 4 images of photos can be used." in ran.err
    assert "--dtype float32 can hold larger values" in ran.err


def test_58_the_second_ctrl_c_stops_at_once_and_loses_nothing(photos):
    first = extract()
    before = first.features
    large = write_photo("large.jpg", seed=0, size=(3000, 2000)).read_bytes()
    for i in range(40):  # seconds of decoding before the first batch is full; none is a copy
        (photos / f"iris/large{i:02}.jpg").write_bytes(large + bytes([i]))
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "cli.py", "extract", "photos", "--backbone", "pixels:8",
         "--batch-size", "40"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    said = [process.stderr.readline()]
    process.send_signal(signal.SIGINT)
    said += [process.stderr.readline()]
    time.sleep(0.2)  # as between two presses: Python may be in a callback that swallows exceptions
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert "40 of 46 images to do" in said[0]
    assert said[1] == "Stopping after the batch in hand; once more stops at once.\n"
    assert (process.returncode, out, err) == (130, "", "Interrupted.\n")
    assert_same_features(first.features, before)
    for path in photos.glob("iris/large?[1-9].jpg"):
        path.unlink()
    again = extract()
    assert (again.code, again.document["n_cached"], again.document["n_embedded"]) == (0, 6, 4)
