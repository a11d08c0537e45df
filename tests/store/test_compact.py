"""Compaction: fewer shards, no unused rows, the same features, whatever happens on the way."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import CorruptStoreError, LockedError, ResourceError, StoreError
from pipeline.store import StoreWriter, open_store
from pipeline.store.compact import compact_store, count_unused_rows
from pipeline.store.manifest import LayerInfo, _checksum, read_manifest
from pipeline.store.repair import repair_store
from pipeline.store.shard import read_log
from pipeline.store.state import apply_log
from pipeline.store.table import SampleTable, Status

from .conftest import RECIPE, entry_of, features_of, make_writer, table_of

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "data" / "stores"


def carried(old: SampleTable | None, ids: list[str]) -> SampleTable:
    """A table of ``ids`` with everything that is known of them carried over."""
    table = table_of(ids)
    index = {} if old is None else {sample_id: i for i, sample_id in enumerate(old.ids)}
    for i, sample_id in enumerate(ids):
        if sample_id in index:
            for column in ("digests", "sizes", "mtimes", "statuses", "shards", "rows"):
                getattr(table, column)[i] = getattr(old, column)[index[sample_id]]
            if index[sample_id] in old.reasons:
                table.reasons[i] = old.reasons[index[sample_id]]
    return table


def update(folder: Path, contents: dict[str, str | None], *, changed=(), shard_rows=8192) -> None:
    """What an extraction of a source with these contents does; None is a broken image."""
    with make_writer(folder, shard_rows=shard_rows) as writer:
        table = carried(writer.table, list(contents))
        for i, sample_id in enumerate(contents):
            if sample_id in changed:
                table.statuses[i], table.shards[i], table.rows[i] = Status.PENDING, -1, -1
        writer.begin(table)
        for i, (sample_id, content) in enumerate(contents.items()):
            if table.statuses[i] == Status.OK:
                continue
            if content is None:
                writer.fail(replace(entry_of(sample_id), reason="empty file (0 bytes)"))
            elif writer.find(entry_of(sample_id, content).digest):
                writer.link(entry_of(sample_id, content))
            else:
                writer.add(entry_of(sample_id, content), features_of(content))
        writer.finish()


def expected(contents: dict[str, str | None]) -> np.ndarray:
    return np.stack([
        np.concatenate([features_of(content)[name][0] for name in ("low", "top")])
        for content in contents.values()
        if content is not None
    ])  # fmt: skip


def check(folder: Path, contents: dict[str, str | None]) -> None:
    """The store holds these samples and nothing lies about; its view shows the same."""
    store = open_store(folder)
    ready = [i for i, content in contents.items() if content is not None]
    assert list(store.table.ids) == list(contents)
    assert store.ids() == ready
    assert set(store.failures) == set(contents) - set(ready)
    assert store.labels().tolist() == [i.split("/")[0] for i in ready]
    if ready:
        assert np.asarray(store.features()).tobytes() == expected(contents).tobytes()
    assert read_manifest(folder) == read_manifest(folder, "store.backup.json")
    names = {path.name for path in folder.iterdir()} - {"store.lock"}
    assert names == {
        "store.json", "store.backup.json", "features.h5", "shards", store.manifest.samples.file,
    }  # fmt: skip
    on_disk = {path.name for path in (folder / "shards").iterdir()}
    assert on_disk == {shard.file for shard in store.manifest.shards}
    with h5py.File(folder / "features.h5") as view:
        assert view["id"].asstr()[:].tolist() == ready
        low = view["features/low"][:, 0]
    np.testing.assert_array_equal(low, expected(contents)[:, :3] if ready else low[:0])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def contents() -> dict[str, str | None]:
    """30 images of two classes: two are copies of others, one is broken."""
    contents = {f"{'cat' if i % 2 else 'dög'}/{i:03d}": f"image {i}" for i in range(30)}
    contents |= {"cat/003": "image 2", "dög/028": "image 1", "dög/004": None}
    return contents


@pytest.fixture
def folder(tmp_path, contents) -> Path:
    """The store of ``contents`` in many small shards, with rows of images that are gone."""
    folder = tmp_path / "cache" / "toy" / "toy-1"
    first = dict(list(contents.items())[::2])
    update(folder, {**first, "dög/000": "was another", "cat/left": "left"}, shard_rows=4)
    update(folder, first, changed=["dög/000"], shard_rows=4)
    update(folder, contents, shard_rows=5)
    return folder


def test_many_small_shards_become_one_without_unused_rows(folder, contents):
    check(folder, contents)
    before = read_manifest(folder)
    assert len(before.shards) > 5
    assert count_unused_rows(open_store(folder)) == 2
    report = compact_store(folder)
    after = read_manifest(folder)
    check(folder, contents)
    assert (report.before.n_shards, report.after.n_shards) == (len(before.shards), 1)
    assert (report.before.n_rows, report.after.n_rows) == (29, 27)
    assert report.after.size_bytes == after.size_bytes < before.size_bytes
    assert after.shards[0].number == before.next_shard
    assert replace(after, shards=(), samples=None, folded=0, next_shard=0) == replace(
        before, shards=(), samples=None, folded=0, next_shard=0
    )


def test_rows_lie_in_the_order_of_the_samples(folder):
    compact_store(folder, shard_rows=10)
    table = open_store(folder).table
    places = list(dict.fromkeys(zip(table.shards.tolist(), table.rows.tolist(), strict=True)))
    places.remove((-1, -1))
    first = read_manifest(folder).shards[0].number
    assert places == [(first + k // 10, k % 10) for k in range(27)]


def test_samples_that_were_shuffled_leave_the_rows_in_their_old_order(tmp_path):
    """Each new shard would otherwise read all the old ones."""
    folder = tmp_path / "store"
    contents = {f"cat/{i:03d}": f"image {i}" for i in range(120)}
    update(folder, contents, shard_rows=12)
    shuffled = [list(contents)[i] for i in np.random.default_rng(0).permutation(120).tolist()]
    update(folder, {i: contents[i] for i in shuffled})
    before = open_store(folder).table
    compact_store(folder, shard_rows=16)
    check(folder, {i: contents[i] for i in shuffled})
    after = open_store(folder).table
    was, now = (table.shards * 1000 + table.rows for table in (before, after))
    np.testing.assert_array_equal(np.argsort(was), np.argsort(now))


def test_full_shards_in_use_are_left_as_they_are(tmp_path, contents):
    folder = tmp_path / "store"
    first, then = list(contents)[:11], list(contents)[:13]
    update(folder, {i: contents[i] for i in first}, shard_rows=4)
    update(folder, {i: contents[i] for i in then}, shard_rows=4)
    update(folder, contents, shard_rows=4)
    full = [shard for shard in read_manifest(folder).shards if shard.n == 4]
    inodes = {shard.file: (folder / "shards" / shard.file).stat().st_ino for shard in full}
    report = compact_store(folder, shard_rows=4)
    check(folder, contents)
    shards = read_manifest(folder).shards
    assert report.n_rewritten == report.before.n_shards - len(full) > 1
    assert list(shards[: len(full)]) == full
    assert {name: (folder / "shards" / name).stat().st_ino for name in inodes} == inodes
    assert all(shard.n == 4 for shard in shards[:-1])


def test_nothing_is_written_where_nothing_can_be_gained(folder, contents):
    compact_store(folder, shard_rows=20)
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*.*")}
    report = compact_store(folder, shard_rows=20)
    assert report.n_rewritten == 0
    assert report.before == report.after
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*.*")} == before


def test_shards_that_would_stay_as_many_are_left_alone(tmp_path):
    folder = tmp_path / "store"
    ids = [f"cat/{i}" for i in range(6)]
    update(folder, {i: i for i in ids[:3]})
    update(folder, {i: i for i in ids})
    assert compact_store(folder, shard_rows=5).n_rewritten == 0
    assert compact_store(folder, shard_rows=6).n_rewritten == 2


def test_every_image_left(folder):
    update(folder, {})
    report = compact_store(folder)
    check(folder, {})
    assert (report.after.n_shards, report.after.n_rows) == (0, 0)
    assert report.n_rewritten == report.before.n_shards
    update(folder, {"cat/new": "new"})
    check(folder, {"cat/new": "new"})
    assert read_manifest(folder).shards[0].number > report.before.n_shards


def test_only_broken_images_are_left(folder):
    update(folder, {"dög/004": None})
    compact_store(folder)
    check(folder, {"dög/004": None})
    assert open_store(folder).failures == {"dög/004": "empty file (0 bytes)"}


def test_an_interrupted_extraction_is_taken_in(tmp_path, contents):
    """Its last shards have logs that are not part of the samples table yet."""
    folder = tmp_path / "store"
    ready = {i: content for i, content in contents.items() if content == f"image {int(i[-3:])}"}
    with make_writer(folder, shard_rows=4) as writer:
        writer.begin(table_of(list(ready)))
        for sample_id, content in list(ready.items())[:18]:
            writer.add(entry_of(sample_id, content), features_of(content))
    before = open_store(folder)
    assert len(before) == 16
    compact_store(folder)
    after = open_store(folder)
    assert after.ids() == before.ids()
    assert np.asarray(after.features()).tobytes() == np.asarray(before.features()).tobytes()
    assert after.table.count(Status.PENDING) == before.table.count(Status.PENDING)


@pytest.mark.parametrize("shard_rows", [4, 10, 8192])
def test_a_lost_samples_table_can_be_made_again_from_the_logs(folder, contents, shard_rows):
    compact_store(folder, shard_rows=shard_rows)
    update(folder, {**contents, "cat/new": "new"})
    store = open_store(folder)
    made = table_of(list(contents))
    index = {sample_id: i for i, sample_id in enumerate(contents)}
    for shard in store.manifest.shards:
        apply_log(made, index, read_log(folder / "shards" / shard.file))
    for column in ("digests", "sizes", "mtimes", "statuses", "shards", "rows"):
        known = getattr(store.table, column)[:-1]
        np.testing.assert_array_equal(getattr(made, column), known, err_msg=column)
    assert made.reasons == store.table.reasons == {4: "empty file (0 bytes)"}


def test_readers_do_not_apply_the_logs_again(folder):
    compact_store(folder)
    manifest = read_manifest(folder)
    assert manifest.folded == manifest.next_shard - 1 == manifest.shards[-1].number


def test_copies_in_shards_that_stay_are_told_by_a_log(tmp_path):
    """The log that told of them goes with its small shard."""
    folder = tmp_path / "store"
    update(folder, {f"cat/{i}": f"{i}" for i in range(4)})
    two = {f"cat/{i}": f"{i}" for i in range(6)}
    update(folder, two)
    contents = {**two, "cat/copy": "1", "cat/6": "6"}
    update(folder, contents)
    compact_store(folder, shard_rows=4)
    check(folder, contents)
    kept, new = read_manifest(folder).shards
    assert kept.number == 1
    told = {entry.id: (entry.shard, entry.row) for entry in read_log(folder / "shards" / new.file)}
    assert told == {
        "cat/copy": (1, 1), "cat/4": (new.number, 0), "cat/5": (new.number, 1),
        "cat/6": (new.number, 2),
    }  # fmt: skip


def test_maps_and_several_views(tmp_path):
    layers = {"map": LayerInfo((4, 2, 2), "float16"), "pooled": LayerInfo((4,), "float32")}
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(9, 3, 4, 2, 2)).astype(np.float16)
    pooled = rng.normal(size=(9, 3, 4)).astype(np.float32)
    folder = tmp_path / "store"
    with StoreWriter(folder, RECIPE, layers, {}, n_views=3, shard_rows=2) as writer:
        writer.begin(table_of([f"a/{i}" for i in range(9)]))
        for i in range(9):
            writer.add(entry_of(f"a/{i}"), {"map": maps[i], "pooled": pooled[i]})
        writer.finish()
    compact_store(folder)
    store = open_store(folder)
    assert len(store.manifest.shards) == 1
    for view in range(3):
        np.testing.assert_array_equal(store.features(layers=["map"], view=view)[:], maps[:, view])
        np.testing.assert_array_equal(
            store.features(layers=["pooled"], view=view)[:], pooled[:, view]
        )


@pytest.mark.parametrize("version", [1, 2])
def test_a_store_of_an_older_release(tmp_path, version):
    folder = shutil.copytree(GOLDEN / f"version-{version}", tmp_path / "store")
    before = open_store(folder)
    features = np.asarray(before.features())
    assert compact_store(folder).n_rewritten == len(before.manifest.shards)
    after = open_store(folder)
    assert np.asarray(after.features()).tobytes() == features.tobytes()
    assert (after.ids(), after.failures) == (before.ids(), before.failures)


def test_memory_does_not_grow_with_the_store(tmp_path):
    peaks = [peak_bytes_of_compacting(tmp_path / str(n), n_half_full_shards=n) for n in (2, 16)]
    shard_bytes = 16 * 4096 * 4
    assert abs(peaks[1] - peaks[0]) < shard_bytes


def peak_bytes_of_compacting(folder: Path, n_half_full_shards: int) -> int:
    features = np.random.default_rng(0).normal(size=(1, 4096)).astype(np.float32)
    ids = [f"a/{i:03d}" for i in range(8 * n_half_full_shards)]
    with StoreWriter(folder, RECIPE, {"x": LayerInfo((4096,), "float32")}, {}) as writer:
        writer.begin(table_of(ids))
        for i, sample_id in enumerate(ids, start=1):
            writer.add(entry_of(sample_id), {"x": features})
            if i % 8 == 0:
                writer.commit()
        writer.finish()
    tracemalloc.start()
    try:
        assert compact_store(folder, shard_rows=16).n_rewritten == n_half_full_shards
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Whatever stops it


KILLED = """
import os, shutil, sys
from pathlib import Path
from pipeline.store.compact import compact_store

source, target = map(Path, sys.argv[1:])


def kill_before(owner, name, left):
    real = getattr(owner, name)

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


for k in range(1000):
    folder = shutil.copytree(source, target / f"{k:03d}")
    child = os.fork()
    if not child:
        left = [k]
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
            kill_before(owner, name, left)
        compact_store(folder, shard_rows=20)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


def test_killed_at_any_step_it_is_as_before_or_as_after(folder, contents, tmp_path):
    """Every fsync, rename and removal is a step; the process ends right before it."""
    killed = tmp_path / "killed"
    killed.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(killed)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    before = read_manifest(folder).shards
    rounds = sorted(killed.iterdir())
    n_after = 0
    for copy in rounds:
        store = open_store(copy)
        assert list(store.table.ids) == list(contents)
        assert np.asarray(store.features()).tobytes() == expected(contents).tobytes()
        assert store.failures == {"dög/004": "empty file (0 bytes)"}
        is_after = store.manifest.shards != before
        assert len(store.manifest.shards) == (2 if is_after else len(before))
        n_after += is_after
        with make_writer(copy) as writer:
            writer.finish()
        check(copy, contents)
    for copy in (rounds[0], rounds[9], rounds[-1]):  # and it can be done again
        compact_store(copy, shard_rows=20)
        check(copy, contents)
    assert 5 < n_after < len(rounds) - 5


def test_a_backup_that_a_killed_process_left_behind_is_renewed(folder, contents):
    """It names the shards that go next: should store.json be damaged then, it would be no use."""
    old = (folder / "store.backup.json").read_bytes()
    compact_store(folder)
    (folder / "store.backup.json").write_bytes(old)
    with make_writer(folder):
        pass
    check(folder, contents)


def test_a_failure_right_after_the_commit_leaves_the_new_store(folder, contents):
    obstacle = folder / "store.backup.json.tmp"
    obstacle.mkdir()
    with pytest.raises(ResourceError, match=r"store\.backup\.json failed"):
        compact_store(folder)
    assert len(open_store(folder).manifest.shards) == 1
    assert np.asarray(open_store(folder).features()).tobytes() == expected(contents).tobytes()
    obstacle.rmdir()
    compact_store(folder)
    check(folder, contents)


@contextmanager
def small_files_only(n_bytes: int):
    """A limit to the size of files, which stands for a full disk; within it pytest prints nothing.

    What it prints may go to a file that is longer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n_bytes", [1_000, 9_000])
def test_a_full_disk_leaves_the_store_as_it_was(folder, n_bytes):
    """No new shard fits, or the shards do, but not the new samples table."""
    before = files(folder)
    assert len(before[read_manifest(folder).samples.file]) > 9_000
    with (
        pytest.raises(ResourceError, match="No room to write") as caught,
        small_files_only(n_bytes),
    ):
        compact_store(folder, shard_rows=5)
    assert caught.value.exit_code == 5
    assert files(folder) == before


def test_a_store_that_is_being_written_is_left_alone(folder):
    with make_writer(folder), pytest.raises(LockedError) as caught:
        compact_store(folder)
    assert caught.value.exit_code == 6


def test_a_folder_without_a_store(tmp_path):
    with pytest.raises(StoreError, match="is not a feature store"):
        compact_store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_shard_is_not_spread(folder):
    path = folder / "shards" / "000002.h5"
    data = bytearray(path.read_bytes())
    data[data.index(features_of("image 10")["low"].tobytes())] ^= 1
    path.write_bytes(data)
    before = files(folder)
    with pytest.raises(CorruptStoreError, match=r"000002\.h5 does not hold the bytes") as caught:
        compact_store(folder)
    assert f"tlpipe verify {folder} --repair" in str(caught.value)
    assert files(folder) == before


def test_a_row_of_another_image_is_not_moved(folder):
    """Files that are what they claim to be, but do not fit together."""
    info = read_manifest(folder).samples
    path = folder / info.file
    with h5py.File(path, "r+") as file:
        file["digest"][1] = np.frombuffer(entry_of("x").digest, np.uint8)
    document = json.loads((folder / "store.json").read_bytes())
    document["samples"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    document["checksum"] = _checksum(document)
    (folder / "store.json").write_text(json.dumps(document))
    with pytest.raises(CorruptStoreError, match=r"features of another image .* of 'cat/001'"):
        compact_store(folder)
    assert read_manifest(folder).samples.file == info.file


# Readers


def test_readers_go_on_through_compactions_and_extractions(folder, contents):
    store = open_store(folder)
    features, want = store.features(), expected(contents)
    batches = store.batches(batch_size=6)
    np.testing.assert_array_equal(next(batches).features, want[:6])
    compact_store(folder, shard_rows=7)
    np.testing.assert_array_equal(next(batches).features, want[6:12])
    np.testing.assert_array_equal(features[::-1], want[::-1])
    more = {**contents, "cat/new": "new"}
    update(folder, more)
    compact_store(folder, shard_rows=9)
    compact_store(folder, shard_rows=11)
    np.testing.assert_array_equal(next(batches).features, want[12:18])
    update(folder, {**more, "cat/newer": "newer"})
    compact_store(folder)
    np.testing.assert_array_equal(np.concatenate([b.features for b in batches]), want[18:])
    np.testing.assert_array_equal(features[:], want)
    assert store.ids() == [i for i, content in contents.items() if content is not None]


def test_rows_in_shards_that_stay_are_not_looked_for(tmp_path):
    folder = tmp_path / "store"
    update(folder, {f"cat/{i}": f"{i}" for i in range(4)})
    contents = {f"cat/{i}": f"{i}" for i in range(6)}
    update(folder, contents)
    update(folder, contents := {**contents, "cat/6": "6"})
    store = open_store(folder)
    compact_store(folder, shard_rows=4)
    np.testing.assert_array_equal(store.features()[:], expected(contents))
    assert store._shard_of.tolist() == [1] * 4 + [4] * 3


def test_a_row_that_is_gone_is_missed_only_by_who_reads_it(folder, contents):
    store = open_store(folder)
    features, want = store.features(), expected(contents)
    update(folder, dict(list(contents.items())[1:]))
    compact_store(folder)
    np.testing.assert_array_equal(features[1:], want[1:])
    for _ in range(2):
        with pytest.raises(CorruptStoreError, match="the row of 'dög/000' was removed") as caught:
            features[:5]
        assert "Open it again." in str(caught.value)
    np.testing.assert_array_equal(features[1:], want[1:])
    update(folder, {"dög/000": "image 0", **dict(list(contents.items())[1:])})
    compact_store(folder)
    np.testing.assert_array_equal(features[:], want)


def test_a_reader_beside_a_writer_that_compacts_all_the_time(folder, contents):
    store, want = open_store(folder), expected(contents)
    failures = []

    def keep_writing():
        try:
            for k in range(8):
                update(folder, {**contents, f"cat/new-{k}": f"new {k}"})
                compact_store(folder, shard_rows=8 + k % 3)
        except BaseException as error:
            failures.append(error)
            raise

    writing = threading.Thread(target=keep_writing)
    writing.start()
    n_read = 0
    while writing.is_alive():
        np.testing.assert_array_equal(store.features()[:], want)
        fresh = open_store(folder)
        np.testing.assert_array_equal(fresh.features()[: len(want)], want)
        n_read += 1
    writing.join()
    assert not failures
    assert n_read > 1


@pytest.mark.parametrize("full", [False, True])
def test_failures_are_told_by_a_log_where_no_row_is_left_to_move(tmp_path, full):
    folder = tmp_path / "store"
    kept = {f"cat/{i}": f"image {i}" for i in range(4 if full else 0)}
    if full:
        update(folder, kept, shard_rows=4)
    contents = {**kept, "dög/0": "gone", "dög/1": None}
    update(folder, contents, shard_rows=4)
    del contents["dög/0"]
    update(folder, contents, shard_rows=4)
    compact_store(folder, shard_rows=4)
    check(folder, contents)
    assert [shard.n for shard in read_manifest(folder).shards] == ([4, 0] if full else [0])
    assert compact_store(folder, shard_rows=4).n_rewritten == 0
    (folder / read_manifest(folder).samples.file).unlink()
    assert repair_store(folder).after.ok
    assert open_store(folder).failures == {"dög/1": "empty file (0 bytes)"}
