"""FAULTS, data sources: each gives the right rows and a note, or one error that names the remedy.

Each goes through `tlpipe extract`; where a class name or a split matters, on through the head.
"""

import csv
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.commands.console import Progress

from .conftest import (
    SMALL,
    as_an_ordinary_user,
    assert_same_features,
    extract,
    snapshot,
    tlpipe,
    write_photo,
)

LONG = "n" * 245
NOT_UTF8 = os.fsdecode(b"\xe9")


@dataclass(frozen=True)
class Fault:
    """What lies in a folder, and what becomes of it.

    Attributes:
        images: file -> the id of its row.
        others: files that have no row; an image each.
        folders: empty ones.
        links: link -> target.
        manifest: what is extracted instead of the folder "photos".
        failures: id -> words of the reason.
        labels: id -> label, where it is not the folder.
        says: words on stderr.
        code: exit code.
    """

    images: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[str] = ()
    folders: Sequence[str] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    manifest: bytes = b""
    failures: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str | None] = field(default_factory=dict)
    says: Sequence[str] = ()
    code: int = 0


def same(*names):
    """Files whose ids are their paths."""
    return {name: name for name in names}


TWO = same("a/1.png", "b/1.png")

FAULTS = {
    "17-empty-folder": Fault(
        code=4, says=["holds no image", ".jpg .jpeg", "Found no other file either"]
    ),
    "17-folder-of-empty-folders": Fault(folders=["a", "b/c"], code=4, says=["holds no image"]),
    "17-no-image-among-the-files": Fault(
        others=["a/1.txt", "2.csv"], code=4, says=["Found 2 other files (.csv 1, .txt 1)"]
    ),
    "18-one-class-only": Fault(
        images=same("a/1.png", "a/2.png"), says=["Only one class, 'a': a head needs at least two."]
    ),
    "19-class-with-one-sample": Fault(
        images=same("a/1.png", "b/1.png", "b/2.png"),
        says=["Class 'a' has one sample: it stays in train", "Add a second one to have it scored."],
    ),
    "22-empty-class-folder": Fault(
        images=TWO,
        folders=["c"],
        others=["d/readme.txt"],
        says=["2 folders without an image: 'c' and 'd'.", "1 other file ignored (.txt 1)."],
    ),
    "23-hidden-folders": Fault(
        images=TWO,
        others=[
            ".ipynb_checkpoints/1-checkpoint.png",
            "a/.ipynb_checkpoints/1-checkpoint.png",
            "__MACOSX/a/1.png",
            "a/._1.png",
            ".trash.png",
        ],
    ),
    "24-unicode": Fault(images=same("b/1.png", "猫/図.png", "🌷/1.png")),
    "24-newline": Fault(images=same("a\nb/1\n2.png", "b/\x1b[31mred.png")),
    "24-not-utf8": Fault(
        images={f"{NOT_UTF8}/{NOT_UTF8}.png": r"\xe9/\xe9.png", "b/1.png": "b/1.png"},
    ),
    "24-very-long": Fault(images=same(f"{LONG}/{LONG}.png", "b/1.png")),
    "24-decomposed": Fault(
        images={"e\u0301/e\u0301.png": "\u00e9/\u00e9.png", "b/1.png": "b/1.png"}
    ),
    "24-composed-and-decomposed": Fault(
        images={"a/e\u0301.png": "a/\u00e9.png", "b/1.png": "b/1.png"},
        others=["a/\u00e9.png"],
        says=["1 image left out", "Unicode composition: 'a/\u00e9.png'. Rename one of each two"],
    ),
    "25-files-that-differ-by-case": Fault(images=same("a/X.png", "a/x.PNG", "a/x.png", "b/1.png")),
    "25-classes-that-differ-by-case": Fault(
        images=same("Cat/1.png", "cat/1.png"),
        says=["Classes 'Cat' and 'cat' differ only by case: they are kept apart."],
    ),
    "26-link-loop": Fault(
        images=TWO,
        links={"a/up": "..", "b/here": "."},
        says=["2 links back to a folder above not followed: every image is listed once."],
    ),
    "26-broken-link": Fault(
        images=TWO,
        links={"a/2.png": "gone.png"},
        failures={"a/2.png": "cannot be read (No such file or directory)"},
        code=3,
    ),
    "26-link-to-itself": Fault(
        images=TWO,
        links={"a/2.png": "2.png", "c": "c"},
        failures={"a/2.png": "cannot be read (Too many levels of symbolic links)"},
        code=3,
    ),
    "29-byte-order-mark": Fault(
        images=TWO,
        manifest="\ufeffpath,label\na/1.png,x\nb/1.png,y\n".encode(),
        labels={"a/1.png": "x", "b/1.png": "y"},
    ),
    "29-missing-column": Fault(
        images=TWO,
        manifest=b"image,label\na/1.png,x\n",
        code=4,
        says=["list.csv has no column 'path'. Found: 'image' and 'label'."],
    ),
    "29-blank-and-nan-labels": Fault(
        images=same("a/1.png", "a/2.png", "a/3.png", "b/1.png"),
        manifest=b"path,label\na/1.png,\na/2.png,NaN\na/3.png,x\nb/1.png,y\n",
        labels={"a/1.png": None, "a/2.png": None, "a/3.png": "x", "b/1.png": "y"},
        says=["2 samples without a label: embedded, but not used to fit or score a head."],
    ),
    "29-duplicate-path": Fault(
        images=TWO,
        manifest=b"path,label\na/1.png,x\na/1.png,x\n./a//1.png,x\nb/1.png,y\n",
        labels={"a/1.png": "x", "b/1.png": "y"},
        says=["2 rows dropped, for a path that was listed before: 'a/1.png'."],
    ),
    "29-duplicate-path-of-two-classes": Fault(
        images=TWO,
        manifest=b"path,label\na/1.png,x\nb/1.png,x\na/1.png,y\n",
        code=4,
        says=["line 2: 'a/1.png': 'x'", "line 4: 'a/1.png': 'y'", "Keep one row of each path."],
    ),
    "29-label-1-as-text-and-number": Fault(
        images=same("a/1.png", "a/2.png", "b/1.png"),
        manifest=b'path,label\na/1.png,"1"\na/2.png,1\nb/1.png, 2 \n',
        labels={"a/1.png": "1", "a/2.png": "1", "b/1.png": "2"},
    ),
    "29-paths-that-leave-the-root": Fault(
        images=TWO,
        manifest=b"path,label\na/1.png,x\n../b.png,x\n/etc/c.png,y\na/../../d.png,y\n",
        code=4,
        says=[
            "3 paths not below the root",
            "line 3: '../b.png'",
            "line 4: '/etc/c.png'",
            "line 5: 'a/../../d.png'",
            "give another root, or move the images below it",
        ],
    ),
    "29-files-that-are-not-there": Fault(
        images=TWO,
        manifest=b"path,label\na/1.png,x\nb/1.png,y\nb/2.png,y\n",
        failures={"b/2.png": "cannot be read (No such file or directory)"},
        labels={"a/1.png": "x", "b/1.png": "y"},
        code=3,
    ),
    "29-nothing-there": Fault(
        others=["c/1.png"],
        manifest=b"path,label\na/1.png,x\nb/1.png,y\n",
        code=4,
        says=[
            "the folder that the paths start from?",
            "None of the 2 images of photos/list.csv can be used.",
        ],
    ),
    "29-not-text": Fault(
        manifest="path,label\né.png,x\n".encode("utf-16"),
        code=4,
        says=["list.csv is not UTF-8 text", "CSV UTF-8"],
    ),
    "32-classes-that-look-like-code": Fault(
        images=same("=cmd()/1.png", "<script>/<img onerror=…>.png", "[red]/1.png", "b/1.png"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_source_gives_its_rows_or_says_why_not(here, fault):
    for folder in ("photos", *(f"photos/{name}" for name in fault.folders)):
        Path(folder).mkdir(parents=True)
    for seed, name in enumerate((*fault.images, *fault.others)):
        write_photo(f"plain/{seed:02}.png", seed)
        Path("photos", name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(f"plain/{seed:02}.png", Path("photos", name))
    for link, target in fault.links.items():
        Path("photos", link).symlink_to(target)
    if fault.manifest:
        Path("photos/list.csv").write_bytes(fault.manifest)

    ran = extract("photos/list.csv" if fault.manifest else "photos")

    assert ran.code == fault.code
    for words in fault.says:
        assert words in ran.err
    if fault.code == 4:
        assert ran.out == ""
        assert ran.err.count("Error: ") == 1
        return
    plain = list(extract("plain").features.values())
    expected = dict(zip(fault.images.values(), plain, strict=False))
    assert_same_features(ran.features, dict(sorted(expected.items())))
    labels = dict(zip(ran.store.ids(), ran.store.labels(), strict=True))
    assert labels == (fault.labels or {id: id.split("/")[0] for id in expected})
    assert ran.document["failures"].keys() == fault.failures.keys()
    for sample_id, reason in fault.failures.items():
        assert reason in ran.document["failures"][sample_id]
    assert all(line.isprintable() for line in ran.err.splitlines())


def test_24_a_bad_image_with_a_newline_in_its_name_is_listed_on_one_line(photos):
    (photos / "rose" / "a\n\x1b[31mb.png").touch()

    ran = extract()

    assert ran.code == 3
    assert ran.document["failures"] == {"rose/a\n\x1b[31mb.png": "empty file (0 bytes)"}
    for shown in (ran.err, tlpipe("inspect", ran.document["store"], "--failures").out):
        assert r"rose/a\n\x1b[31mb.png: empty file (0 bytes)" in shown


# Splits and classes, as far as the head


CHANNELS = {"apple": 0, "bee": 1, "cat": 2, "aardvark": 0}


def write_classes(folder, names, first, n=6):
    """``n`` images of each class; the class decides which channel is the bright one."""
    for name in names:
        for i in range(first, first + n):
            path = write_photo(f"{folder}/{name}/{i}.png", seed=1000 * CHANNELS[name] + i)
            pixels = np.array(Image.open(path)) // 4
            pixels[..., CHANNELS[name]] += 190
            Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("train", "val", "test", "says"),
    [
        pytest.param(
            ["apple", "bee", "cat"],
            ["apple", "bee", "cat"],
            ["bee", "cat"],
            "In train but not in test, so not scored there: 'apple'.",
            id="20-class-missing-from-test",
        ),
        pytest.param(
            ["apple", "bee", "cat"],
            ["cat"],
            ["apple", "bee", "cat"],
            "In train but not in val, so not scored there: 'apple' and 'bee'.",
            id="20-class-missing-from-val",
        ),
        pytest.param(
            ["bee", "cat"],
            ["bee", "cat"],
            ["aardvark", "bee", "cat"],
            "In test but not in train, so never predicted: 'aardvark'.",
            id="21-class-in-test-but-not-in-train",
        ),
    ],
)
def test_classes_are_matched_by_name(here, train, val, test, says):
    for first, (split, names) in enumerate({"train": train, "val": val, "test": test}.items()):
        write_classes(f"photos/{split}", names, 10 * first)

    ran = extract()
    fitted = tlpipe("fit-head", ran.document["store"], "--head", "ridge", "--json")

    assert (ran.code, fitted.code) == (0, 0)
    assert says in ran.err
    assert fitted.document["classes"] == train
    rows = [row for row in predictions_of(fitted) if row["split"] == "test"]
    assert len(rows) == 6 * len(test)
    for row in rows:
        assert row["label"] == row["id"].split("/")[1]
        assert (row["predicted"] == row["label"]) == (row["label"] in train)


def predictions_of(fitted):
    with (Path(fitted.document["path"]) / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_18_one_class_cannot_be_learned(here):
    write_classes("photos", ["apple"], 0)

    fitted = tlpipe("fit-head", extract().document["store"])

    assert fitted.code == 4
    assert "apple" in fitted.err


def test_19_a_class_with_one_sample_can_be_learned(here):
    write_classes("photos", ["apple", "bee"], 0)
    write_classes("photos", ["cat"], 0, n=1)

    fitted = tlpipe("fit-head", extract().document["store"], "--head", "prototype", "--json")

    assert fitted.code == 0
    assert fitted.document["classes"] == ["apple", "bee", "cat"]


def test_30_an_image_in_train_and_in_test_is_warned_about(here):
    write_classes("photos/train", ["apple", "bee"], 0)
    write_classes("photos/test", ["apple", "bee"], 10)
    shutil.copy("photos/train/bee/3.png", "photos/test/bee/copy.png")

    fitted = tlpipe("fit-head", extract().document["store"])

    assert fitted.code == 0
    assert "Warning: 1 of 13 test images also in train, byte for byte" in fitted.err


def test_31_an_image_that_is_there_twice_is_embedded_once(photos):
    shutil.copy("photos/iris/0.png", "photos/rose/copy.png")

    ran = extract()

    assert (ran.code, ran.document["n_embedded"], ran.document["n_linked"]) == (0, 6, 1)
    assert "1 of those found were recognised by their bytes." in ran.err
    assert np.array_equal(ran.features["rose/copy.png"], ran.features["iris/0.png"])
    assert dict(zip(ran.store.ids(), ran.store.labels(), strict=True))["rose/copy.png"] == "rose"


def test_32_class_names_that_look_like_code_are_only_names(here):
    names = ["=cmd()", "</script><img onerror=alert(1)>", "[red]x[/red]", "\x1b[31mred\a"]
    write_classes("photos", ["apple", "bee"], 0)
    paths = sorted(Path("photos").rglob("*.png"))
    with Path("list.csv").open("w", newline="") as file:
        lines = [(path, names[i % 4]) for i, path in enumerate(paths)]
        csv.writer(file).writerows([("path", "label"), *lines])

    ran = extract("list.csv")
    fitted = tlpipe("fit-head", ran.document["store"], "--head", "prototype", "--json")
    run = fitted.document["path"]
    shown = [
        tlpipe("inspect", ran.document["store"]),
        tlpipe("inspect", run),
        tlpipe("fit-head", ran.document["store"], "--head", "prototype"),
        tlpipe("predict", run, paths[0]),
    ]
    table = tlpipe("predict", run, *paths, "--format", "csv")

    assert fitted.document["classes"] == sorted(names)
    assert {row["class"] for row in csv.DictReader(io.StringIO(table.out))} <= set(names)
    for one in (ran, *shown):
        assert one.code == 0
        assert all(line.isprintable() for line in (one.out + one.err).splitlines())
    assert "[red]x[/red]" in shown[0].out


# Files that cannot be read, or not any more


@pytest.mark.parametrize(
    ("secret", "data", "code", "says"),
    [
        pytest.param(
            "photos/rose/3.png",
            "photos",
            3,
            "  rose/3.png: cannot be read (Permission denied)\n",
            id="27-unreadable-file",
        ),
        pytest.param(
            "photos/rose",
            "photos",
            4,
            "/photos/rose: Permission denied.\n"
            "  Make it readable, or move it out of the data source.",
            id="27-unreadable-folder",
        ),
        pytest.param(
            "list.csv",
            "list.csv",
            4,
            "Cannot read list.csv: Permission denied.",
            id="27-unreadable-manifest",
        ),
    ],
)
def test_what_cannot_be_read_is_named(shared_photos, good, secret, data, code, says):
    Path("list.csv").write_text("path\nphotos/iris/0.png\n")
    before = snapshot("photos", "list.csv")
    mode = Path(secret).stat().st_mode
    Path(secret).chmod(0)

    with as_an_ordinary_user():
        ran = tlpipe("extract", data, *SMALL)

    Path(secret).chmod(mode)
    assert ran.code == code
    assert says in ran.err
    assert snapshot("photos", "list.csv") == before
    if code == 3:
        assert_same_features(ran.features, {i: good[i] for i in good if i != "rose/3.png"})


@pytest.fixture
def meanwhile(monkeypatch):
    """Have something happen once, when all is listed and before the first image is read."""
    events = []
    start = Progress.start

    def start_late(self, *counts):
        while events:
            events.pop()()
        start(self, *counts)

    monkeypatch.setattr(Progress, "start", start_late)
    return events.append


@pytest.mark.parametrize(
    ("gone", "n_gone"),
    [
        pytest.param("photos/iris/2.png", 1, id="28-file-vanishes"),
        pytest.param("photos/iris", 3, id="28-class-vanishes"),
        pytest.param("photos", 6, id="28-everything-vanishes"),
    ],
)
def test_what_vanishes_is_listed_and_embedded_once_it_is_back(
    photos, good, meanwhile, gone, n_gone
):
    meanwhile(lambda: Path(gone).rename("away"))

    ran = tlpipe("extract", "photos", *SMALL)

    assert ran.err.count(": cannot be read (No such file or directory)\n") == min(n_gone, 5)
    if n_gone == len(good):
        assert ran.code == 4
        assert "None of the 6 images of photos can be used." in ran.err
    else:
        assert ran.code == 3
        assert_same_features(ran.features, {i: good[i] for i in ran.features})
        assert len(ran.features) == 6 - n_gone
    Path("away").rename(gone)
    again = tlpipe("extract", "photos", *SMALL)
    assert (again.code, again.document["n_embedded"]) == (0, n_gone)
    assert_same_features(again.features, good)


def test_28_a_file_that_changes_has_the_features_of_what_was_read(photos, good, meanwhile):
    meanwhile(lambda: write_photo("photos/iris/2.png", seed=77))

    ran = tlpipe("extract", "photos", *SMALL)

    fresh = tlpipe("extract", "photos", *SMALL, "--cache", "fresh")
    assert_same_features(ran.features, fresh.features)
    assert not np.array_equal(ran.features["iris/2.png"], good["iris/2.png"])
    assert tlpipe("extract", "photos", *SMALL).document["n_cached"] == 6


def test_29_a_million_rows(photos):
    """All but six are in no split and not there; the limit takes four of those."""
    with Path("big.csv").open("w") as file:
        file.write("path,label,split\n")
        for i in range(1_000_000):
            split = "train" if i < 4 else "test" if i < 6 else ""
            file.write(f"photos/{('iris', 'rose')[i % 2]}/{i}.png,{i % 2},{split}\n")

    ran = extract("big.csv", "--limit", 4)

    assert ran.code == 3
    assert "Limited to 4 a split" in ran.err
    assert list(ran.features) == [f"photos/{('iris', 'rose')[i % 2]}/{i}.png" for i in range(6)]
    assert ran.store.labels().tolist() == ["0", "1"] * 3
    assert ran.store.splits().tolist() == ["train"] * 4 + ["test"] * 2
    assert len(ran.document["failures"]) == 4
