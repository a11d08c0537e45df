"""A store from a stranger is data, not code: whatever its files claim, it ends in one error.

Every forgery is consistent: sizes, digests and checksums are those of the forged files, so that
nothing but the checks of names, kinds, dtypes and shapes can refuse it.
"""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.store import open_store
from pipeline.store.hdf5 import FORMAT_VERSION, open_file
from pipeline.store.manifest import FileInfo, _checksum
from pipeline.store.state import check_size

from .conftest import entry_of, features_of, make_writer, table_of

ROOT = Path(__file__).parents[2]
MAX_PEAK_BYTES = 30_000_000


@pytest.fixture
def folder(tmp_path, ids):
    """A store with a failed sample and a last shard whose log is not folded."""
    folder = tmp_path / "store"
    with make_writer(folder, shard_rows=6) as writer:
        writer.begin(table_of(ids))
        writer.fail(replace(entry_of(ids[0]), reason="empty file"))
        for sample_id in ids[1:]:
            writer.add(entry_of(sample_id), features_of(sample_id))
        writer.commit()
    (folder / "secret.h5").write_bytes(b"")
    with h5py.File(folder / "secret.h5", "w") as file:
        file["x"] = np.zeros((6, 1, 5), np.float16)
    return folder


def forge(folder, name, change):
    """Change an HDF5 file of the store and record its new size and digest as if it had been so."""
    path = folder / name
    with h5py.File(path, "r+") as file:
        change(file)
    data = path.read_bytes()
    document = json.loads((folder / "store.json").read_bytes())
    for info in [document["samples"], *document["shards"]]:
        if info["file"] == path.name:
            info.update(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    declare(folder, document)


def declare(folder, document):
    document["checksum"] = _checksum(document)
    (folder / "store.json").write_text(json.dumps(document))


def read_everything(folder):
    store = open_store(folder)
    store.ids(), store.labels(), np.asarray(store.features())
    for _ in store.batches(batch_size=5):
        pass


def assert_refused(folder):
    tracemalloc.start()
    try:
        with pytest.raises(StoreError) as caught:
            read_everything(folder)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < MAX_PEAK_BYTES
    assert str(folder) in str(caught.value), "the message names the file"
    return str(caught.value)


def put(path, make):
    """A change that replaces the object at ``path`` in the file by what ``make`` puts there."""

    def change(file):
        parent, _, name = path.rpartition("/")
        group = file[parent] if parent else file
        del group[name]
        make(group, name)

    return change


def absurd(shape, dtype, **options):
    return lambda group, name: group.create_dataset(name, shape, dtype, **options)


def external_storage(group, name):
    group.create_dataset(
        name, (6, 1, 5), np.float16, external=[(group.file.filename.replace("0001", "0002"), 0, 60)]
    )


def foreign_virtual(group, name):
    layout = h5py.VirtualLayout((6, 1, 5), np.float16)
    layout[:] = h5py.VirtualSource("../secret.h5", "x", (6, 1, 5))
    group.create_virtual_dataset(name, layout)


def unwritten(group, name):
    """Space for 10 GB of which no byte was written: it would read as zeros."""
    group.create_dataset(name, (6, 1, 5), np.float16)


def time_of(shape, kind=h5py.h5t.UNIX_D32LE):
    """A type of HDF5 that numpy does not have."""

    def make(group, name):
        h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple(shape))

    return make


def time_mark(name):
    def change(file):
        del file.attrs[name]
        h5py.h5a.create(
            file.id, name.encode(), h5py.h5t.UNIX_D32LE, h5py.h5s.create(h5py.h5s.SCALAR)
        )

    return change


def mark(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def entry(path, i, value):
    """A change of one number of a dataset."""
    return lambda file: file[path].__setitem__(i, value)


def link(to):
    def make(group, name):
        group[name] = to

    return make


TOP = "features/top"
SHARD = "shards/000001.h5"
SAMPLES = "samples-000001.h5"
UNFOLDED = "shards/000003.h5"

FORGERIES = {
    "soft link": (SHARD, put(TOP, link(h5py.SoftLink("/features/low")))),
    "dangling soft link": (SHARD, put(TOP, link(h5py.SoftLink("/nowhere")))),
    "external link": (SHARD, put(TOP, link(h5py.ExternalLink("../secret.h5", "/x")))),
    "external link to a device": (SHARD, put(TOP, link(h5py.ExternalLink("/dev/zero", "/x")))),
    "group behind a soft link": (SHARD, put("features", link(h5py.SoftLink("/log")))),
    "group behind an external link": (
        SHARD, put("features", link(h5py.ExternalLink("../secret.h5", "/")))),
    "external storage": (SHARD, put(TOP, external_storage)),
    "foreign virtual dataset": (SHARD, put(TOP, foreign_virtual)),
    "space that nobody wrote": (SHARD, put(TOP, unwritten)),
    "absurd shape": (SHARD, put(TOP, absurd((2**40, 1, 5), np.float16, chunks=(64, 1, 5)))),
    "absurd row": (SHARD, put(TOP, absurd((6, 1, 2**40), np.float16, chunks=(1, 1, 2**16)))),
    "many axes": (SHARD, put(TOP, absurd((1,) * 32, np.float16))),
    "scalar": (SHARD, put(TOP, absurd((), np.float16))),
    "no space at all": (SHARD, put(TOP, lambda g, n: g.__setitem__(n, h5py.Empty(np.float16)))),
    "group for a dataset": (SHARD, put(TOP, lambda g, n: g.create_group(n))),
    "dataset for a group": (SHARD, put("features", absurd((6,), np.float16))),
    "object dtype": (SHARD, put(TOP, absurd((6, 1, 5), h5py.string_dtype()))),
    "references": (SHARD, put(TOP, absurd((6, 1, 5), h5py.ref_dtype))),
    "compound dtype": (SHARD, put(TOP, absurd((6, 1, 5), np.dtype([("a", "f2")])))),
    "other dtype": (SHARD, put(TOP, absurd((6, 1, 5), np.float64))),
    "other byte order": (SHARD, put(TOP, absurd((6, 1, 5), ">f2"))),
    "named type": (SHARD, put(TOP, lambda g, n: g.__setitem__(n, np.dtype(np.float16)))),
    "bomb behind a filter": (
        SHARD, put(TOP, absurd((6, 1, 5), np.float16, chunks=(6, 1, 5), compression="gzip"))),
    "times": (SHARD, put(TOP, time_of((6, 1, 5)))),
    "sizes that are times": (SAMPLES, put("size", time_of((20,), h5py.h5t.UNIX_D64LE))),
    "mark that is a time": (SHARD, time_mark("format")),
    "version that is a time": (SHARD, time_mark("format_version")),
    "missing layer": (SHARD, lambda file: file.__delitem__(TOP)),
    "missing mark": (SHARD, lambda file: file.attrs.__delitem__("format")),
    "mark of another kind": (SHARD, mark("format", "tlpipe-samples")),
    "mark that is an array": (SHARD, mark("format", ["tlpipe-shard"] * 9)),
    "version that is text": (SHARD, mark("format_version", "2")),
    "version that is a fraction": (SHARD, mark("format_version", 2.5)),
    "log with a status that is none": (
        UNFOLDED, entry("log/status", 0, 77)),
    "log that points nowhere": (UNFOLDED, entry("log/row", 0, 10**6)),
    "log that points to no shard": (UNFOLDED, entry("log/shard", 0, 2**30)),
    "log with absurd strings": (UNFOLDED, entry("log/id/offsets", -1, 2**62)),
    "log with falling offsets": (UNFOLDED, entry("log/id/offsets", 1, 2**40)),
    "log columns of other lengths": (UNFOLDED, put("log/size", absurd((1,), np.int64))),
    "table of sixteen tebibytes": (
        SAMPLES, put("id/utf8", absurd((2**44,), np.uint8, chunks=(2**20,)))),
    "offsets of sixteen tebibytes": (
        SAMPLES, put("id/offsets", absurd((2**41,), np.int64, chunks=(2**17,)))),
    "ids that are not UTF-8": (SAMPLES, entry("id/utf8", 0, 0xFF)),
    "ids cut within a character": (SAMPLES, entry("id/offsets", 1, 2)),
    "negative first offset": (SAMPLES, entry("id/offsets", 0, -1)),
    "digests as one dataset of objects": (
        SAMPLES, put("digest", absurd((20, 32), h5py.string_dtype()))),
    "status that is none": (SAMPLES, entry("status", 0, 9)),
    "split that is none": (SAMPLES, entry("split", 0, 200)),
    "label code without category": (
        SAMPLES, entry("labels/0/codes", 0, 2**31 - 1)),
    "label code below none": (SAMPLES, entry("labels/0/codes", 0, -2)),
    "labels behind a link": (SAMPLES, put("labels", link(h5py.ExternalLink("secret.h5", "/")))),
    "reason of nobody": (SAMPLES, put("reasons/sample", lambda g, n: g.__setitem__(n, [10**9]))),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change"), FORGERIES.values(), ids=FORGERIES)
def test_a_forged_hdf5_file_is_refused(folder, name, change):
    forge(folder, name, change)
    assert_refused(folder)


def test_hard_links_in_circles_are_not_followed(folder):
    """A tree that contains itself: whoever walks it never returns."""
    forge(folder, SHARD, lambda file: file["features"].__setitem__("loop", file["/"]))
    read_everything(folder)


MANIFESTS = {
    "not JSON": b"\x89HDF\r\n\x1a\n",
    "no object": b"[]",
    "nested a hundred thousand deep": b"[" * 100_000 + b"]" * 100_000,
    "a number of a million digits": b'{"format": ' + b"9" * 1_000_000 + b"}",
    "infinity": b'{"format": "tlpipe-feature-store", "format_version": 2, "n_views": Infinity}',
    "somebody else's": b'{"name": "store", "version": "1.0.0"}',
    "half a character": b'{"format": "tlpipe-feature-store", "format_version": 2, "x": "\\ud800"}',
}


@pytest.mark.parametrize("data", MANIFESTS.values(), ids=MANIFESTS)
def test_a_store_json_that_is_none_is_refused(folder, data):
    (folder / "store.json").write_bytes(data)
    assert_refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["shards"][0].update(n=2**40),
        lambda d: d["shards"][0].update(file="999999999999.h5"),
        lambda d: d["shards"][0].update(file="000001.h5\n"),
        lambda d: d["shards"][0].update(file="٠٠٠٠٠١.h5"),
        lambda d: d["shards"][1].update(d["shards"][0], file="0000001.h5"),
        lambda d: d["shards"].extend([d["shards"][0]] * 3),
        lambda d: d["samples"].update(n=2**40),
        lambda d: d["samples"].update(size_bytes=-1),
        lambda d: d.update(n_views=0),
        lambda d: d.update(n_views=2**40),
        lambda d: d.update(n_views=True),
        lambda d: d.update(folded=10**6),
        lambda d: d.update(next_shard=1),
        lambda d: d.update(layers={}, layer_order=[]),
        lambda d: d["layers"]["top"].update(shape=[2**24, 2**24]),
        lambda d: d["layers"]["top"].update(shape=[1] * 40),
        lambda d: d["layers"]["top"].update(shape=[]),
        lambda d: (d["layers"].update({"../log": d["layers"]["top"]}),
                   d.update(layer_order=["../log"])),
        lambda d: d.update(layer_order=[["top"]]),
        lambda d: d.update(source="x"),
        lambda d: d.update(relabelled=7),
    ],
)  # fmt: skip
def test_a_store_json_that_promises_the_impossible_is_refused(folder, change):
    document = json.loads((folder / "store.json").read_bytes())
    change(document)
    declare(folder, document)
    assert_refused(folder)


@pytest.mark.parametrize("name", ["store.json", SHARD, SAMPLES])
def test_a_pipe_or_a_device_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert_refused(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert_refused(folder)


def test_a_shard_that_is_an_empty_pipe_is_not_waited_for(folder):
    """Of a size that even a pipe has."""
    document = json.loads((folder / "store.json").read_bytes())
    document["shards"][0].update(size_bytes=0, n=0)
    info = FileInfo(**document["shards"][0])
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    with pytest.raises(CorruptStoreError, match="is not a regular file"):
        check_size(folder / SHARD, info)
    with (
        pytest.raises(CorruptStoreError, match="not a regular file"),
        open_file(folder / SHARD, "tlpipe-shard"),
    ):
        pass


def test_a_store_json_that_is_too_large_is_not_read(folder):
    with (folder / "store.json").open("wb") as file:
        file.truncate(10**12)  # a hole: takes no space
    assert_refused(folder)


@pytest.mark.parametrize("name", [SHARD, SAMPLES])
def test_a_file_that_grew_to_a_terabyte_is_not_read(folder, name):
    with (folder / name).open("r+b") as file:
        file.truncate(10**12)
    assert "bytes on disk" in assert_refused(folder)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n" + bytes(2000)])
def test_what_is_not_hdf5_is_refused(folder, data):
    document = json.loads((folder / "store.json").read_bytes())
    document["shards"][0].update(
        vars(FileInfo("000001.h5", hashlib.sha256(data).hexdigest(), len(data), 0))
    )
    (folder / SHARD).write_bytes(data)
    declare(folder, document)
    assert_refused(folder)


def test_somebody_elses_hdf5_folder_is_no_store(tmp_path):
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["features"] = np.zeros((3, 4))
    assert "is not a feature store" in assert_refused(tmp_path)


@pytest.mark.parametrize(
    ("seed", "rounds"), [(0, 60), pytest.param(1, 1500, marks=pytest.mark.slow)]
)
def test_hdf5_neither_crashes_nor_hangs_on_damage_that_no_digest_tells(seed, rounds):
    process = subprocess.run(
        [sys.executable, "-m", "tests.store.fuzz_hdf5", str(seed), str(rounds)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    outcomes = json.loads(process.stdout)
    assert sum(outcomes.values()) == rounds * FORMAT_VERSION
    assert outcomes["refused"] > rounds / 2
