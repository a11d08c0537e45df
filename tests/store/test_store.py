"""What goes into a store comes out of it: aligned, current, and from one moment."""

import contextlib
import errno
import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import (
    CorruptStoreError,
    LockedError,
    MismatchError,
    ResourceError,
    StoreError,
    UnknownNameError,
    UsageError,
)
from pipeline.store import open_store
from pipeline.store.durable import replacing
from pipeline.store.hdf5 import _opened, build_file, not_damage
from pipeline.store.manifest import LayerInfo, read_manifest
from pipeline.store.table import LabelColumn, Status
from pipeline.store.writer import StoreWriter

from .conftest import LAYERS, RECIPE, entry_of, features_of, make_writer, table_of


def expected(ids, layers=("low", "top")):
    return np.stack([np.concatenate([features_of(i)[name][0] for name in layers]) for i in ids])


def test_features_come_back_aligned_with_ids_and_labels(store_folder, ids):
    store = open_store(store_folder)
    assert store.ids() == ids
    np.testing.assert_array_equal(np.asarray(store.features()), expected(ids))
    assert store.labels().tolist() == [i.split("/")[0] for i in ids]
    for split in ("train", "test"):
        chosen = store.ids(split)
        np.testing.assert_array_equal(np.asarray(store.features(split)), expected(chosen))
        assert store.labels(split=split).tolist() == [i.split("/")[0] for i in chosen]
    assert store.ids("val") == []
    assert np.asarray(store.features("val")).shape == (0, 8)


def test_layers_are_chosen_in_the_order_asked_for(store_folder, ids):
    store = open_store(store_folder)
    assert store.layers == {"low": (3,), "top": (5,)}
    np.testing.assert_array_equal(
        np.asarray(store.features(layers=["top", "low"])), expected(ids, ("top", "low"))
    )
    top = store.features(layers=["top"])
    assert top.dtype == np.float16
    np.testing.assert_array_equal(np.asarray(top), expected(ids, ("top",)))


@pytest.mark.parametrize(
    "key",
    [
        0,
        -1,
        slice(3, 11),
        slice(None, None, -2),
        [5, 1, 1, 19],
        np.arange(20) % 3 == 0,
        (4, 2),
        (slice(2, 9), slice(1, 3)),
        slice(7, 7),
    ],
    ids=str,
)
def test_slices_equal_slices_of_the_whole(store_folder, ids, key):
    features = open_store(store_folder).features()
    np.testing.assert_array_equal(features[key], expected(ids)[key])
    assert features.shape == (20, 8)


@pytest.mark.parametrize(
    "key", [None, True, np.True_, ([0, 1], [0, 1]), (), (0, None), ..., (..., 0)]
)
def test_an_index_means_what_it_means_to_numpy_or_is_refused(store_folder, ids, key):
    features = open_store(store_folder).features()
    if key is ...:
        np.testing.assert_array_equal(features[...], expected(ids))
        return
    with pytest.raises(IndexError):
        features[key]


@pytest.mark.parametrize("batch_size", [1, 7, 20, 100])
def test_batches_go_through_a_split_once_and_in_order(store_folder, batch_size):
    store = open_store(store_folder)
    batches = list(store.batches("train", ["top"], batch_size=batch_size))
    assert {len(batch.ids) for batch in batches[:-1]} <= {batch_size}
    assert [i for batch in batches for i in batch.ids] == store.ids("train")
    np.testing.assert_array_equal(
        np.concatenate([batch.features for batch in batches]), store.features("train", ["top"])
    )
    assert [y for batch in batches for y in batch.labels] == store.labels(split="train").tolist()


def test_batches_of_an_unlabelled_store_have_no_labels(tmp_path):
    with make_writer(tmp_path / "store") as writer:
        table = table_of(["1.png"])
        table.labels = {}
        writer.begin(table)
        writer.add(entry_of("1.png"), features_of("1.png"))
        writer.finish()
    (batch,) = open_store(tmp_path / "store").batches()
    assert (batch.ids, batch.labels.tolist()) == (["1.png"], [None])


def test_a_slice_reads_only_the_shards_it_needs(store_folder):
    store = open_store(store_folder)
    store.features()[0:6]
    assert store._checked == {1}


def test_plain_h5py_reads_the_view_from_anywhere(store_folder, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with h5py.File(store_folder / "features.h5") as file:
        low = file["features/low"][:, 0]
        names = file["id"].asstr()[:].tolist()
        labels = file["label/label"].asstr()[:].tolist()
        splits = file["split"].asstr()[:].tolist()
    assert names == ids
    np.testing.assert_array_equal(low, expected(ids, ("low",)))
    assert labels == [i.split("/")[0] for i in ids]
    assert splits == open_store(store_folder).splits().tolist()


def test_a_moved_store_reads_the_same(store_folder, ids, tmp_path):
    moved = store_folder.rename(tmp_path / "moved")
    np.testing.assert_array_equal(np.asarray(open_store(moved).features()), expected(ids))
    with h5py.File(moved / "features.h5") as file:
        np.testing.assert_array_equal(file["features/top"][:, 0], expected(ids, ("top",)))


def test_what_was_committed_survives_a_writer_that_stops(tmp_path, ids):
    folder = tmp_path / "store"

    with contextlib.suppress(ZeroDivisionError), make_writer(folder, shard_rows=6) as writer:
        writer.begin(table_of(ids))
        for sample_id in ids[:15]:
            writer.add(entry_of(sample_id), features_of(sample_id))
        1 / 0  # noqa: B018
    store = open_store(folder)
    assert store.ids() == ids[:12]
    np.testing.assert_array_equal(np.asarray(store.features()), expected(ids[:12]))
    assert store.table.count(Status.PENDING) == 8


def test_resumed_equals_uninterrupted(tmp_path, store_folder, ids):
    folder = tmp_path / "resumed"
    with make_writer(folder, shard_rows=6) as writer:
        writer.begin(table_of(ids))
        for sample_id in ids[:7]:
            writer.add(entry_of(sample_id), features_of(sample_id))
    with make_writer(folder, shard_rows=6) as writer:
        writer.begin(writer.table)
        for sample_id in ids[6:]:
            writer.add(entry_of(sample_id), features_of(sample_id))
        writer.finish()
    resumed, whole = open_store(folder), open_store(store_folder)
    assert resumed.ids() == whole.ids()
    assert np.asarray(resumed.features()).tobytes() == np.asarray(whole.features()).tobytes()


def test_nothing_is_written_when_nothing_changed(store_folder):
    def contents():
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in store_folder.rglob("*.h5")}

    before = contents(), (store_folder / "store.json").read_bytes()
    with make_writer(store_folder) as writer:
        writer.begin(writer.table)
        writer.finish()
    assert (contents(), (store_folder / "store.json").read_bytes()) == before


def test_identical_images_share_a_row(tmp_path):
    folder = tmp_path / "store"
    with make_writer(folder) as writer:
        writer.begin(table_of(["a/1.png", "a/copy.png"]))
        writer.add(entry_of("a/1.png", "same"), features_of("same"))
        writer.link(entry_of("a/copy.png", "same"))
        writer.finish()
    store = open_store(folder)
    first, second = np.asarray(store.features())
    np.testing.assert_array_equal(first, second)
    assert sum(shard.n for shard in store.manifest.shards) == 1
    assert len(set(store.digests().tolist())) == 1


def test_bytes_that_were_never_embedded_cannot_be_linked(store_folder):
    with make_writer(store_folder) as writer, pytest.raises(KeyError):
        writer.link(entry_of("a/1.png", "never seen"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("top"), r"layers \['low'\], expected \['low', 'top'\]"),
        (
            lambda f: f.update(top=f["top"][:, :4]),
            r"is float16 \(1, 4\), expected float16 \(1, 5\)",
        ),
        (lambda f: f.update(top=f["top"].astype("f8")), "is float64"),
        (lambda f: f["low"].__setitem__((0, 1), np.nan), "layer 'low' of 'a/1.png' is not finite"),
        (lambda f: f["top"].__setitem__((0, 1), np.inf), "not finite"),
    ],
)
def test_features_that_do_not_fit_never_enter(tmp_path, change, message):
    with make_writer(tmp_path / "store") as writer:
        writer.begin(table_of(["a/1.png"]))
        features = features_of("a/1.png")
        change(features)
        with pytest.raises(ValueError, match=message):
            writer.add(entry_of("a/1.png"), features)
        writer.finish()
    assert len(open_store(tmp_path / "store")) == 0


def test_a_shard_of_another_size_is_told_before_anything_is_embedded(store_folder):
    path = store_folder / "shards" / "000002.h5"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptStoreError, match=r"000002\.h5 .* bytes on disk") as caught:
        make_writer(store_folder).__enter__()
    assert f"tlpipe verify {store_folder} --repair" in str(caught.value)


def test_the_manifest_has_a_copy_of_the_same_bytes(store_folder):
    backup = (store_folder / "store.backup.json").read_bytes()
    assert backup == (store_folder / "store.json").read_bytes()


@pytest.mark.parametrize("use", [open_store, lambda folder: make_writer(folder).__enter__()])
def test_whoever_misses_the_manifest_is_told_of_its_copy(store_folder, use):
    (store_folder / "store.json").unlink()
    with pytest.raises(CorruptStoreError, match=r"has lost its store\.json") as caught:
        use(store_folder)
    assert f"tlpipe verify {store_folder} --repair" in str(caught.value)


def test_a_writer_without_manifest_and_copy_touches_nothing(store_folder):
    (store_folder / "store.json").unlink()
    (store_folder / "store.backup.json").unlink()
    shards = sorted((store_folder / "shards").iterdir())
    with pytest.raises(CorruptStoreError, match=r"mv .*toy-1 .*toy-1-damaged"):
        make_writer(store_folder).__enter__()
    assert sorted((store_folder / "shards").iterdir()) == shards


def test_a_file_system_without_locks_is_told(tmp_path):
    """The kernel's answer is given by hand: there is no such file system to be had in a test."""
    script = (
        "import errno, fcntl, sys\n"
        "def flock(*_): raise OSError(int(sys.argv[2]), 'no locks')\n"
        "fcntl.flock = flock\n"
        "from pathlib import Path\n"
        "from pipeline.errors import StoreError\n"
        "from pipeline.store.lock import WriterLock\n"
        "try: WriterLock(Path(sys.argv[1])).acquire()\n"
        "except StoreError as error: print(error)\n"
    )
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        process = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), str(number)],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "has no file locks" in process.stdout
        assert "--cache FOLDER" in process.stdout


def test_a_failed_sample_has_a_reason_and_no_row(tmp_path):
    folder = tmp_path / "store"
    with make_writer(folder) as writer:
        writer.begin(table_of(["a/1.png", "a/bad.png", "a/2.png"]))
        writer.add(entry_of("a/1.png"), features_of("a/1.png"))
        writer.fail(replace(entry_of("a/bad.png"), reason="empty file (0 bytes)"))
        writer.add(entry_of("a/2.png"), features_of("a/2.png"))
        writer.finish()
    store = open_store(folder)
    assert store.ids() == ["a/1.png", "a/2.png"]
    assert store.failures == {"a/bad.png": "empty file (0 bytes)"}
    np.testing.assert_array_equal(np.asarray(store.features()), expected(["a/1.png", "a/2.png"]))


def test_relabelling_touches_no_shard(store_folder, ids):
    shards = {p: p.stat().st_ino for p in (store_folder / "shards").iterdir()}
    with make_writer(store_folder) as writer:
        table = table_of(ids)
        for column in ("digests", "sizes", "mtimes", "statuses", "shards", "rows"):
            setattr(table, column, getattr(writer.table, column))
        table.labels = {"species": LabelColumn.of([None, *["x"] * 19])}
        writer.begin(table)
        writer.finish()
    store = open_store(store_folder)
    assert store.labels().tolist() == [None] + ["x"] * 19
    assert {p: p.stat().st_ino for p in (store_folder / "shards").iterdir()} == shards
    with h5py.File(store_folder / "features.h5") as file:
        assert list(file["label"]) == ["species"]


def test_samples_that_left_are_no_longer_served_nor_shown(store_folder, ids):
    with make_writer(store_folder) as writer:
        kept = table_of(ids[5:])
        for column in ("digests", "sizes", "mtimes", "statuses", "shards", "rows"):
            setattr(kept, column, getattr(writer.table, column)[5:])
        writer.begin(kept)
        writer.finish()
    np.testing.assert_array_equal(
        np.asarray(open_store(store_folder).features()), expected(ids[5:])
    )
    with h5py.File(store_folder / "features.h5") as file:
        np.testing.assert_array_equal(file["features/low"][:, 0], expected(ids[5:], ("low",)))


def test_a_reader_keeps_its_moment_while_a_writer_goes_on(store_folder, ids):
    store = open_store(store_folder)
    more = [*ids, "cat/new.png"]
    with make_writer(store_folder) as writer:
        table = table_of(more)
        for column in ("digests", "sizes", "mtimes", "statuses", "shards", "rows"):
            getattr(table, column)[:20] = getattr(writer.table, column)
        writer.begin(table)
        during = open_store(store_folder)
        writer.add(entry_of("cat/new.png"), features_of("cat/new.png"))
        writer.finish()
    assert during.ids() == ids
    np.testing.assert_array_equal(np.asarray(store.features()), expected(ids))
    assert open_store(store_folder).ids() == more


def test_a_second_writer_is_told_who_holds_the_store(store_folder):
    with make_writer(store_folder), pytest.raises(LockedError) as caught:
        make_writer(store_folder).__enter__()
    assert caught.value.exit_code == 6
    assert "is being written by process" in str(caught.value)
    make_writer(store_folder).__enter__().__exit__()


def test_another_recipe_is_refused_and_nothing_overwritten(store_folder):
    before = (store_folder / "store.json").read_bytes()
    other = StoreWriter(store_folder, {**RECIPE, "precision": "bf16"}, LAYERS, {})
    with pytest.raises(MismatchError, match="Nothing was overwritten"):
        other.__enter__()
    assert (store_folder / "store.json").read_bytes() == before


def test_leftovers_of_a_killed_writer_are_swept(store_folder):
    leftovers = [
        store_folder / "shards" / "000099.h5",
        store_folder / "shards" / "000098.h5.tmp",
        store_folder / "samples-000099.h5",
        store_folder / "store.json.tmp",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    with make_writer(store_folder):
        pass
    assert not any(path.exists() for path in leftovers)


def test_unpooled_maps_keep_their_shape(tmp_path):
    layers = {"map": LayerInfo((4, 2, 2), "float16"), "pooled": LayerInfo((4,), "float16")}
    maps = np.arange(48, dtype=np.float16).reshape(3, 1, 4, 2, 2)
    with StoreWriter(tmp_path / "store", RECIPE, layers, {}) as writer:
        writer.begin(table_of(["a/0", "a/1", "a/2"]))
        for i in range(3):
            writer.add(entry_of(f"a/{i}"), {"map": maps[i], "pooled": maps[i].mean((2, 3))})
        writer.finish()
    store = open_store(tmp_path / "store")
    assert store.features(layers=["map"]).shape == (3, 4, 2, 2)
    np.testing.assert_array_equal(store.features(layers=["map"])[1:], maps[1:, 0])
    with pytest.raises(UsageError, match="one layer at a time"):
        store.features()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store: store.features(layers=["topp"]), "Did you mean: top"),
        (lambda store: store.features(split="valid"), "Unknown split 'valid'"),
        (lambda store: store.labels("labels"), "Did you mean: label"),
        (lambda store: store.features(view=1), "There is no view 1"),
    ],
)
def test_what_is_not_there_is_a_usage_error(store_folder, call, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")) as caught:
        call(open_store(store_folder))
    assert caught.value.exit_code == 2


def test_labels_of_an_unlabelled_store(tmp_path):
    with make_writer(tmp_path / "store") as writer:
        table = table_of(["1.png"])
        table.labels = {}
        writer.begin(table)
        writer.add(entry_of("1.png"), features_of("1.png"))
        writer.finish()
    with pytest.raises(UsageError, match="has no labels"):
        open_store(tmp_path / "store").labels()


def test_two_label_columns_must_be_chosen_from(store_folder, ids):
    with make_writer(store_folder) as writer:
        writer.table.labels = {"colour": LabelColumn.of(ids), "shape": LabelColumn.of(ids)}
        writer._write_table(writer.table)
    store = open_store(store_folder)
    with pytest.raises(UsageError, match="Say which label column: colour, shape"):
        store.labels()
    with pytest.raises(UnknownNameError):
        store.labels("label")
    assert store.labels("colour").tolist() == ids


def test_a_folder_without_a_store(tmp_path):
    with pytest.raises(StoreError, match="is not a feature store") as caught:
        open_store(tmp_path)
    assert caught.value.exit_code == 4


def test_recipe_and_key_are_readable(store_folder):
    manifest = read_manifest(store_folder)
    assert manifest.recipe == RECIPE
    assert open_store(store_folder).key == manifest.key


def test_what_is_only_linked_is_acknowledged_too(store_folder, ids):
    with make_writer(store_folder, commit_seconds=0) as writer:
        table = table_of([*ids, "cat/copy.png"])
        for column in ("digests", "sizes", "mtimes", "statuses", "shards", "rows"):
            getattr(table, column)[:20] = getattr(writer.table, column)
        writer.begin(table)
        writer.link(entry_of("cat/copy.png", ids[0]))
    assert open_store(store_folder).ids() == [*ids, "cat/copy.png"]
    np.testing.assert_array_equal(open_store(store_folder).features()[20], expected(ids[:1])[0])
    with make_writer(store_folder) as writer:
        writer.begin(writer.table)
        writer.finish()
    assert open_store(store_folder).ids() == [*ids, "cat/copy.png"]


def test_a_failed_copy_of_the_manifest_does_not_undo_the_commit(store_folder, ids):
    backup = store_folder / "store.backup.json"
    with make_writer(store_folder) as writer:
        writer.begin(table_of([*ids, "cat/new.png"]))
        backup.unlink()
        backup.mkdir()  # it cannot be replaced by a file
        writer.add(entry_of("cat/new.png"), features_of("cat/new.png"))
        writer.commit()
        writer.add(entry_of(ids[0]), features_of(ids[0]))
        writer.commit()
    backup.rmdir()
    numbers = [shard.number for shard in read_manifest(store_folder).shards]
    assert len(set(numbers)) == len(numbers) == 6
    assert set(open_store(store_folder).ids()) == {"cat/new.png", ids[0]}


def test_an_older_manifest_put_back_is_told_before_anything_is_removed(store_folder, ids):
    older = (store_folder / "store.json").read_bytes()
    with make_writer(store_folder) as writer:
        writer.begin(table_of([*ids, "cat/new.png"]))
        writer.add(entry_of("cat/new.png"), features_of("cat/new.png"))
        writer.finish()
    shards = sorted((store_folder / "shards").iterdir())
    (store_folder / "store.json").write_bytes(older)
    with pytest.raises(CorruptStoreError, match="older than its copy"):
        make_writer(store_folder).__enter__()
    assert sorted((store_folder / "shards").iterdir()) == shards


@pytest.mark.parametrize("name", ["shards", "quarantine"])
def test_nothing_is_written_behind_a_linked_folder(store_folder, tmp_path, name):
    """A stranger's store whose shards are a link to mine must not sweep mine."""
    mine = shutil.copytree(store_folder, tmp_path / "mine")
    (mine / "quarantine").mkdir()
    before = sorted(p for p in mine.rglob("*") if p.is_file())
    if (store_folder / name).exists():
        shutil.rmtree(store_folder / name)
    (store_folder / name).symlink_to(mine / name)
    with pytest.raises(StoreError, match="is a link to another folder"):
        make_writer(store_folder).__enter__()
    assert sorted(p for p in mine.rglob("*") if p.is_file()) == before


def test_files_are_never_written_through_links(store_folder, ids, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    created = tmp_path / "created"
    (store_folder / "writer.json").symlink_to(victim)
    for name in ("features.h5.tmp", "store.json.tmp", "samples-000002.h5.tmp"):
        (store_folder / name).symlink_to(created)
    with make_writer(store_folder) as writer:
        writer.begin(table_of([*ids, "cat/new.png"]))
        writer.add(entry_of("cat/new.png"), features_of("cat/new.png"))
        writer.finish()
    assert victim.read_text() == "mine"
    assert not created.exists()
    assert not list(store_folder.glob("*.tmp"))


def test_pipes_in_the_place_of_files_keep_nobody_waiting(store_folder, ids):
    for name in ("writer.json", "features.h5.tmp", "store.json.tmp"):
        os.mkfifo(store_folder / name)
    with make_writer(store_folder) as writer:
        writer.begin(table_of(ids[:3]))
        with pytest.raises(LockedError):
            make_writer(store_folder).__enter__()
        writer.finish()
    assert open_store(store_folder).table.ids[:] == ids[:3]


def test_a_folder_in_the_place_of_the_view_is_one_clear_error(store_folder, ids):
    (store_folder / "features.h5").unlink()
    (store_folder / "features.h5").mkdir()
    with make_writer(store_folder) as writer, pytest.raises(ResourceError, match=r"features\.h5"):
        writer.begin(table_of(ids[:3]))


def test_new_folders_are_synced_up_to_the_one_that_was_there(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recorded(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with make_writer(tmp_path / "cache" / "photos" / "store"):
        pass
    assert {str(tmp_path), str(tmp_path / "cache"), str(tmp_path / "cache" / "photos")} <= set(
        synced
    )


def test_two_files_of_one_name_at_once_leave_one_whole(tmp_path):
    path = tmp_path / "out.h5"
    (tmp_path / "out.h5.tmp").write_text("mine")

    def write_twice():
        with replacing(path, unique=True) as first:
            first.write_text("first")
            with replacing(path, unique=True) as second:
                second.write_text("second")

    with pytest.raises(FileExistsError):
        write_twice()
    assert path.read_text() == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.h5", "out.h5.tmp"]


@pytest.mark.parametrize(
    ("number", "kind", "exit_code", "what"),
    [
        (errno.EMFILE, ResourceError, 5, "cannot be read now: Too many open files"),
        (errno.EIO, ResourceError, 5, "cannot be read now: Input/output error"),
        (errno.ESTALE, ResourceError, 5, "cannot be read now: Stale file handle"),
        (errno.EACCES, StoreError, 4, "cannot be read: Permission denied"),
        (errno.ENOENT, CorruptStoreError, 4, "--repair"),
    ],
)
def test_only_what_is_gone_is_damaged(store_folder, monkeypatch, number, kind, exit_code, what):
    features = open_store(store_folder).features()
    really_open = os.open

    def refuse(path, *options):
        if str(path).endswith("000001.h5"):
            raise OSError(number, os.strerror(number), path)
        return really_open(path, *options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=what) as caught:
        features[0]
    assert type(caught.value) is kind
    assert caught.value.exit_code == exit_code
    assert ("--repair" in str(caught.value)) == (number == errno.ENOENT)


def test_a_disk_that_fails_while_hdf5_reads_is_told_apart_from_damage(tmp_path):
    class FailingDisk(io.FileIO):
        def readinto(self, buffer):
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.name)

    path = tmp_path / "x.h5"
    path.write_bytes(bytes(build_file("toy", lambda file: None)))
    with FailingDisk(path) as raw, pytest.raises(OSError, match="Input/output") as caught:
        _opened(raw, path)
    told = not_damage(path, caught.value)
    assert isinstance(told, ResourceError)
    assert str(told).startswith(f"{path} cannot be read now: Input/output error.")
