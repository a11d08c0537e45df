"""What is read, what is embedded and what is found again, whatever became of the images."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import open_source
from pipeline.data.samples import DataSource, Sample
from pipeline.extract.extractor import extract
from pipeline.extract.plan import make_plan
from pipeline.store import open_store
from pipeline.store.manifest import read_manifest
from pipeline.store.table import LabelColumn, Status

from .conftest import write_image


def features_by_id(folder):
    store = open_store(folder)
    return dict(zip(store.ids(), np.asarray(store.features()), strict=True))


def same_rows(a, b):
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


def move(photos):
    return photos.rename(photos.parent / "elsewhere")


def move_below_another_folder(photos):
    (photos.parent / "disk").mkdir()
    return photos.rename(photos.parent / "disk" / "photos")


def copy(photos):
    return shutil.copytree(photos, photos.parent / "copy" / "photos")


def copy_without_times(photos):
    return shutil.copytree(photos, photos.parent / "copy" / "photos", copy_function=shutil.copy)


def move_between_classes(photos):
    (photos / "cat" / "00.png").rename(photos / "dog" / "00.png")


def rename_a_class(photos):
    (photos / "cat").rename(photos / "kitten")


def rename_a_file(photos):
    (photos / "cat" / "00.png").rename(photos / "cat" / "first.png")


def rename_by_case_only(photos):
    (photos / "cat" / "00.png").rename(photos / "cat" / "00.PNG")


def swap_two_names(photos):
    a, b, aside = photos / "cat" / "00.png", photos / "cat" / "02.png", photos.parent / "aside"
    a.rename(aside), b.rename(a), aside.rename(b)
    os.utime(a, (5, 5)), os.utime(b, (6, 6))


def add(photos):
    write_image(photos / "cat" / "new.png", seed=50)


def change(photos):
    write_image(photos / "cat" / "00.png", seed=51)


def change_most(photos):
    for i, file in enumerate(sorted(photos.rglob("*.png"))[:10]):
        write_image(file, seed=300 + i)


def touch(photos):
    os.utime(photos / "cat" / "00.png", (1, 1))


def delete(photos):
    (photos / "cat" / "00.png").unlink()


def duplicate(photos):
    shutil.copy(photos / "cat" / "00.png", photos / "dog" / "copy.png")


def replace_by_a_copy_of_another(photos):
    shutil.copy(photos / "cat" / "02.png", photos / "cat" / "00.png")


def put_aside(photos):
    (photos / "cat" / "00.png").rename(photos.parent / "aside.png")


def bring_back(photos):
    (photos.parent / "aside.png").rename(photos / "cat" / "00.png")


def bring_back_as_another(photos):
    (photos.parent / "aside.png").rename(photos / "dog" / "back.png")


def delete_the_copy(photos):
    (photos / "dog" / "copy.png").unlink()


CASES = [
    # what happens between the runs; then of the last run: cached, linked, embedded, removed
    ([], (12, 0, 0, 0)),
    ([move], (0, 12, 0, 0)),
    ([move_below_another_folder], (0, 12, 0, 0)),
    ([copy], (0, 12, 0, 0)),
    ([copy_without_times], (0, 12, 0, 0)),
    ([move_between_classes], (11, 1, 0, 1)),
    ([rename_a_class], (6, 6, 0, 6)),
    ([rename_a_file], (11, 1, 0, 1)),
    ([rename_by_case_only], (11, 1, 0, 1)),
    ([swap_two_names], (10, 2, 0, 0)),
    ([add], (12, 0, 1, 0)),
    ([change], (11, 0, 1, 0)),
    ([touch], (11, 1, 0, 0)),
    ([delete], (11, 0, 0, 1)),
    ([duplicate], (12, 1, 0, 0)),
    ([replace_by_a_copy_of_another], (11, 1, 0, 0)),
    ([put_aside, bring_back], (11, 1, 0, 0)),
    ([put_aside, bring_back_as_another], (11, 1, 0, 0)),
    ([duplicate, delete], (12, 0, 0, 1)),
    ([duplicate, delete_the_copy], (12, 0, 0, 1)),
    ([duplicate, change], (12, 0, 1, 0)),
    ([delete, add], (11, 0, 1, 0)),
    ([change_most], (2, 0, 10, 0)),
    ([move, change_most], (2, 0, 10, 0)),
    ([move, move_below_another_folder], (0, 12, 0, 0)),
]


@pytest.mark.parametrize(
    ("changes", "counts"), CASES, ids=[" then ".join(c.__name__ for c in cs) for cs, _ in CASES]
)
def test_only_what_is_new_is_embedded(embed, photos, pixels, tmp_path, changes, counts):
    embed(photos)
    for change_images in changes:
        photos = change_images(photos) or photos
        report = embed(photos)
    report = report if changes else embed(photos)

    assert (report.n_cached, report.n_linked, report.n_embedded, report.n_removed) == counts
    assert report.n_decoded == report.n_embedded
    assert same_rows(features_by_id(report.store), fresh(photos, pixels, tmp_path))
    assert embed(photos).n_cached == len(open_source(str(photos)).samples)


def fresh(photos, pixels, tmp_path):
    """Features by id, without anything that was there before."""
    report = extract(open_source(str(photos)), pixels, cache_dir=tmp_path / "another cache")
    return features_by_id(report.store)


def write_images(folder, first_seed):
    for i in range(4):
        write_image(folder / "cat" / f"{i:02d}.png", seed=first_seed + i)
    return folder


@pytest.mark.parametrize("follow", [move_below_another_folder, copy, copy_without_times])
def test_the_second_folder_of_a_name_keeps_its_store(embed, photos, tmp_path, follow):
    first = embed(photos)
    data = write_images(tmp_path / "second" / "photos", first_seed=100)
    second = embed(data)

    report = embed(follow(data))

    assert second.store != first.store
    assert (report.store, report.n_embedded, report.n_decoded) == (second.store, 0, 0)
    assert embed(photos).n_cached == 12


def test_a_folder_where_another_was_gets_a_store_of_its_own(embed, photos, tmp_path):
    first = embed(photos)
    data = write_images(tmp_path / "second" / "photos", first_seed=100)
    second = embed(data)
    moved = move_below_another_folder(data)
    embed(moved)

    third = embed(write_images(data, first_seed=200))

    assert third.n_embedded == 4
    assert len({first.store, second.store, third.store}) == 3
    assert embed(moved).n_cached == embed(data).n_cached == 4


def test_a_moved_folder_is_read_only_once(embed, photos):
    embed(photos)
    data = move(photos)
    assert embed(data).n_linked == 12
    assert embed(data).n_cached == 12


def change_unseen(file: Path) -> None:
    """Other pixels, but the size and time that the file had."""
    stat = file.stat()
    pixels = bytearray(file.read_bytes())
    pixels[-24:] = bytes(255 - value for value in pixels[-24:])
    file.write_bytes(bytes(pixels))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def bitmaps(tmp_path):
    """Twelve uncompressed images, all of one size in bytes."""
    for i in range(12):
        write_image(tmp_path / "photos" / "x" / f"{i:02d}.bmp", seed=i)
    return tmp_path / "photos"


def test_a_change_that_size_and_time_hide_is_found_by_content(embed, bitmaps, pixels, tmp_path):
    embed(bitmaps)
    change_unseen(bitmaps / "x" / "05.bmp")
    assert embed(bitmaps).n_embedded == 0

    report = embed(bitmaps, verify_content=True)

    assert (report.n_embedded, report.n_linked) == (1, 11)
    assert same_rows(features_by_id(report.store), fresh(bitmaps, pixels, tmp_path))


def test_a_moved_folder_is_not_trusted_before_all_of_it_was_read(
    embed, bitmaps, pixels, tmp_path, monkeypatch
):
    """An interrupted run has seen four images; the next one must not believe the others' times."""
    monkeypatch.setattr("pipeline.extract.stream.GATHERED_SAMPLES", 4)
    embed(bitmaps)
    data = move(bitmaps)
    change_unseen(data / "x" / "11.bmp")
    assert embed(data, should_stop=lambda: True).interrupted

    report = embed(data)

    assert (report.n_cached, report.n_linked, report.n_embedded) == (4, 7, 1)
    assert same_rows(features_by_id(report.store), fresh(data, pixels, tmp_path))


# Columns that `tlpipe relabel` set


def source_of(labels, *, columns=("label",), split="train"):
    samples = [
        Sample(f"{i}.png", f"/nowhere/{i}.png", tuple(row), split) for i, row in enumerate(labels)
    ]
    return DataSource("toy", "toy", Path("/nowhere"), "manifest", samples, columns)


def table_after(source, known, relabelled):
    return make_plan(source, known, relabelled=relabelled).table


def test_relabelled_columns_stay_and_new_samples_take_the_source_s():
    known = make_plan(source_of([["a"], ["b"]]), None).table
    known.labels = {"label": LabelColumn.of(["x", None]), "group": LabelColumn.of(["g", "h"])}
    known.splits[:] = [2, 3]

    table = table_after(source_of([["a"], ["b"], ["c"]]), known, ["label", "group", "split"])

    assert {name: column.decode().tolist() for name, column in table.labels.items()} == {
        "label": ["x", None, "c"],
        "group": ["g", "h", None],
    }
    assert table.labels["label"].categories == ["c", "x"]
    assert table.splits.tolist() == [2, 3, 1]


def test_columns_that_are_not_marked_are_the_source_s():
    known = make_plan(source_of([["a"], ["b"]]), None).table
    known.labels = {"label": LabelColumn.of(["x", "y"]), "group": LabelColumn.of(["g", "h"])}

    table = table_after(source_of([["a"], ["b"]]), known, ["group"])

    assert table.labels["label"].decode().tolist() == ["a", "b"]
    assert table.labels["group"].decode().tolist() == ["g", "h"]


def test_relabelled_values_follow_their_samples_when_those_are_reordered():
    known = make_plan(source_of([["a"], ["b"], ["c"]]), None).table
    known.labels = {"label": LabelColumn.of(["x", "y", "z"])}
    known.statuses[:] = [Status.OK, Status.FAILED, Status.PENDING]
    reordered = source_of([["a"], ["b"], ["c"]])
    reordered.samples.reverse()

    table = table_after(reordered, known, ["label"])

    assert table.labels["label"].decode().tolist() == ["z", "y", "x"]


# Two data sets of one name


def hide(photos, name):
    """The cross-validation fold that lacks one of the images; both folds are there."""
    fold = shutil.copytree(photos, photos.parent / name / "train")
    (fold / "cat" / f"{name}.png").unlink()
    return fold


def manifest_of(photos, name, *rows):
    file = photos.parent / name / "list.csv"
    file.parent.mkdir()
    file.write_text("\n".join(["path,label", *(f"{row},x" for row in rows)]))
    return file


@pytest.fixture
def embed_list(tmp_path, photos, pixels):
    """Extract a manifest of photos; gives the report and what was said."""

    def run(file):
        said = []
        source = open_source(str(file), root=photos, cache_dir=tmp_path / "cache")
        report = extract(source, pixels, cache_dir=tmp_path / "cache", on_note=said.append)
        return report, " ".join(said)

    return run


def test_folds_that_share_most_of_their_images_have_a_store_each(embed, photos):
    folds = [hide(photos, "00"), hide(photos, "02")]
    stores = [embed(fold).store for fold in folds]

    assert stores[0] != stores[1]
    for fold, store in zip(folds, stores, strict=True):
        report = embed(fold)
        assert (report.store, report.n_cached) == (store, 11)
        assert open_store(store).ids() == [s.id for s in open_source(str(fold)).samples]


def test_a_copy_of_which_one_image_is_another_has_a_store_of_its_own(embed, photos):
    first = embed(photos)
    data = copy(photos)
    write_image(data / "cat" / "00.png", seed=70)

    assert embed(data).store != first.store
    assert embed(photos).n_cached == 12


def test_two_manifests_of_one_name_and_root_have_a_store_each(embed_list, photos):
    one = manifest_of(photos, "m1", "cat/00.png", "cat/02.png")
    two = manifest_of(photos, "m2", "dog/01.png", "dog/03.png", "dog/05.png")
    (first, _), (second, _) = embed_list(one), embed_list(two)

    assert first.store != second.store
    assert embed_list(one)[0].n_cached == 2
    assert open_store(first.store).ids() == ["cat/00.png", "cat/02.png"]
    assert open_store(second.store).ids() == ["dog/01.png", "dog/03.png", "dog/05.png"]


def test_a_folder_and_a_manifest_of_one_name_and_root_have_a_store_each(embed, embed_list, photos):
    file = manifest_of(photos, "m1", "cat/00.png").rename(photos.parent / "photos.csv")
    folder, (listed, _) = embed(photos), embed_list(file)

    assert listed.store != folder.store
    assert embed(photos).n_cached == 12


def test_a_manifest_that_was_edited_keeps_its_store(embed_list, photos):
    file = manifest_of(photos, "m1", "cat/00.png")
    first, _ = embed_list(file)
    file.write_text("path,label\ndog/01.png,y\n")

    report, said = embed_list(file)

    assert (report.store, report.n_embedded, said) == (first.store, 1, "")


def test_a_manifest_that_was_moved_keeps_its_store_and_says_so(embed_list, photos):
    file = manifest_of(photos, "m1", "cat/00.png", "dog/01.png")
    first, _ = embed_list(file)
    moved = file.rename(photos.parent / "list.csv")

    report, said = embed_list(moved)

    assert (report.store, report.n_cached) == (first.store, 2)
    assert f"was made from {file}, which is gone; it is that of {moved} now." in said
    assert embed_list(moved)[1] == ""


def test_a_manifest_s_store_of_an_earlier_release_is_found(embed_list, photos):
    """It does not say where the manifest itself was."""
    file = manifest_of(photos, "m1", "cat/00.png", "dog/01.png")
    first, _ = embed_list(file)
    manifest = read_manifest(first.store)
    source = {name: value for name, value in manifest.source.items() if name != "manifest"}
    replace(manifest, source=source).write(first.store)

    report, said = embed_list(file)

    assert (report.store, report.n_cached, said) == (first.store, 2, "")
    assert read_manifest(first.store).source["manifest"] == str(file)


@pytest.mark.parametrize(("follow", "why"), [(move, "is gone"), (copy, "has the same images")])
def test_a_store_that_another_folder_takes_over_is_said_to_be(embed, photos, follow, why):
    first, said = embed(photos), []
    data = follow(photos)

    assert embed(data, on_note=said.append).store == first.store

    assert said == [f"{first.store} was made from {photos}, which {why}; it is that of {data} now."]
