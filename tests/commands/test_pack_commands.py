"""Packing, unpacking and exporting as a user types them."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.extract.extractor import Settings, extract
from pipeline.store import SampleTable, Status, StoreWriter, open_store
from pipeline.store.manifest import LayerInfo, _checksum
from pipeline.store.table import LabelColumn, LogEntry

from .test_flow import write_photo

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features-elsewhere.md"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The store of photos/, cats and =dogs(), one of which is broken and one there twice."""
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        write_photo(Path("photos") / ("rose", "=dog()")[i % 2] / f"{i:02d}.png", i)
    Path("photos/rose/zero.png").write_bytes(b"")
    shutil.copyfile("photos/rose/00.png", "photos/rose/copy.png")
    settings = Settings(batch_size=8)
    return extract(open_source("photos"), load_backbone("pixels:4"), settings).store


@pytest.fixture
def maps(store):
    """A store of the same samples with a layer of vectors and one of maps."""
    rng = np.random.default_rng(0)
    layers = {"penultimate": LayerInfo((6,), "float16"), "layer4": LayerInfo((3, 2, 2), "float16")}
    known = open_store(store)
    table, ready = known.table, known.table.ready
    labels = {"label": LabelColumn.of(known.labels())}
    folder = store.parent / "maps-1"
    with StoreWriter(folder, {"backbone": "toy"}, layers, known.source, shard_rows=10) as writer:
        writer.begin(SampleTable.pending(
            known.ids(), table.sizes[ready], table.mtimes[ready], table.splits[ready], labels
        ))  # fmt: skip
        for i, sample_id in enumerate(known.ids()):
            features = {name: rng.normal(size=(1, *layer.shape)).astype("f2")
                        for name, layer in layers.items()}  # fmt: skip
            writer.add(LogEntry(sample_id, Status.OK, bytes([i]) * 32), features)
        writer.finish()
    return folder


def test_a_packed_store_is_used_like_the_store(store, tlpipe):
    code, out, err = tlpipe("pack", store, "photos.h5")
    assert (code, out) == (0, "photos.h5\n")
    assert "25 samples with their features" in err
    assert "Listed without features: 1 skipped." in err
    assert "tlpipe unpack photos.h5" in err
    code, out, _ = tlpipe("inspect", "photos.h5")
    assert code == 0
    assert "26: 25 with features, 1 skipped" in out
    scores = []
    for path in (store, "photos.h5"):
        code, out, _ = tlpipe("fit-head", path, "--head", "prototype", "--json")
        assert code == 0
        scores.append(json.loads(out)["metrics"])
    assert scores[0] == scores[1]


def test_unpacked_at_the_same_data_nothing_is_embedded(store, tlpipe):
    tlpipe("pack", store, "photos.h5")
    expected = np.asarray(open_store(store).features())
    shutil.rmtree("cache")
    code, out, err = tlpipe("unpack", "photos.h5")
    assert (code, out) == (0, f"{store}\n")
    assert f"tlpipe fit-head {store}" in err
    shards = sorted((store / "shards").iterdir())
    code, out, err = tlpipe("extract", "photos", "--backbone", "pixels:4")
    assert (code, out.splitlines()[-1]) == (3, str(store))
    assert "26 samples: 25 found in the store, 0 embedded, 1 skipped" in err
    assert "Time:" not in err, "nothing was decoded"
    assert sorted((store / "shards").iterdir()) == shards
    np.testing.assert_array_equal(np.asarray(open_store(store).features()), expected)


def test_nothing_that_exists_is_overwritten(store, tlpipe):
    tlpipe("pack", store, "photos.h5")
    Path("arrays").mkdir()
    for words in (
        ["pack", store, "photos.h5"],
        ["unpack", "photos.h5"],
        ["unpack", "photos.h5", "arrays"],
        ["export-features", store, "--to", "csv", "--output", "photos.h5"],
        ["export-features", store, "--to", "npy", "--output", "arrays"],
        ["export-features", store, "--to", "parquet", "--output", "photos.h5"],
    ):
        code, out, err = tlpipe(*words)
        assert (code, out) == (2, "")
        assert "exists already; nothing was overwritten" in err


def test_a_name_from_a_stranger_stays_within_the_cache(store, tlpipe):
    tlpipe("pack", store, "photos.h5")
    with h5py.File("photos.h5", "r+") as file:
        document = json.loads(file["tlpipe/manifest"][:].tobytes())
        document["source"]["name"] = "../../../etc"
        document["checksum"] = _checksum(document)
        del file["tlpipe/manifest"]
        file["tlpipe/manifest"] = np.frombuffer(json.dumps(document).encode(), np.uint8)
    code, out, _ = tlpipe("unpack", "photos.h5")
    assert (code, out) == (0, f"cache/etc/{store.name}\n")


def test_unpack_wants_a_packed_file(store, tlpipe):
    code, _, err = tlpipe("unpack", store, "again")
    assert (code, "needs no unpacking" in err) == (2, True)
    code, _, err = tlpipe("unpack", "missing.h5")
    assert (code, "missing.h5" in err) == (4, True)


@pytest.mark.parametrize(
    "words",
    [
        ["pack", "{store}", "out"],
        ["export-features", "{store}", "--to", "npy", "--output", "out"],
        ["export-features", "{store}", "--to", "csv", "--output", "out"],
        ["export-features", "{store}", "--to", "parquet", "--output", "out"],
    ],
    ids=lambda words: words[-3] if "--to" in words else words[0],
)
def test_a_full_disk_leaves_nothing_behind(store, words):
    before = sorted(Path().iterdir())
    code = (
        "import resource, sys\n"
        "from pipeline.commands import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        f"sys.argv = ['tlpipe', *{[word.format(store=store) for word in words]!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "No room to write" in done.stderr
    assert sorted(Path().iterdir()) == before


def read_samples(path):
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def test_arrays(maps, tlpipe):
    code, out, err = tlpipe("export-features", maps, "--to", "npy")
    assert (code, out) == (0, f"photos-{maps.name}-npy\n")
    assert "a spreadsheet must import them as text" in err
    folder, store = Path(out.strip()), open_store(maps)
    header, rows = read_samples(folder / "samples.csv")
    samples = zip(store.ids(), store.splits(), store.labels(), strict=True)
    assert header == ["id", "split", "label"]
    assert rows == [list(row) for row in samples]
    assert {path.stem for path in folder.glob("*.npy")} == set(store.layers)
    assert any(len(shape) == 3 for shape in store.layers.values())
    for name in store.layers:
        array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        expected = np.asarray(store.features(layers=[name]))
        assert array.dtype == expected.dtype == np.float16
        np.testing.assert_array_equal(array, expected)


def test_csv(store, tlpipe):
    tlpipe("pack", store, "photos.h5")
    code, out, err = tlpipe("export-features", "photos.h5", "--to", "csv", "--split", "train")
    assert (code, out) == (0, "photos-train.csv\n")
    assert "begin with = + - or @" in err
    header, rows = read_samples(Path("photos-train.csv"))
    expected = open_store(store)
    assert header == ["id", "split", "label", *(f"f{k}" for k in range(48))]
    assert [row[0] for row in rows] == expected.ids("train")
    assert any(row[0].startswith("=dog()/") for row in rows)
    assert [row[1:3] for row in rows] == [["train", y] for y in expected.labels(split="train")]
    values = np.array([[float(cell) for cell in row[3:]] for row in rows])
    np.testing.assert_array_equal(values, np.asarray(expected.features("train")))


def test_parquet(maps, tlpipe):
    import pyarrow.parquet as pq

    words = ["--to", "parquet", "--output", "new/p.parquet", "--layers", "penultimate,layer4"]
    code, out, err = tlpipe("export-features", maps, *words)
    assert (code, out) == (0, "new/p.parquet\n")
    assert "the maps of layer4 are written flattened" in err
    assert "embedding-atlas new/p.parquet --vector penultimate" in err
    store, table = open_store(maps), pq.read_table("new/p.parquet")
    assert table.column_names == ["id", "split", "label", "penultimate", "layer4"]
    assert str(table.schema.field("penultimate").type) == "fixed_size_list<element: float>[6]"
    assert table["id"].to_pylist() == store.ids()
    assert table["split"].to_pylist() == store.splits().tolist()
    assert table["label"].to_pylist() == store.labels().tolist()
    for name in ("penultimate", "layer4"):
        expected = np.asarray(store.features(layers=[name])).reshape(len(store), -1)
        np.testing.assert_array_equal(np.array(table[name].to_pylist()), expected)
    assert json.loads(table.schema.metadata[b"tlpipe.recipe"]) == store.recipe


def test_tables_are_written_in_batches(store, tlpipe, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr("pipeline.store.export.BATCH_BYTES", 48 * 4 * 7)
    for file_format, path in (("parquet", "p.parquet"), ("csv", "p.csv"), ("npy", "arrays")):
        assert tlpipe("export-features", store, "--to", file_format, "--output", path)[0] == 0
    assert pq.ParquetFile("p.parquet").num_row_groups == 4
    expected = np.asarray(open_store(store).features())
    np.testing.assert_array_equal(np.load("arrays/penultimate.npy"), expected)
    np.testing.assert_array_equal(np.array(pq.read_table("p.parquet")["penultimate"].to_pylist()),
                                  expected)  # fmt: skip
    assert len(read_samples(Path("p.csv"))[1]) == 25


def test_missing_labels_and_names_that_are_taken(tmp_path, monkeypatch, tlpipe):
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    lines = ["path,id,penultimate"]
    for i in range(6):
        write_photo(Path("images") / "x" / f"{i}.png", i)
        lines.append(f"images/x/{i}.png,{'' if i % 2 else 'even'},a{i}")
    Path("list.csv").write_text("\n".join(lines))
    store = extract(open_source("list.csv"), load_backbone("pixels:4")).store
    tlpipe("export-features", store, "--to", "parquet", "--output", "p.parquet")
    table = pq.read_table("p.parquet")
    assert table.column_names == ["id", "split", "label_id", "label_penultimate", "penultimate"]
    assert table["label_id"].to_pylist() == ["even", None] * 3
    tlpipe("export-features", store, "--to", "csv", "--output", "p.csv")
    assert [row[2] for row in read_samples(Path("p.csv"))[1]] == ["even", ""] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "csv", "--split", "val"], "has no sample with features in split 'val'"),
        (["--to", "csv", "--layers", "penultimat"], "Did you mean: penultimate?"),
        (["--to", "xlsx"], "'xlsx' is not one of"),
        ([], "Missing option '--to'"),
    ],
)
def test_what_cannot_be_exported(store, tlpipe, words, message):
    code, out, err = tlpipe("export-features", store, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_parquet_without_pyarrow_says_what_to_install(store, tlpipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = tlpipe("export-features", store, "--to", "parquet")
    assert code == 2
    assert "pip install 'tlpipe[parquet]'" in err
    assert tlpipe("export-features", store, "--to", "npy")[0] == 0


def test_json_is_one_document(store, tlpipe):
    packed = json.loads(tlpipe("pack", store, "photos.h5", "--json", "--quiet")[1])
    assert (packed["path"], packed["n_with_features"], packed["n_failed"]) == ("photos.h5", 25, 1)
    assert packed["size_bytes"] == Path("photos.h5").stat().st_size
    unpacked = json.loads(tlpipe("unpack", "photos.h5", "again", "--json")[1])
    assert (unpacked["store"], unpacked["n_samples"]) == ("again", 26)
    code, out, err = tlpipe("export-features", "again", "--to", "npy", "--json", "--quiet")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["layers"] == {"penultimate": [48]}
    assert (document["n_samples"], document["columns"]) == (25, ["id", "split", "label"])


def test_the_page_is_true(store, tlpipe):
    tlpipe("pack", store, "photos.h5")
    tlpipe("export-features", "photos.h5", "--to", "npy", "--output", "arrays")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    expected = open_store(store)
    n_run = 0
    for block in blocks:
        if "pandas" in block:  # not installed for the tests
            continue
        n_run += 1
        exec(block, names)
        np.testing.assert_array_equal(names["X"], np.asarray(expected.features()))
        assert list(names["y"]) == expected.labels().tolist()
    assert n_run == 3
    assert list(names["ids"]) == expected.ids()
    assert list(names["split"]) == expected.splits().tolist()
    names["file"].close()
