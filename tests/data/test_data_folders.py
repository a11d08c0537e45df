"""Folders: three layouts, messy names, links, and what is left out with a note."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.data import open_source
from pipeline.data.names import IMAGE_EXTENSIONS, safe_name, to_id
from pipeline.errors import DataError, EmptySourceError


def touch(root, *names):
    """Files of no content: listing opens none."""
    for name in names:
        file = Path(root) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def labels_by_id(source):
    return {sample.id: sample.labels for sample in source.samples}


def splits_by_id(source):
    return {sample.id: sample.split for sample in source.samples}


def test_a_class_is_the_first_folder_on_the_way(tmp_path):
    touch(tmp_path / "pets", "cat/1.jpg", "cat/summer/beach/2.JPG", "dog/1.png", "dog/2.png")

    source = open_source(str(tmp_path / "pets"))

    assert source.layout == "classes"
    assert source.name == "pets"
    assert source.root == tmp_path / "pets"
    assert source.label_columns == ("label",)
    assert labels_by_id(source) == {
        "cat/1.jpg": ("cat",),
        "cat/summer/beach/2.JPG": ("cat",),
        "dog/1.png": ("dog",),
        "dog/2.png": ("dog",),
    }
    assert [sample.id for sample in source.samples] == sorted(labels_by_id(source))
    assert source.split_origin == "made: 20% of each class held out for test, by id, seed 0"
    assert sorted(splits_by_id(source).values()) == ["test", "test", "train", "train"]
    assert source.notes == []


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Training", "Valid", "Testing"), ("TRAIN", "validation", "Test")],
)
def test_split_folders_are_known_by_their_names(tmp_path, train, val, test):
    touch(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{val}/a/2.png", f"{val}/b/2.png")
    touch(tmp_path, f"{test}/a/3.png", f"{test}/b/3.png")

    source = open_source(str(tmp_path))

    assert source.layout == "splits"
    assert source.split_origin == "given"
    assert splits_by_id(source) == {
        f"{folder}/{label}/{i}.png": split
        for folder, split, i in ((train, "train", 1), (val, "val", 2), (test, "test", 3))
        for label in "ab"
    }
    assert {label for (label,) in labels_by_id(source).values()} == {"a", "b"}


def test_a_flat_folder_has_no_labels(tmp_path):
    touch(tmp_path, "1.png", "2.jpg", "empty/readme.txt")

    source = open_source(str(tmp_path))

    assert source.layout == "flat"
    assert source.label_columns == ()
    assert [(s.id, s.labels, s.split) for s in source.samples] == [
        ("1.png", (), ""),
        ("2.jpg", (), ""),
    ]
    assert source.split_origin == "none"
    assert "1 folder without an image: 'empty'." in source.notes


def test_a_flat_folder_points_at_the_manifest_beside_the_images(tmp_path):
    touch(tmp_path, "1.png", "labels.csv")

    source = open_source(str(tmp_path))

    assert any("'labels.csv' names them, give that file" in note for note in source.notes)


def test_only_a_train_folder_gets_a_test_split_made_from_it(tmp_path):
    touch(tmp_path, *(f"train/{c}/{i}.png" for c in "ab" for i in range(10)))

    source = open_source(str(tmp_path), test_fraction=0.3)

    assert source.split_origin.startswith("made: 30% of each class held out for test")
    assert source.split_origin.endswith("only train was given")
    assert list(splits_by_id(source).values()).count("test") == 6


def test_train_and_val_without_test_are_kept(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")

    source = open_source(str(tmp_path))

    assert source.split_origin == "given"
    assert set(splits_by_id(source).values()) == {"train", "val"}
    assert (
        "No test split was given, only train and val: kept so, nothing is tested." in source.notes
    )


def test_a_test_fraction_of_zero_makes_everything_train(tmp_path):
    touch(tmp_path, "a/1.png", "a/2.png", "b/1.png")

    source = open_source(str(tmp_path), test_fraction=0)

    assert set(splits_by_id(source).values()) == {"train"}
    assert source.split_origin == "made: everything is train"


def test_a_class_called_train_is_a_class_among_others(tmp_path):
    touch(tmp_path, "bus/1.png", "car/1.png", "train/1.png", "train/2.png")

    source = open_source(str(tmp_path))

    assert source.layout == "classes"
    assert {label for (label,) in labels_by_id(source).values()} == {"bus", "car", "train"}


def test_folders_beside_the_splits_are_left_out_with_a_note(tmp_path):
    touch(tmp_path, "train/a/1.png", "test/a/1.png", "masks/1.png", "cover.png", "train/loose.png")

    source = open_source(str(tmp_path))

    assert set(labels_by_id(source)) == {"train/a/1.png", "test/a/1.png"}
    assert "Left out, since they are not named as a split: 'masks'." in source.notes
    assert "1 image beside the split folders left out." in source.notes
    assert any("1 image beside the class folders of 'train' left out" in n for n in source.notes)


def test_a_flat_test_folder_is_kept_without_labels(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png", "test/2.png")

    source = open_source(str(tmp_path))

    assert labels_by_id(source)["test/1.png"] == (None,)
    assert splits_by_id(source)["test/1.png"] == "test"
    assert any(note.startswith("2 samples without a label") for note in source.notes)


def test_images_beside_class_folders_are_left_out_with_a_note(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png", "loose.png", "loose2.png")

    source = open_source(str(tmp_path))

    assert set(labels_by_id(source)) == {"a/1.png", "b/1.png"}
    assert any(
        note.startswith("2 images beside the class folders left out, such as 'loose.png'")
        for note in source.notes
    )


def test_other_files_are_counted(tmp_path):
    touch(tmp_path, "a/1.png", "a/1.txt", "a/2.txt", "b/1.png", "b/Makefile", "x.json")

    source = open_source(str(tmp_path))

    note = next(note for note in source.notes if "ignored" in note)
    assert note.startswith("4 other files ignored (.txt 2, ")
    assert "without extension 1" in note


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_extensions_are_known_in_any_case(tmp_path, extension):
    touch(tmp_path, f"a/1{extension}", f"a/2{extension.upper()}")

    assert len(open_source(str(tmp_path)).samples) == 2


def test_a_folder_wrapped_in_a_folder_is_pointed_at(tmp_path):
    touch(tmp_path, "flowers/rose/1.png", "flowers/tulip/1.png")

    source = open_source(str(tmp_path))

    assert any(f"did you mean {tmp_path / 'flowers'}?" in note for note in source.notes)


def test_the_cache_below_the_data_is_not_data(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "b/1.png", "cache/data/digits/0/1.png")
    monkeypatch.chdir(tmp_path)

    source = open_source(".")

    assert source.name == safe_name(tmp_path.name)
    assert set(labels_by_id(source)) == {"a/1.png", "b/1.png"}


def test_a_pipe_is_not_an_image(tmp_path):
    touch(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a" / "2.png")

    assert [sample.id for sample in open_source(str(tmp_path)).samples] == ["a/1.png"]


def test_a_linked_class_folder_is_followed(tmp_path):
    touch(tmp_path, "store/cats/1.png", "pets/dog/1.png")
    (tmp_path / "pets" / "cat").symlink_to(tmp_path / "store" / "cats")

    source = open_source(str(tmp_path / "pets"))

    assert labels_by_id(source) == {"cat/1.png": ("cat",), "dog/1.png": ("dog",)}


def test_bytes_that_are_not_utf8_are_escaped_in_the_id_alone(tmp_path):
    folder = os.fsencode(tmp_path / "a")
    Path(os.fsdecode(folder)).mkdir()
    Path(os.fsdecode(folder + b"/caf\xe9.png")).touch()

    (sample,) = open_source(str(tmp_path)).samples

    assert sample.id == r"a/caf\xe9.png"
    assert os.fsencode(sample.file).endswith(b"caf\xe9.png")
    assert Path(sample.file).exists()


def test_names_that_compose_to_the_same_are_one_sample(tmp_path):
    touch(tmp_path, "a/caf\u00e9.png", "a/cafe\u0301.png")

    source = open_source(str(tmp_path))

    assert [sample.id for sample in source.samples] == ["a/caf\u00e9.png"]
    assert any("1 image left out, since another one has the same name" in n for n in source.notes)


def test_composed_and_decomposed_folders_are_one_class(tmp_path):
    touch(tmp_path, "caf\u00e9/1.png", "cafe\u0301/2.png", "tea/1.png")

    source = open_source(str(tmp_path))

    assert {label for (label,) in labels_by_id(source).values()} == {"caf\u00e9", "tea"}


def test_an_empty_folder_lists_what_was_looked_for_and_seen(tmp_path):
    touch(tmp_path / "docs", "a/1.txt", "a/2.txt", "b.pdf")

    with pytest.raises(EmptySourceError) as error:
        open_source(str(tmp_path / "docs"))

    assert error.value.exit_code == 4
    assert str(error.value) == (
        f"{tmp_path / 'docs'} holds no image.\n"
        "  Looked in it and every folder below for .jpg .jpeg .jpe .jfif .png .bmp .gif .webp .tif "
        ".tiff .ppm .pgm .pbm .avif .heic .heif, in any case.\n"
        "  Found 3 other files (.txt 2, .pdf 1)."
    )


@contextmanager
def as_an_ordinary_user():
    """Root may read everything, so step down for a moment."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_a_folder_that_cannot_be_read_is_an_error():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        touch(folder, "a/1.png", "secret/1.png")
        secret = Path(folder) / "secret"
        secret.chmod(0)
        try:
            with as_an_ordinary_user(), pytest.raises(DataError) as error:
                open_source(folder)
        finally:
            secret.chmod(0o755)

    assert f"Cannot read the folder {secret}: Permission denied." in str(error.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("flowers", "flowers"),
        ("Fleurs d'été (2024)", "Fleurs-d-ete-2024"),
        ("..", "source-"),
        ("фото", "source-"),
        ("a" * 300, "a" * 80),
        ("=cmd()", "cmd"),
    ],
)
def test_names_for_the_cache_are_safe(text, name):
    assert safe_name(text).startswith(name)
    assert len(safe_name(text)) <= 80
    assert set(safe_name(text)) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
    )


def test_a_folder_called_data_is_not_taken_for_the_caches_own(tmp_path):
    touch(tmp_path / "flowers" / "data", "a/1.png")

    assert open_source(str(tmp_path / "flowers" / "data")).name == "flowers-data"


def test_ids_are_composed():
    assert to_id("a/cafe\u0301.png") == "a/caf\u00e9.png"
    assert to_id("plain.png") == "plain.png"
