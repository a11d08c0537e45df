"""Stores written by earlier releases are read, go on being written, and are never changed in place.

Each folder of tests/data/stores was written by the release of its format version, from the samples
and features of conftest.py: a failed one, a copy, and a last shard that an interrupted run left.
"""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import StoreFormatError
from pipeline.store import open_store
from pipeline.store.hdf5 import FORMAT_VERSION
from pipeline.store.manifest import _checksum
from pipeline.store.table import Status
from pipeline.store.writer import StoreWriter

from .conftest import entry_of, features_of

GOLDEN = Path(__file__).parents[1] / "data" / "stores"
IDS = [f"{'cat' if i % 2 else 'dög'}/{i:03d}.png" for i in range(12)]
CONTENTS = {**{i: i for i in IDS}, "dög/copy.png": "dög/000.png"}


def expected(ids):
    return np.stack([
        np.concatenate([features_of(CONTENTS[i])[name][0] for name in ("low", "top")]) for i in ids
    ])  # fmt: skip


def test_every_version_has_a_golden_store():
    assert sorted(p.name for p in GOLDEN.glob("version-*")) == [
        f"version-{version}" for version in range(1, FORMAT_VERSION + 1)
    ]


@pytest.fixture(params=range(1, FORMAT_VERSION + 1), ids="version-{}".format)
def golden(request, tmp_path):
    folder = shutil.copytree(GOLDEN / f"version-{request.param}", tmp_path / "store")
    assert json.loads((folder / "store.json").read_bytes())["format_version"] == request.param
    return folder


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_it_is_read_and_not_touched(golden):
    before = contents(golden)
    store = open_store(golden)
    assert store.ids() == [*IDS, "dög/copy.png"]
    np.testing.assert_array_equal(np.asarray(store.features()), expected(store.ids()))
    assert store.labels().tolist() == [i.split("/")[0] for i in store.ids()]
    assert store.failures == {"dög/bad.png": "empty file (0 bytes)"}
    if store.manifest.relabelled:
        assert store.manifest.relabelled == {"sex": "sexes.csv"}
        assert store.labels("sex").tolist() == ["f", None, "m", *[None] * 10]
    assert [store.ids(split) for split in ("train", "val", "test")] == [
        [i for k, i in enumerate(store.ids()) if k % 4 != 3], [], ["cat/003.png", "cat/007.png",
                                                                   "cat/011.png"]]  # fmt: skip
    assert contents(golden) == before


def test_plain_h5py_reads_it(golden):
    """The view is older than the interrupted run: it shows what was finished."""
    with h5py.File(golden / "features.h5") as file:
        ids = file["id"].asstr()[:].tolist()
        values = np.concatenate([file["features/low"][:, 0], file["features/top"][:, 0]], axis=1)
    assert ids == [*IDS[:8], "dög/copy.png"]
    np.testing.assert_array_equal(values, expected(ids))


def test_a_writer_goes_on_with_new_files_beside_the_old(golden):
    shards = {name: data for name, data in contents(golden).items() if name.parts[0] == "shards"}
    with StoreWriter.reopen(golden) as writer:
        writer.begin(writer.table)
        writer.add(entry_of("dög/bad.png", "mended"), features_of("mended"))
        writer.finish()
    store = open_store(golden)
    assert json.loads((golden / "store.json").read_bytes())["format_version"] == FORMAT_VERSION
    assert store.table.count(Status.OK) == len(store.table) == 14
    kept = [i for i in store.ids() if i != "dög/bad.png"]
    rows = np.flatnonzero([i != "dög/bad.png" for i in store.ids()])
    np.testing.assert_array_equal(store.features()[rows], expected(kept))
    after = contents(golden)
    assert {name: after[name] for name in shards} == shards


def test_a_newer_version_is_refused_with_what_to_do(golden):
    path = golden / "store.json"
    document = json.loads(path.read_bytes())
    document["format_version"] = FORMAT_VERSION + 1
    document["checksum"] = _checksum(document)
    path.write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match="pip install --upgrade tlpipe"):
        open_store(golden)


def test_a_newer_file_inside_is_refused_with_what_to_do(golden):
    from pipeline.store.hdf5 import open_file

    path = golden / "shards" / "000001.h5"
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = FORMAT_VERSION + 1
    with (
        pytest.raises(StoreFormatError, match="pip install --upgrade tlpipe"),
        open_file(path, "tlpipe-shard"),
    ):
        pass
