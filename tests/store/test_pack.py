"""A packed file holds what the store held, for any HDF5 reader and for this package."""

import hashlib
import json
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import CorruptStoreError, LockedError, StoreError, StoreFormatError, UsageError
from pipeline.store import StoreWriter, open_store, pack, pack_store, reader, unpack, unpack_store
from pipeline.store.export import Selection, export_csv
from pipeline.store.manifest import LayerInfo, _checksum
from pipeline.store.pack import pack_problems, table_sha256
from pipeline.store.samples_file import read_table
from pipeline.store.table import LabelColumn, SampleTable, Status

from .conftest import LAYERS, RECIPE, entry_of, features_of, make_writer, table_of


@pytest.fixture
def rich_folder(tmp_path, ids):
    """A store with copies, a failure, a sample that waits, missing labels and odd names."""
    folder = tmp_path / "cache" / "toy" / "toy-1"
    names = [*ids, "cat/=cmd()\n.png", "cat/copy.png", "cat/bad.png", "cat/waits.png"]
    table = table_of(names)
    table.labels["colour/tone"] = LabelColumn.of([None, "ünï"] * 12)
    with make_writer(folder, shard_rows=6, provenance={"device": "cpu"}) as writer:
        writer.begin(table, relabelled={"colour/tone": "colours.csv"})
        for sample_id in names[:21]:
            note = "grey" if sample_id == ids[3] else ""
            writer.add(replace(entry_of(sample_id), reason=note), features_of(sample_id))
        writer.link(entry_of("cat/copy.png", ids[5]))
        writer.fail(replace(entry_of("cat/bad.png"), reason="empty file (0 bytes)"))
        writer.finish()
    return folder


@pytest.fixture
def packed(rich_folder, tmp_path):
    path = tmp_path / "packed.h5"
    pack_store(open_store(rich_folder), path)
    return path


def everything(path):
    """All that a store tells and serves."""
    store = open_store(path)
    batches = list(store.batches("train", ["top"], column="label", batch_size=4))
    return {
        "ids": [store.ids(split) for split in (None, "train", "val", "test")],
        "splits": store.splits().tolist(),
        "labels": {name: store.labels(name).tolist() for name in store.label_columns},
        "digests": store.digests("test").tolist(),
        "failures": store.failures,
        "statuses": store.table.statuses.tolist(),
        "notes": store.table.reasons,
        "sizes": (store.table.sizes.tolist(), store.table.mtimes.tolist()),
        "features": np.asarray(store.features()).tobytes(),
        "top": store.features("train", ["top"])[[7, 1, 1], 1:3].tolist(),
        "batches": [(b.ids, b.labels.tolist(), b.features.tolist()) for b in batches],
        "layers": store.layers,
        "about": (store.recipe, store.key, store.source, store.n_views, len(store)),
        "provenance": store.manifest.provenance,
        "relabelled": store.manifest.relabelled,
    }


def contents(path):
    """Every dataset and attribute of an HDF5 file."""
    found = {}

    def add(name, item):
        attributes = {name: np.asarray(value).tolist() for name, value in item.attrs.items()}
        values = item[()] if isinstance(item, h5py.Dataset) else np.empty(0)
        found[name] = (values.dtype.str, values.shape, values.tolist(), attributes)

    with h5py.File(path) as file:
        add("/", file)
        file.visititems(add)
    return found


# What is in the file


def test_plain_h5py_reads_it(packed, rich_folder):
    store = open_store(rich_folder)
    with h5py.File(packed) as file:
        low, top = file["features/low"][:, 0], file["features/top"][:, 0]
        ids, splits = file["id"].asstr()[:], file["split"].asstr()[:]
        labels, tones = file["label/label"].asstr()[:], file["label/colour%2Ftone"].asstr()[:]
        attributes = {name: file.attrs[name] for name in ("format", "key", "recipe", "source")}
    np.testing.assert_array_equal(np.hstack([low, top]), np.asarray(store.features()))
    assert top.dtype == np.float16
    assert ids.tolist() == store.ids()
    assert splits.tolist() == store.splits().tolist()
    assert labels.tolist() == store.labels("label").tolist()
    assert tones.tolist() == [tone or "" for tone in store.labels("colour/tone")]
    assert attributes["format"] == b"tlpipe-pack"
    assert attributes["key"].decode() == store.key
    assert json.loads(attributes["recipe"]) == RECIPE
    assert json.loads(attributes["source"]) == {"name": "toy", "root": "/nowhere"}


def test_features_are_ordinary_chunks_of_whole_rows_with_checksums(tmp_path):
    layers = {"wide": LayerInfo((500,), "float32"), "map": LayerInfo((4, 5, 5), "float16")}
    with StoreWriter(tmp_path / "store", RECIPE, layers, {}, n_views=2) as writer:
        writer.begin(table_of([f"a/{i}" for i in range(1200)]))
        for i in range(1200):
            features = {name: np.full((2, *info.shape), i % 99, info.dtype)
                        for name, info in layers.items()}  # fmt: skip
            writer.add(entry_of(f"a/{i}"), features)
        writer.finish()
    pack_store(open_store(tmp_path / "store"), tmp_path / "p.h5")
    with h5py.File(tmp_path / "p.h5") as file:
        for name, info in layers.items():
            layer = file["features"][name]
            assert layer.shape == (1200, 2, *info.shape)
            assert layer.chunks[1:] == layer.shape[1:]
            assert 1e6 < np.prod(layer.chunks) * layer.dtype.itemsize <= 2e6 or len(layer) == 1200
            assert (layer.fletcher32, layer.compression, layer.is_virtual) == (True, None, False)
            assert layer.attrs["sha256"].decode() == hashlib.sha256(layer[:]).hexdigest()
            np.testing.assert_array_equal(layer[:, 1].reshape(1200, -1)[:, 0],
                                          np.arange(1200) % 99)  # fmt: skip
    store = open_store(tmp_path / "p.h5")
    assert store.features(layers=["map"], view=1).shape == (1200, 4, 5, 5)
    np.testing.assert_array_equal(store.features(layers=["wide"], view=1)[1111], np.full(500, 22))


def test_it_reads_as_the_store_does(packed, rich_folder):
    assert everything(packed) == everything(rich_folder)


def test_a_pack_of_a_pack_is_the_same(packed, tmp_path):
    pack_store(open_store(packed), tmp_path / "again.h5")
    assert contents(tmp_path / "again.h5") == contents(packed)


def test_a_store_without_features_can_be_packed(tmp_path):
    with make_writer(tmp_path / "store") as writer:
        writer.begin(table_of(["a/1.png"]))
        writer.finish()
    pack_store(open_store(tmp_path / "store"), tmp_path / "p.h5")
    assert pack_problems(tmp_path / "p.h5", content=True) == []
    store = open_store(tmp_path / "p.h5")
    assert (store.ids(), store.features().shape) == ([], (0, 8))
    unpack_store(store, tmp_path / "again")
    assert open_store(tmp_path / "again").table.count(Status.PENDING) == 1


def test_memory_does_not_grow_with_the_features(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "BATCH_BYTES", 1_000_000)
    monkeypatch.setattr("pipeline.store.unpack.BATCH_BYTES", 1_000_000)
    monkeypatch.setattr(reader, "_STRETCH_BYTES", 1_000_000)
    layers = {"top": LayerInfo((20_000,), "float32")}
    ids = [f"a/{i}" for i in range(400)]
    with StoreWriter(tmp_path / "store", RECIPE, layers, {}, shard_rows=12) as writer:
        writer.begin(table_of(ids))
        for i, sample_id in enumerate(ids):
            writer.add(entry_of(sample_id), {"top": np.full((1, 20_000), i, np.float32)})
        writer.finish()
    store = open_store(tmp_path / "store")
    tracemalloc.start()
    pack_store(store, tmp_path / "p.h5")
    packed = open_store(tmp_path / "p.h5")
    np.testing.assert_array_equal(packed.features()[[399, 0, 200]][:, 7], [399, 0, 200])
    assert pack_problems(tmp_path / "p.h5", content=True) == []
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "p.h5").stat().st_size > 32_000_000
    assert peak_bytes < 8_000_000


# Making one


def test_nothing_is_overwritten(packed, rich_folder):
    before = packed.read_bytes()
    with pytest.raises(UsageError, match="exists already; nothing was overwritten"):
        pack_store(open_store(rich_folder), packed)
    assert packed.read_bytes() == before


def test_a_pack_does_not_go_into_its_store(rich_folder):
    with pytest.raises(UsageError, match="lies within the store"):
        pack_store(open_store(rich_folder), rich_folder / "shards" / "out.h5")


def test_the_folder_around_it_is_made(rich_folder, tmp_path):
    pack_store(open_store(rich_folder), tmp_path / "new" / "folder" / "p.h5")
    assert (tmp_path / "new" / "folder" / "p.h5").is_file()
    with pytest.raises(UsageError, match="is not a folder"):
        pack_store(open_store(rich_folder), tmp_path / "new" / "folder" / "p.h5" / "q.h5")


def test_a_damaged_store_is_not_packed(rich_folder, tmp_path):
    shard = rich_folder / "shards" / "000002.h5"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"000002\.h5 does not hold the bytes"):
        pack_store(open_store(rich_folder), tmp_path / "p.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# A store of it again


def test_unpacked_it_is_the_store_again(packed, rich_folder, tmp_path):
    unpack_store(open_store(packed), tmp_path / "again")
    assert everything(tmp_path / "again") == everything(rich_folder)
    pack_store(open_store(tmp_path / "again"), tmp_path / "again.h5")
    assert contents(tmp_path / "again.h5") == contents(packed)
    store = open_store(tmp_path / "again")
    assert sum(shard.n for shard in store.manifest.shards) == 21, "a copy shares its row"
    assert (tmp_path / "again" / "features.h5").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"again", "again.h5", "cache", "packed.h5"}


def test_an_unpacked_store_can_be_written_to(packed, tmp_path):
    unpack_store(open_store(packed), tmp_path / "again")
    with make_writer(tmp_path / "again") as writer:
        writer.begin(writer.table)
        writer.add(entry_of("cat/waits.png"), features_of("cat/waits.png"))
        writer.finish()
    assert open_store(tmp_path / "again").ids()[-1] == "cat/waits.png"


def test_unpacking_overwrites_nothing(packed, rich_folder):
    before = (rich_folder / "store.json").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        unpack_store(open_store(packed), rich_folder)
    assert (rich_folder / "store.json").read_bytes() == before


def test_only_a_packed_file_is_unpacked(rich_folder, tmp_path):
    with pytest.raises(UsageError, match="needs no unpacking"):
        unpack_store(open_store(rich_folder), tmp_path / "again")


def test_an_interrupted_unpack_goes_on_where_it_stopped(packed, rich_folder, tmp_path):
    manifest = open_store(packed).manifest
    with StoreWriter(
        tmp_path / "again.unpacking", manifest.recipe, manifest.layers, manifest.source
    ) as writer:
        writer.begin(table_of(["cat/000.png"]))
        writer.add(entry_of("cat/000.png", "dög/000.png"), features_of("dög/000.png"))
        writer.commit()
    unpack_store(open_store(packed), tmp_path / "again")
    assert everything(tmp_path / "again") == everything(rich_folder)
    assert [shard.n for shard in open_store(tmp_path / "again").manifest.shards] == [1, 20]


# Damage


def test_damage_is_found_or_harms_nothing(packed):
    rng = np.random.default_rng(0)
    intact, expected = packed.read_bytes(), everything(packed)
    assert pack_problems(packed, content=True) == []
    n_read = 0
    for k, position in enumerate(rng.integers(len(intact), size=120).tolist()):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << int(rng.integers(8))
        packed.write_bytes(damaged if k % 8 else damaged[:position])
        assert pack_problems(packed, content=True)
        try:
            found = everything(packed)
        except StoreError:
            continue
        n_read += 1
        assert found == expected
    assert 0 < n_read < 120


def test_a_damaged_chunk_is_told_with_a_remedy(packed):
    with h5py.File(packed) as file:
        offset = file["features/top"].id.get_chunk_info(0).byte_offset
    data = bytearray(packed.read_bytes())
    data[offset + 5] ^= 64
    packed.write_bytes(data)
    store = open_store(packed)
    assert store.ids()
    np.asarray(store.features(layers=["low"]))
    with pytest.raises(CorruptStoreError, match="cannot be read as HDF5") as caught:
        np.asarray(store.features(layers=["top"]))
    assert f"tlpipe pack STORE {packed}" in str(caught.value)
    assert "does not hold the bytes" in pack_problems(packed, content=True)[0]


def test_damage_is_not_unpacked(packed, tmp_path):
    with h5py.File(packed, "r+") as file:
        file["features/low"][3, 0, 0] = 1.5
    with pytest.raises(CorruptStoreError, match="sha256 is another"):
        unpack_store(open_store(packed), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_another_file_in_its_place_is_not_served(packed, store_folder, tmp_path):
    store = open_store(packed)
    with make_writer(tmp_path / "other") as writer:
        writer.begin(table_of(["a/1.png"]))
        writer.add(entry_of("a/1.png"), features_of("a/1.png"))
        writer.finish()
    packed.unlink()
    pack_store(open_store(tmp_path / "other"), packed)
    with pytest.raises(CorruptStoreError, match="was replaced after it was opened"):
        store.features()[0]


# Files from strangers


def soft_link(file):
    file.move("features/top", "top")
    file["features/top"] = h5py.SoftLink("/top")


def external_link(file):
    del file["features/top"]
    file["features/top"] = h5py.ExternalLink("secret.h5", "x")


def external_group(file):
    del file["features"]
    file["features"] = h5py.ExternalLink("secret.h5", "/")


def external_storage(file):
    del file["features/top"]
    file.create_dataset("features/top", (22, 1, 5), "f2", external=[("secret.h5", 0, 220)])


def virtual(file):
    del file["features/top"]
    layout = h5py.VirtualLayout((22, 1, 5), "f2")
    layout[:] = h5py.VirtualSource("secret.h5", "x", (22, 1, 5))
    file["features"].create_virtual_dataset("top", layout)


def layer(**options):
    def change(file):
        del file["features/top"]
        options.setdefault("dtype", "f2")
        options.setdefault("data", np.zeros((22, 1, 5), options["dtype"]))
        file.create_dataset("features/top", **options)

    return change


def short_chunk(file):
    """HDF5 would serve what lies behind the chunk in memory."""
    del file["features/top"]
    written = file.create_dataset("features/top", (22, 1, 5), "f2", chunks=(11, 1, 5), fletcher32=1)
    written.id.write_direct_chunk((0, 0, 0), bytes(400))
    written.id.write_direct_chunk((11, 0, 0), bytes(4))


def missing_chunk(file):
    del file["features/top"]
    written = file.create_dataset("features/top", (22, 1, 5), "f2", chunks=(1, 1, 5), fletcher32=1)
    written[:21] = 0


def no_manifest(file):
    del file["tlpipe/manifest"]


def no_table(file):
    del file["tlpipe/samples"]


def declare(file, change):
    """Change the manifest as its own author could."""
    document = json.loads(file["tlpipe/manifest"][:].tobytes())
    change(document)
    document["checksum"] = _checksum(document)
    del file["tlpipe/manifest"]
    file["tlpipe/manifest"] = np.frombuffer(json.dumps(document).encode(), np.uint8)


def other_order(file):
    rows = file["tlpipe/samples/row"][:]
    file["tlpipe/samples/row"][:2] = rows[1::-1]
    digest = table_sha256(read_table(file["tlpipe/samples"], 24))
    declare(file, lambda document: document["samples"].update(sha256=digest))


def other_labels(file):
    file["tlpipe/samples/labels/0/codes"][0] = 0


def more_samples(file):
    declare(file, lambda document: document["samples"].update(n=10**9, size_bytes=10**12))


def more_rows(file):
    declare(file, lambda document: document["shards"][0].update(n=10**9, size_bytes=10**12))


def promise(file):
    """A few bytes that claim to be terabytes."""
    n = 2**40
    for name, info in LAYERS.items():
        del file["features"][name]
        shape, chunks = (n, 1, *info.shape), (9, 1, *info.shape)
        file["features"].create_dataset(name, shape, info.dtype, chunks=chunks, fletcher32=True)
    declare(file, lambda document: document["shards"][0].update(n=n, size_bytes=2**47))


def two_shards(file):
    def change(document):
        second = {**document["shards"][0], "file": "000002.h5"}
        document.update(shards=[*document["shards"], second], next_shard=3)

    declare(file, change)


HOSTILE = {
    "soft link": soft_link,
    "external link": external_link,
    "external group": external_group,
    "external storage": external_storage,
    "virtual": virtual,
    "gzip": layer(compression="gzip"),
    "objects": layer(dtype=h5py.string_dtype(), data=["x"] * 22),
    "float64": layer(dtype="f8"),
    "wider": layer(data=np.zeros((22, 1, 6), "f2")),
    "no checksums": layer(chunks=(11, 1, 5)),
    "not in chunks": layer(),
    "columns in chunks": layer(chunks=(22, 1, 1), fletcher32=True),
    "large chunk": layer(chunks=(44, 1, 5), maxshape=(None, 1, 5), fletcher32=True),
    "short chunk": short_chunk,
    "missing chunk": missing_chunk,
    "promise": promise,
    "no manifest": no_manifest,
    "no table": no_table,
    "other order": other_order,
    "other labels": other_labels,
    "more samples": more_samples,
    "more rows": more_rows,
    "two shards": two_shards,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_before_anything_large(packed, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with h5py.File("secret.h5", "w") as file:
        file["x"] = file["top"] = file["low"] = np.zeros((22, 1, 5), "f2")
    with h5py.File(packed, "r+") as file:
        HOSTILE[kind](file)
    tracemalloc.start()
    with pytest.raises(StoreError, match=r"packed\.h5"):
        open_store(packed)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5_000_000
    assert pack_problems(packed, content=False)


def test_values_that_are_not_finite_are_told_and_not_unpacked(packed, tmp_path):
    with h5py.File(packed, "r+") as file:
        file["features/low"][2, 0, 1] = np.nan
        offset = file["tlpipe/sha256"].id.get_offset()
        file["tlpipe/sha256"][:] = 0
    data = bytearray(packed.read_bytes())
    data[offset : offset + 32] = hashlib.sha256(data).digest()
    packed.write_bytes(data)
    assert pack_problems(packed, content=True) == [f"{packed}: features/low holds NaN or infinity."]
    with pytest.raises(StoreFormatError, match="features/low holds NaN"):
        unpack_store(open_store(packed), tmp_path / "again")


def test_what_is_no_store_says_so(rich_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(StoreFormatError, match="neither a folder with a store"):
        open_store(tmp_path / "notes.txt")
    with pytest.raises(StoreFormatError, match="is a part of a feature store"):
        open_store(rich_folder / "features.h5")
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file["x"] = [1, 2, 3]
    with pytest.raises(StoreFormatError, match=r"theirs\.h5"):
        open_store(tmp_path / "theirs.h5")


def test_a_packed_file_of_a_newer_release_is_refused(packed):
    with h5py.File(packed, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(StoreFormatError, match="pip install --upgrade tlpipe"):
        open_store(packed)


def test_the_digest_of_a_table_covers_every_column(rich_folder):
    table = open_store(rich_folder).table
    seen = {table_sha256(table)}
    for column in fields(SampleTable):
        values = getattr(table, column.name)
        if column.name == "ids":
            changed = ["x", *list(values)[1:]]
        elif column.name == "labels":
            changed = dict(reversed(values.items()))
        elif column.name == "reasons":
            changed = {0: "why"}
        else:
            changed = values.copy()
            changed.flat[0] += 1
        seen.add(table_sha256(replace(table, **{column.name: changed})))
    assert len(seen) == 1 + len(fields(SampleTable))


# Two processes at once


def test_of_two_that_pack_to_one_file_the_slower_overwrites_nothing(
    packed, rich_folder, tmp_path, monkeypatch
):
    """The quicker one is done while the other one writes."""
    path, seal = tmp_path / "both.h5", pack._seal
    theirs = tmp_path / "both.h5.tmp"
    theirs.write_text("of somebody else")

    def seal_late(*arguments):
        seal(*arguments)
        monkeypatch.undo()
        pack_store(open_store(rich_folder), path)

    monkeypatch.setattr(pack, "_seal", seal_late)
    with pytest.raises(UsageError, match="exists already; nothing was overwritten"):
        pack_store(open_store(rich_folder), path)

    assert pack_problems(path, content=True) == []
    assert everything(path) == everything(packed)
    assert theirs.read_text() == "of somebody else"
    assert sorted(p.name for p in tmp_path.glob("both*")) == ["both.h5", "both.h5.tmp"]


def test_an_export_has_no_name_that_could_be_taken(rich_folder, tmp_path):
    theirs = tmp_path / "t.csv.tmp"
    theirs.write_text("of somebody else")
    export_csv(Selection(open_store(rich_folder)), tmp_path / "t.csv")
    assert theirs.read_text() == "of somebody else"
    with pytest.raises(UsageError, match="exists already"):
        export_csv(Selection(open_store(rich_folder)), tmp_path / "t.csv")


def test_a_store_gets_its_name_while_it_is_locked(packed, tmp_path, monkeypatch):
    folder, rename, locked = tmp_path / "new", Path.rename, []

    def rename_and_try(path, target):
        try:
            unpack_store(open_store(packed), folder)
        except LockedError:
            locked.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_and_try)
    unpack_store(open_store(packed), folder)

    assert locked == [tmp_path / "new.unpacking"]
    assert not (folder / "writer.json").exists()
    with StoreWriter.reopen(folder):
        pass


def test_what_was_unpacked_in_the_meantime_is_not_replaced(packed, tmp_path, monkeypatch):
    folder, copy_rows = tmp_path / "new", unpack._copy_rows

    def copy_late(*arguments):
        copy_rows(*arguments)
        folder.mkdir()
        (folder / "theirs").touch()

    monkeypatch.setattr(unpack, "_copy_rows", copy_late)
    with pytest.raises(UsageError, match="new exists already"):
        unpack_store(open_store(packed), folder)
    assert [path.name for path in folder.iterdir()] == ["theirs"]


def test_a_store_is_not_called_as_one_that_is_unfinished(packed, tmp_path):
    with pytest.raises(UsageError, match="rename it"):
        unpack_store(open_store(packed), tmp_path / "new.unpacking")
