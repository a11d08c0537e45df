"""A damaged or foreign store is told, never read as if nothing had happened."""

import json
import shutil

import h5py
import numpy as np
import pytest

from pipeline.errors import CorruptStoreError, StoreError, StoreFormatError
from pipeline.store import open_store
from pipeline.store.hdf5 import dataset, open_file
from pipeline.store.manifest import _checksum


def read_everything(folder):
    store = open_store(folder)
    np.asarray(store.features())
    return store


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.name == "store.json" or p.suffix == ".h5")


def test_any_flipped_byte_is_found(store_folder):
    rng = np.random.default_rng(0)
    tried = 0
    for path in files_of(store_folder):
        if path.name == "features.h5":  # a view for others: never read by this package
            continue
        intact = path.read_bytes()
        for position in rng.integers(len(intact), size=25).tolist():
            damaged = bytearray(intact)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(StoreError):
                read_everything(store_folder)
            tried += 1
        path.write_bytes(intact)
    assert tried >= 125
    read_everything(store_folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_any_truncated_file_is_found(store_folder, share):
    for path in files_of(store_folder):
        if path.name == "features.h5":
            continue
        intact = path.read_bytes()
        path.write_bytes(intact[: int(len(intact) * share)])
        with pytest.raises(StoreError):
            read_everything(store_folder)
        path.write_bytes(intact)


def test_a_damaged_shard_is_named_with_a_remedy(store_folder):
    path = store_folder / "shards" / "000002.h5"
    path.write_bytes(path.read_bytes()[:-1])
    store = open_store(store_folder)
    store.features()[0:6]
    with pytest.raises(CorruptStoreError, match=r"000002\.h5 does not hold the bytes") as caught:
        store.features()[6]
    assert "tlpipe extract" in str(caught.value)


def test_a_missing_shard_is_named(store_folder):
    (store_folder / "shards" / "000001.h5").unlink()
    with pytest.raises(CorruptStoreError, match=r"000001\.h5 .*: it cannot be read"):
        read_everything(store_folder)


def rewrite(folder, change):
    path = folder / "store.json"
    document = json.loads(path.read_bytes())
    change(document)
    document["checksum"] = _checksum(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=99), "pip install --upgrade tlpipe"),
        (lambda d: d.update(format="zip"), "not a feature store of tlpipe"),
        (lambda d: d["shards"][0].update(file="../../000001.h5"), "another kind"),
        (lambda d: d["samples"].update(file="/etc/samples-000001.h5"), "another kind"),
        (lambda d: d.update(key="0" * 64), "the key is not that of the recipe"),
        (lambda d: d["layers"]["top"].update(dtype="object"), "dtype 'object'"),
        (lambda d: d["layers"]["top"].update(shape=[-5]), "not a count"),
        (lambda d: d["layers"]["top"].update(shape=[2**60]), "not a count"),
        (lambda d: d.pop("shards"), "lacks a field"),
        (lambda d: d["shards"].append("x"), "another kind"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(store_folder, change, message):
    rewrite(store_folder, change)
    with pytest.raises(StoreFormatError, match=message):
        open_store(store_folder)


def test_a_manifest_that_promises_other_shapes_is_refused(store_folder):
    rewrite(store_folder, lambda d: d["layers"]["top"].update(shape=[6]))
    with pytest.raises(StoreFormatError, match=r"\(6, 1, 5\), expected float16 \(6, 1, 6\)"):
        read_everything(store_folder)


def test_a_store_whose_files_belong_to_another_is_refused(store_folder, tmp_path):
    other = shutil.copytree(store_folder, tmp_path / "other")
    (other / "shards" / "000001.h5").replace(other / "shards" / "000003.h5")
    with pytest.raises(CorruptStoreError):
        read_everything(other)


@pytest.mark.parametrize("kind", ["soft", "external", "storage", "virtual", "object", "missing"])
def test_only_plain_datasets_of_this_file_are_read(tmp_path, kind):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.zeros(3, np.uint8)
    path = tmp_path / "hostile.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update(format="test", format_version=1)
        if kind == "soft":
            file["real"] = np.zeros(3, np.uint8)
            file["x"] = h5py.SoftLink("/real")
        elif kind == "external":
            file["x"] = h5py.ExternalLink(str(secret), "x")
        elif kind == "storage":
            file.create_dataset("x", (3,), np.uint8, external=[(str(secret), 0, 3)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3,), np.uint8)
            layout[:] = h5py.VirtualSource(str(secret), "x", (3,))
            file.create_virtual_dataset("x", layout)
        elif kind == "object":
            file["x"] = ["a", "b", "c"]
    with open_file(path, "test") as file, pytest.raises(StoreFormatError):
        dataset(file, "x", np.uint8, (3,))
