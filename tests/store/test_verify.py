"""What ``verify`` finds besides flipped bytes, and what ``repair`` makes of it, also if killed."""

import errno
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import LockedError, StoreError, StoreFormatError
from pipeline.store import open_store, view
from pipeline.store.compact import compact_store
from pipeline.store.hdf5 import CHUNK_BYTES, open_file
from pipeline.store.lock import WriterLock
from pipeline.store.manifest import BACKUP_FILE, MANIFEST_FILE, LayerInfo, file_info, read_manifest
from pipeline.store.repair import repair_store
from pipeline.store.shard import KIND as SHARD_KIND
from pipeline.store.table import LabelColumn, Status
from pipeline.store.verify import verify_store
from pipeline.store.view import VIEW_FILE
from pipeline.store.writer import StoreWriter

from . import test_byte_faults as whole
from .conftest import RECIPE, digest_of, entry_of, features_of, make_writer, table_of

GOLDEN = Path(__file__).parents[1] / "data" / "stores"


def problems(folder, *, content=True) -> dict[str, str]:
    report = verify_store(folder, content=content)
    assert all(problem.remedy for problem in report.problems)
    return {problem.where: problem.what for problem in report.problems}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite_table(folder, change) -> None:
    """Let a careless program write the samples table, with all its checksums right."""
    with make_writer(folder) as writer:
        change(writer.table)
        writer._write_table(writer.table)
        writer.finish()


def rewrite_shard(folder, change) -> None:
    """Let a careless program write shard 2, with all its checksums right."""
    path = folder / "shards" / "000002.h5"
    with h5py.File(path, "r+") as file:
        change(file)
    manifest = read_manifest(folder)
    shards = [
        file_info(shard.file, path.read_bytes(), shard.n) if shard.number == 2 else shard
        for shard in manifest.shards
    ]
    replace(manifest, shards=tuple(shards)).write(folder)


# What is right


@pytest.mark.parametrize("content", [False, True])
def test_a_whole_store_is_fine(store_folder, content):
    report = verify_store(store_folder, content=content)
    assert report.ok
    assert report.notes == []
    assert (report.n_shards, report.n_rows, report.n_unused_rows) == (4, 20, 0)
    assert (report.n_samples, report.n_ok, report.n_pending, report.n_failed) == (20, 20, 0, 0)
    files = [p for p in store_folder.rglob("*.h5") if content or p.name.startswith("samples")]
    assert report.n_bytes_read == sum(path.stat().st_size for path in files)


def test_progress_adds_up_to_what_was_read(store_folder):
    told = []
    report = verify_store(store_folder, content=True, on_progress=told.append)
    assert sum(told) == report.n_bytes_read
    assert len(told) == 6


def test_verification_changes_nothing(store_folder):
    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in store_folder.rglob("*")}

    before = state()
    verify_store(store_folder, content=True)
    assert state() == before


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir()))
def test_stores_of_every_version_are_fine(tmp_path, version):
    folder = shutil.copytree(GOLDEN / version, tmp_path / "store")
    report = verify_store(folder, content=True)
    assert report.ok
    assert report.n_samples == 14
    flip(folder / "shards" / "000002.h5")
    repaired = repair_store(folder)
    assert repaired.after.ok
    assert repaired.n_lost > 0
    assert repaired.after.n_ok == report.n_ok - repaired.n_lost


def test_a_store_that_a_killed_writer_left_is_fine(tmp_path, ids):
    folder = tmp_path / "store"
    with make_writer(folder, shard_rows=6) as writer:
        writer.begin(table_of(ids))
        for sample_id in ids[:15]:
            writer.add(entry_of(sample_id), features_of(sample_id))
    (folder / "shards" / "000009.h5").write_bytes(b"half")
    (folder / "store.json.tmp").write_bytes(b"half")
    report = verify_store(folder, content=True)
    assert report.ok
    assert (report.n_ok, report.n_pending) == (12, 8)
    left, view = sorted(report.notes)
    assert left.startswith("2 files beside the store, shards/000009.h5 first")
    assert view.startswith("There is no features.h5")


def test_rows_that_no_sample_uses_are_worth_a_note(store_folder, ids):
    with make_writer(store_folder) as writer:
        kept = table_of(ids[5:])
        for column in ("digests", "sizes", "mtimes", "statuses", "shards", "rows"):
            setattr(kept, column, getattr(writer.table, column)[5:])
        writer.begin(kept)
        writer.finish()
    report = verify_store(store_folder)
    assert report.ok
    assert report.n_unused_rows == 5
    assert "5 rows without a sample" in report.notes[0]
    assert f"tlpipe compact {store_folder}" in report.notes[0]


def test_a_stale_or_missing_copy_of_the_manifest_is_worth_a_note(store_folder, ids):
    older = (store_folder / BACKUP_FILE).read_bytes()
    rewrite_table(store_folder, lambda table: table.labels.clear())
    (store_folder / BACKUP_FILE).write_bytes(older)
    report = verify_store(store_folder)
    assert report.ok
    assert report.notes == ["store.backup.json is not the latest; the next commit renews it."]
    (store_folder / BACKUP_FILE).unlink()
    report = verify_store(store_folder)
    assert report.ok
    assert report.notes == ["There is no store.backup.json; the next commit writes it."]


def test_no_false_alarm_while_the_store_is_written(store_folder, ids):
    def write():
        for k in range(9):
            with make_writer(store_folder, shard_rows=1) as writer:
                table = writer.table
                table.labels = {"label": LabelColumn.of([str(k)] * len(ids))}
                table.statuses[: k + 1] = Status.PENDING
                table.shards[: k + 1] = table.rows[: k + 1] = -1
                writer._write_table(table)
                for sample_id in ids[: k + 1]:
                    writer.add(entry_of(sample_id), features_of(sample_id))
                writer.finish()
                if k % 3 == 2:  # as compaction does it
                    used = set(writer.table.shards.tolist())
                    shards = [s for s in writer.manifest.shards if s.number in used]
                    writer.replace_shards(shards, writer.table)
                    writer.finish()

    thread = threading.Thread(target=write)
    thread.start()
    reports = []
    while thread.is_alive():
        reports.append(verify_store(store_folder, content=len(reports) % 2 == 0))
    thread.join()
    assert [report.problems for report in reports if not report.ok] == []
    assert len({report.manifest.samples for report in reports}) > 3
    assert verify_store(store_folder, content=True).ok


def test_a_large_shard_is_read_in_pieces(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    layers = {"wide": LayerInfo((CHUNK_BYTES // 4,), "float32")}
    with StoreWriter(tmp_path / "store", RECIPE, layers, {}, shard_rows=30) as writer:
        writer.begin(table_of([str(i) for i in range(30)]))
        for i in range(30):
            row = np.full((1, CHUNK_BYTES // 4), i, np.float32)
            writer.add(entry_of(str(i)), {"wide": row})
        writer.finish()
    tracemalloc.start()
    try:
        report = verify_store(tmp_path / "store", content=True)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.ok
    assert report.n_bytes_read > 60_000_000
    assert peak_bytes < 25_000_000


# What is wrong


def test_a_quick_look_reads_no_features(store_folder):
    flip(store_folder / "shards" / "000002.h5")
    assert problems(store_folder, content=False) == {}
    found = problems(store_folder)
    assert list(found) == ["shards/000002.h5"]
    assert found["shards/000002.h5"] == (
        "does not hold the bytes that were committed: its sha256 is another. "
        "6 samples with features in it."
    )


def test_a_problem_names_what_mends_it(store_folder):
    moved = store_folder.rename(store_folder.with_name("a store"))
    (moved / "shards" / "000003.h5").unlink()
    (problem,) = verify_store(moved).problems
    assert problem.remedy == f"tlpipe verify '{moved}' --repair"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_found_where_every_checksum_fits(store_folder, value):
    def change(file):
        file["features/top"][4, 0, 2] = value

    rewrite_shard(store_folder, change)
    assert problems(store_folder, content=False) == {}
    assert problems(store_folder)["shards/000002.h5"].startswith(
        "has NaN or infinity in 1 of 6 rows of layer 'top'"
    )
    repaired = repair_store(store_folder)
    assert repaired.after.ok
    assert repaired.n_lost == 6


def test_a_shard_of_another_recipe_is_found(store_folder):
    rewrite_shard(store_folder, lambda file: file.attrs.modify("key", np.bytes_(b"0" * 64)))
    assert problems(store_folder)["shards/000002.h5"].startswith("holds features of another recipe")


def test_a_row_of_another_image_is_found(store_folder):
    def change(file):
        file["digest"][3] = np.frombuffer(digest_of("other"), np.uint8)

    rewrite_shard(store_folder, change)
    (what,) = problems(store_folder, content=False).values()
    assert what == "points to rows that are not the sample's own: 1 sample, 'cat/009.png' first."
    assert repair_store(store_folder).n_lost == 1
    assert verify_store(store_folder, content=True).n_pending == 1


def place_outside(table):
    table.rows[4] = 6


def place_in_no_shard(table):
    table.shards[4] = 99


def place_without_features(table):
    table.statuses[4] = Status.PENDING


def fail_without_reason(table):
    table.statuses[4], table.shards[4], table.rows[4] = Status.FAILED, -1, -1


def other_digest(table):
    table.digests[4] = 7


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (place_outside, "points to rows that are not the sample's own: 1 sample, 'dög/004.png'"),
        (place_in_no_shard, "points to rows that are not the sample's own: 1 sample"),
        (other_digest, "points to rows that are not the sample's own: 1 sample"),
        (place_without_features, "points to a row of samples without features: 1 sample"),
        (fail_without_reason, "gives no reason for 1 failed sample."),
    ],
)
def test_a_table_that_does_not_fit_is_found_and_mended(store_folder, ids, change, what):
    with make_writer(store_folder) as writer:
        change(writer.table)
        (store_folder / VIEW_FILE).unlink()
        writer._write_table(writer.table)
    found = problems(store_folder)
    assert found == {"samples-000003.h5": found["samples-000003.h5"]}
    assert found["samples-000003.h5"].startswith(what)
    assert repair_store(store_folder).after.ok
    with make_writer(store_folder) as writer:
        n_pending = writer.table.count(Status.PENDING)
        # What was in another place than the table said is found again by its digest.
        assert n_pending == (change in (other_digest, place_without_features, fail_without_reason))
        for i in np.flatnonzero(writer.table.statuses == Status.PENDING).tolist():
            writer.link(entry_of(ids[i]))
        writer.finish()
    assert whole_of(store_folder) == whole_of_ids(ids)


def whole_of(folder):
    store = open_store(folder)
    return store.ids(), np.asarray(store.features(layers=["low"])).tobytes()


def whole_of_ids(ids):
    return ids, np.concatenate([features_of(i)["low"] for i in ids]).tobytes()


def test_a_sample_that_is_listed_twice_is_found_and_mended(store_folder, ids):
    rewrite_table(store_folder, lambda table: setattr(table, "ids", [ids[1], *ids[1:]]))
    assert "lists 1 sample twice." in problems(store_folder).values()
    repaired = repair_store(store_folder)
    assert repaired.after.ok
    assert sorted(open_store(store_folder).ids()) == sorted(ids)


def test_a_view_of_another_table_is_found_and_written_again(store_folder):
    stale = (store_folder / VIEW_FILE).read_bytes()
    rewrite_table(store_folder, lambda table: table.labels.clear())
    (store_folder / VIEW_FILE).write_bytes(stale)
    assert problems(store_folder, content=False) == {
        VIEW_FILE: "shows another samples table than the store's."
    }
    assert repair_store(store_folder).done == ["Wrote features.h5 again."]
    assert problems(store_folder) == {}


def test_a_view_that_another_hdf5_wrote_is_not_compared_byte_by_byte(store_folder, monkeypatch):
    flip(store_folder / VIEW_FILE)
    assert problems(store_folder) == {VIEW_FILE: "is not what was written: bytes of it differ."}
    monkeypatch.setattr(view, "WRITTEN_WITH", "h5py 3.0.0, HDF5 1.10.4")
    (store_folder / VIEW_FILE).unlink()
    with make_writer(store_folder) as writer:
        writer.finish()
    monkeypatch.undo()
    flip(store_folder / VIEW_FILE)
    report = verify_store(store_folder, content=True)
    assert report.ok
    assert report.notes[0].startswith("features.h5 was written by another release")


def test_the_hdf5_that_counts_is_that_of_the_view_and_not_of_the_features(store_folder):
    manifest = read_manifest(store_folder)
    replace(manifest, provenance={"versions": {"h5py": "3.0.0"}}).write(store_folder)
    flip(store_folder / VIEW_FILE)
    assert problems(store_folder) == {VIEW_FILE: "is not what was written: bytes of it differ."}


def test_a_store_of_very_many_shards_has_no_view_until_it_is_compacted(
    store_folder, ids, monkeypatch
):
    monkeypatch.setattr(view, "MAX_SHARDS", 3)
    (store_folder / VIEW_FILE).unlink()
    with make_writer(store_folder) as writer:
        writer.finish()
    assert not (store_folder / VIEW_FILE).exists()
    report = verify_store(store_folder, content=True)
    assert report.ok
    (note,) = report.notes
    assert "its features lie in 4 shards, more than a program may have open at once" in note
    assert f"tlpipe compact {store_folder}" in note
    compact_store(store_folder)
    assert verify_store(store_folder, content=True).notes == []
    with h5py.File(store_folder / VIEW_FILE) as file:
        assert np.isfinite(file["features/top"][:]).all()
        assert file["id"].asstr()[:].tolist() == ids


def test_a_missing_view_is_written_again(store_folder, ids):
    (store_folder / VIEW_FILE).unlink()
    assert verify_store(store_folder, content=True).ok
    assert repair_store(store_folder).done == ["Wrote features.h5 again."]
    with h5py.File(store_folder / VIEW_FILE) as file:
        assert file["id"].asstr()[:].tolist() == ids


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize(
    "name", [MANIFEST_FILE, BACKUP_FILE, VIEW_FILE, "samples-000002.h5", "shards/000002.h5"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_found_and_nobody_waits_for_it(store_folder, ids, name, make):
    (store_folder / name).unlink()
    make(store_folder / name)
    assert list(problems(store_folder)) == [name]
    repaired = repair_store(store_folder)
    assert repaired.after.ok
    assert f"Moved {name} to quarantine/{Path(name).name}." in repaired.done


# There is nothing to verify


def test_a_folder_without_a_store(tmp_path):
    for function in (verify_store, repair_store):
        with pytest.raises(StoreError, match="is not a feature store") as caught:
            function(tmp_path)
        assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 99, "pip install --upgrade tlpipe"),
        ("format", "zarr", "is not a feature store of tlpipe"),
    ],
)
def test_a_store_of_another_release_or_tool_is_left_alone(store_folder, field, value, message):
    document = json.loads((store_folder / MANIFEST_FILE).read_bytes())
    for name in (MANIFEST_FILE, BACKUP_FILE):
        (store_folder / name).write_text(json.dumps({**document, field: value}))
    for function in (verify_store, repair_store):
        with pytest.raises(StoreFormatError, match=message):
            function(store_folder)
    assert not (store_folder / "quarantine").exists()


# Repair


def test_only_what_was_in_the_shard_is_redone(store_folder, ids):
    flip(store_folder / "shards" / "000002.h5")
    repaired = repair_store(store_folder)
    assert [problem.where for problem in repaired.before.problems] == ["shards/000002.h5"]
    assert repaired.after.ok
    assert repaired.n_lost == 6
    assert not repaired.forgot
    assert repaired.done == [
        "Moved shards/000002.h5 to quarantine/000002.h5.",
        "Marked 6 samples as not embedded.",
        "Wrote features.h5 again.",
    ]
    assert open_store(store_folder).ids() == ids[:6] + ids[12:]
    with make_writer(store_folder) as writer:
        pending = np.flatnonzero(writer.table.statuses == Status.PENDING)
        assert [ids[i] for i in pending] == ids[6:12]
        for i in pending.tolist():
            writer.add(entry_of(ids[i]), features_of(ids[i]))
        writer.finish()
    assert whole_of(store_folder) == whole_of_ids(ids)
    assert [shard.number for shard in read_manifest(store_folder).shards] == [1, 3, 4, 5]
    assert "1 damaged file in quarantine" in verify_store(store_folder, content=True).notes[0]


def test_a_whole_store_is_not_touched(store_folder):
    before = {p: p.stat().st_ino for p in store_folder.rglob("*") if p.name != "store.lock"}
    repaired = repair_store(store_folder)
    assert (repaired.done, repaired.after) == ([], repaired.before)
    assert {p: p.stat().st_ino for p in store_folder.rglob("*") if p.name != "store.lock"} == before


def test_nothing_in_quarantine_is_ever_overwritten(store_folder):
    damaged = []
    for _ in range(3):
        path = store_folder / "store.json"
        flip(path)
        damaged.append(path.read_bytes())
        assert repair_store(store_folder).after.ok
    aside = store_folder / "quarantine"
    names = ["store.json", "store-2.json", "store-3.json"]
    assert [(aside / name).read_bytes() for name in names] == damaged
    with make_writer(store_folder):
        pass
    assert len(list(aside.iterdir())) == 3


def test_a_lost_table_comes_back_and_nothing_is_embedded_again(tmp_path):
    folder = tmp_path / "store"
    whole.build(folder)
    (folder / read_manifest(folder).samples.file).unlink()
    repaired = repair_store(folder)
    assert repaired.after.ok
    assert repaired.forgot
    assert repaired.n_lost == 0
    served = open_store(folder)
    rows = np.asarray(served.features(layers=["top"]))
    for sample_id, row in zip(served.ids(), rows, strict=True):
        np.testing.assert_array_equal(row, features_of(whole.CONTENT[sample_id])["top"][0])
    assert whole.extract(folder) == 0
    assert whole.read_everything(folder) == whole.expected()


def test_what_relabel_had_set_is_lost_with_the_table_and_said_to_be(store_folder):
    manifest = replace(read_manifest(store_folder), relabelled={"species": "species.csv"})
    manifest.write(store_folder)
    flip(store_folder / manifest.samples.file)
    repaired = repair_store(store_folder)
    assert "Lost what tlpipe relabel had set: 'species', from species.csv." in repaired.done
    assert read_manifest(store_folder).relabelled == {}
    assert (store_folder / "quarantine" / manifest.samples.file).is_file()


def test_relabelled_columns_stay_where_only_a_shard_was_lost(store_folder):
    manifest = replace(read_manifest(store_folder), relabelled={"species": "species.csv"})
    manifest.write(store_folder)
    flip(store_folder / "shards" / "000002.h5")
    assert repair_store(store_folder).after.ok
    assert read_manifest(store_folder).relabelled == {"species": "species.csv"}


def test_a_copy_that_is_one_commit_older_costs_only_that_commit(tmp_path, ids):
    folder = tmp_path / "store"
    with make_writer(folder, shard_rows=6) as writer:
        writer.begin(table_of(ids))
        for sample_id in ids[:6]:
            writer.add(entry_of(sample_id), features_of(sample_id))
        older = (folder / BACKUP_FILE).read_bytes()
        for sample_id in ids[6:12]:
            writer.add(entry_of(sample_id), features_of(sample_id))
    (folder / BACKUP_FILE).write_bytes(older)
    flip(folder / MANIFEST_FILE)
    repaired = repair_store(folder)
    assert repaired.after.ok
    assert repaired.forgot
    assert repaired.after.n_ok == 6
    # The number of the shard that nobody names any more is not used again.
    assert (folder / "shards" / "000002.h5").exists()
    assert read_manifest(folder).next_shard == 3
    with make_writer(folder) as writer:
        for sample_id in ids[6:]:
            writer.add(entry_of(sample_id), features_of(sample_id))
        writer.finish()
    assert whole_of(folder) == whole_of_ids(ids)


def test_a_manifest_that_was_put_back_is_found(store_folder, ids):
    older = (store_folder / MANIFEST_FILE).read_bytes()
    with make_writer(store_folder) as writer:
        writer.begin(table_of([*ids, "cat/new.png"]))
        writer.add(entry_of("cat/new.png"), features_of("cat/new.png"))
        writer.finish()
    now = read_manifest(store_folder)
    (store_folder / MANIFEST_FILE).write_bytes(older)
    assert problems(store_folder) == {
        MANIFEST_FILE: "is older than its copy store.backup.json: it was put back."
    }
    assert repair_store(store_folder).after.ok
    assert replace(read_manifest(store_folder), next_shard=now.next_shard) == now


def test_two_damaged_manifests_leave_nothing_to_go_by(store_folder):
    for name in (MANIFEST_FILE, BACKUP_FILE):
        (store_folder / name).write_bytes(b"{")
    for damaged in (True, False):
        repaired = repair_store(store_folder)
        (problem,) = repaired.after.problems
        assert problem.where == MANIFEST_FILE
        assert "both damaged or missing" in problem.what
        assert "which embeds everything" in problem.what
        assert problem.remedy == f"mv {store_folder} {store_folder}-damaged"
        assert repaired.done == []
        if damaged:
            for name in (MANIFEST_FILE, BACKUP_FILE):
                (store_folder / name).unlink()


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(store_folder, monkeypatch):
    path = store_folder / "shards" / "000002.h5"
    really_open = os.open

    def forbid(file, *options):
        if os.fspath(file) == os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(file))
        return really_open(file, *options)

    monkeypatch.setattr(os, "open", forbid)
    repaired = repair_store(store_folder)
    (problem,) = repaired.after.problems
    assert "Permission denied" in problem.what
    assert problem.remedy == f"chmod u+r {path}"
    assert path.exists()
    assert not (store_folder / "quarantine").exists()


@pytest.mark.parametrize(
    "number",
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT],
    ids=errno.errorcode.get,
)
@pytest.mark.parametrize("name", ["shards/000002.h5", "samples-000002.h5", VIEW_FILE])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(store_folder, monkeypatch, name, number):
    cannot_open(monkeypatch, number, store_folder / name)
    repaired = repair_store(store_folder)
    (problem,) = repaired.after.problems
    assert problem.where == name
    assert problem.what.startswith(f"cannot be read now: {os.strerror(number)}.")
    assert problem.remedy == f"tlpipe verify {store_folder}"
    assert not (store_folder / "quarantine").exists()


def test_manifests_that_cannot_be_read_now_are_not_taken_for_damaged(store_folder, monkeypatch):
    cannot_open(monkeypatch, errno.EMFILE, store_folder / MANIFEST_FILE, store_folder / BACKUP_FILE)
    report = verify_store(store_folder)
    assert [problem.where for problem in report.problems] == [MANIFEST_FILE, BACKUP_FILE]
    assert {problem.remedy for problem in report.problems} == {f"tlpipe verify {store_folder}"}


def cannot_open(monkeypatch, number, *paths):
    """The system refuses to open these files."""
    really_open = os.open

    def refuse(file, *options):
        if Path(os.fsdecode(file)) in paths:
            raise OSError(number, os.strerror(number), os.fspath(file))
        return really_open(file, *options)

    monkeypatch.setattr(os, "open", refuse)


def test_a_store_whose_view_is_open_in_h5py_is_read_and_not_damaged(store_folder, ids):
    with h5py.File(store_folder / VIEW_FILE) as file:
        shown = file["features/top"]
        assert shown[:].shape == (20, 1, 5)  # its shards stay open
        served = np.asarray(open_store(store_folder).features(layers=["top"]))
        np.testing.assert_array_equal(served, shown[:, 0])
        repaired = repair_store(store_folder)
    assert repaired.before.ok
    assert repaired.done == []


def test_a_shard_that_is_open_here_is_shown_by_the_view(store_folder):
    shard = store_folder / "shards" / "000001.h5"
    with open_file(shard, SHARD_KIND), h5py.File(store_folder / VIEW_FILE) as file:
        assert np.isfinite(file["features/top"][:]).all()


def test_what_hdf5_cannot_read_of_the_committed_bytes_stays_where_it_is(store_folder):
    path = store_folder / "shards" / "000002.h5"
    rewrite_shard(store_folder, lambda file: None)
    data = b"a newer HDF5" + bytes(path.stat().st_size)
    path.write_bytes(data)
    manifest = read_manifest(store_folder)
    shards = [
        file_info(shard.file, data, shard.n) if shard.number == 2 else shard
        for shard in manifest.shards
    ]
    replace(manifest, shards=tuple(shards)).write(store_folder)
    for content in (False, True):
        found = problems(store_folder, content=content)["shards/000002.h5"]
        assert found.startswith("holds the bytes that were committed, and yet cannot be read as")
    assert repair_store(store_folder).done == []
    assert path.read_bytes() == data


def test_repair_waits_for_no_writer(store_folder):
    flip(store_folder / "shards" / "000002.h5")
    lock = WriterLock(store_folder)
    lock.acquire()
    with pytest.raises(LockedError, match="is being written by process") as caught:
        repair_store(store_folder)
    lock.release()
    assert caught.value.exit_code == 6
    assert repair_store(store_folder).after.ok


class PowerFailure(BaseException):
    """Not an error that anybody handles."""


class FailingDisk:
    """Lets so many renames and removals through, and none after them."""

    def __init__(self, patch, n_allowed: int) -> None:
        self.n_left = n_allowed
        for name in ("rename", "replace", "unlink"):
            patch.setattr(os, name, self._failing(getattr(os, name)))

    def _failing(self, really):
        def call(path, *arguments, **options):
            if not os.fspath(path).endswith("writer.json"):  # or the lock would not be released
                self.n_left -= 1
                if self.n_left < 0:
                    raise PowerFailure
            return really(path, *arguments, **options)

        return call


def check_served(folder: Path) -> None:
    """Whatever can be read has to be right."""
    try:
        store = open_store(folder)
        rows = np.asarray(store.features(layers=["top"]))
    except StoreError:
        return
    for sample_id, row in zip(store.ids(), rows, strict=True):
        np.testing.assert_array_equal(row, features_of(whole.CONTENT[sample_id])["top"][0])


@pytest.mark.parametrize("name", ["shards/000001.h5", "samples-000002.h5", MANIFEST_FILE])
def test_a_repair_that_was_killed_at_any_instant_can_be_run_again(tmp_path, monkeypatch, name):
    intact = tmp_path / "intact"
    whole.build(intact)
    n_to_redo = whole.images_only_in(intact).get(name, 0)
    finished, n_allowed = False, 0
    while not finished:
        folder = Path(shutil.copytree(intact, tmp_path / f"store-{n_allowed}"))
        flip(folder / name)
        damaged = (folder / name).read_bytes()
        with monkeypatch.context() as patch:
            FailingDisk(patch, n_allowed)
            try:
                repair_store(folder)
                finished = True
            except PowerFailure:
                n_allowed += 1
        check_served(folder)
        assert repair_store(folder).after.ok
        assert [path.read_bytes() for path in (folder / "quarantine").iterdir()] == [damaged]
        check_served(folder)
        assert whole.extract(folder) == n_to_redo
        assert whole.read_everything(folder) == whole.expected()
    assert n_allowed >= 5
