"""``tlpipe relabel`` as a user types it, and what ``inspect``, ``extract`` and ``fit-head`` see."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.store import open_store
from pipeline.store.writer import StoreWriter

EXTRACT = ("extract", "photos", "--backbone", "pixels:4")


def write_photo(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def store(tmp_path, monkeypatch, tlpipe):
    """The store of 24 photographs of two classes in ``photos/``, which is the place to be."""
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        write_photo(tmp_path / "photos" / ("rose", "iris")[i % 2] / f"{i:02d}.png", i)
    return Path(tlpipe(*EXTRACT, "--quiet")[1].splitlines()[-1])


def ids_in(store):
    return open_store(store).ids()


def labels_in(store, column="label"):
    opened = open_store(store)
    return dict(zip(opened.ids(), opened.labels(column).tolist(), strict=True))


def write_csv(rows, header="path,label", name="new.csv"):
    Path(name).write_text("\n".join([header, *rows]), encoding="utf-8")
    return name


def test_what_a_relabelling_says(store, tlpipe):
    ids = ids_in(store)
    rows = [f"{i},{'AB'[k % 2]},{k // 4},{'val' if k < 6 else 'train'}" for k, i in enumerate(ids)]
    write_csv([*rows[:20], "rose/99.png,A,7,train"], "path,label,flower bed,split")

    code, out, err = tlpipe("relabel", store, "new.csv")

    assert code == 0
    lines = out.splitlines()
    assert lines[-1] == str(store)
    table = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert table["label"][1:] == ["replaced", "20", "of", "20", "listed", "3"]
    assert table["flower bed"][2:] == ["added", "20", "of", "20", "listed", "5"]
    assert table["split"][1] == "replaced"
    assert "Splits of the listed samples: train 14, val 6" in lines
    assert "Note: 4 samples of the store are not listed: they keep what they had." in err
    assert "Note: 1 of the listed are not in the store: 'rose/99.png'" in err
    assert f"tlpipe fit-head {store} --label label" in err


def test_json_is_one_document_and_quiet_is_silent(store, tlpipe):
    ids = ids_in(store)
    write_csv([f"{i},A,test" for i in [*ids, "no.png"]], "path,kind,split")

    code, out, err = tlpipe("relabel", store, "new.csv", "--json", "--quiet")

    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["store"] == str(store)
    assert document["columns"]["kind"] == {"is_new": True, "n_changed": 24}
    assert document["n_values"] == {"label": 2, "kind": 1}
    assert document["splits"] == {"test": 24}
    assert (document["n_listed"], document["n_unlisted"], document["unknown"]) == (
        24,
        0,
        ["no.png"],
    )


def test_the_next_command_that_is_printed_works(store, tlpipe):
    write_csv([f"{i},{'AB'[k % 2]}" for k, i in enumerate(ids_in(store))], "path,flower bed")
    _, _, err = tlpipe("relabel", store, "new.csv")
    (step,) = [line.strip() for line in err.splitlines() if "tlpipe fit-head" in line]
    assert tlpipe(*shlex.split(step)[1:], "--head", "ridge")[0] == 0


def as_csv(ids, labels, **how):
    encoding, delimiter = how.get("encoding", "utf-8"), how.get("delimiter", ",")
    rows = [f"{i}{delimiter}{label}" for i, label in zip(ids, labels, strict=True)]
    header = f"{how.get('key', 'path')}{delimiter}label"
    Path("new.csv").write_bytes("\n".join([header, *rows]).encode(encoding))
    return "new.csv"


def as_parquet(ids, labels, key="path"):
    values = [None if label == "" else float(label) for label in labels]
    pq.write_table(pa.table({key: ids, "label": values}), "new.parquet")
    return "new.parquet"


@pytest.mark.parametrize(
    "write",
    [
        lambda ids, labels: as_csv(ids, labels),
        lambda ids, labels: as_csv(ids, labels, encoding="utf-8-sig"),
        lambda ids, labels: as_csv(ids, labels, key="id"),
        lambda ids, labels: as_csv(ids, labels, key="ID", delimiter=";"),
        lambda ids, labels: as_csv(ids, [f" {label}" and f"{label}.0" for label in labels]),
        lambda ids, labels: as_csv([f"./{i}" for i in ids], labels, delimiter="\t"),
        lambda ids, labels: as_csv([f"{Path('photos').resolve()}/{i}" for i in ids], labels),
        as_parquet,
        lambda ids, labels: as_parquet(ids, labels, key="id"),
    ],
    ids=["csv", "BOM", "id", "semicolons", "1.0", "dots", "absolute", "parquet", "parquet id"],
)
def test_ways_to_write_the_same_labels(store, tlpipe, write):
    ids = ids_in(store)
    labels = [str(k % 3) for k in range(24)]

    code, _, err = tlpipe("relabel", store, write(ids, labels))

    assert code == 0, err
    assert labels_in(store) == dict(zip(ids, labels, strict=True))


def test_blank_cells_and_nan_are_missing_labels(store, tlpipe):
    ids = ids_in(store)
    write_csv([f"{ids[0]},", f"{ids[1]},NaN", f"{ids[2]}, x "])
    tlpipe("relabel", store, "new.csv")
    labels = labels_in(store)
    assert (labels[ids[0]], labels[ids[1]], labels[ids[2]]) == (None, None, "x")
    assert labels[ids[3]] == ids[3].split("/")[0]


@pytest.mark.parametrize("root", ["photos", "photos/", "./photos", "{here}/photos"])
def test_paths_may_begin_with_the_images_folder(store, tlpipe, tmp_path, root):
    root = root.format(here=tmp_path)
    prefix = root.rstrip("/").removeprefix("./")
    write_csv([f"{prefix}/{i},x" for i in ids_in(store)])
    code, _, err = tlpipe("relabel", store, "new.csv", "--root", root)
    assert code == 0, err
    assert set(labels_in(store).values()) == {"x"}


def test_the_root_that_is_proposed_works(store, tlpipe):
    write_csv([f"photos/{i},x" for i in ids_in(store)])
    code, _, err = tlpipe("relabel", store, "new.csv")
    assert code == 4
    proposed = err.splitlines()[-1].partition("add:")[2]
    assert tlpipe("relabel", store, "new.csv", *shlex.split(proposed))[0] == 0


def test_the_images_need_not_be_there(store, tlpipe):
    ids = ids_in(store)
    shutil.rmtree("photos")
    write_csv([f"{i},x" for i in ids])
    assert tlpipe("relabel", store, "new.csv")[0] == 0
    assert set(labels_in(store).values()) == {"x"}


def test_names_with_accents_match_however_they_are_composed(tmp_path, monkeypatch, tlpipe):
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path / "photos" / "é" / "1.png", 1)
    store = tlpipe(*EXTRACT, "--quiet")[1].splitlines()[-1]
    shutil.rmtree("photos")
    write_csv(["e\u0301/1.png,x"])
    assert tlpipe("relabel", store, "new.csv")[0] == 0
    assert labels_in(store) == {"é/1.png": "x"}


def test_fit_head_learns_the_new_labels_on_the_new_splits(store, tlpipe):
    ids = ids_in(store)
    rows = [f"{i},{'AB'[k % 2]},{'test' if k < 8 else 'train'}" for k, i in enumerate(ids)]
    tlpipe("relabel", store, write_csv(rows, "path,label,split"))

    document = json.loads(tlpipe("fit-head", store, "--head", "ridge", "--json")[1])

    assert document["classes"] == ["A", "B"]
    assert document["n_samples"]["test"] == 8
    assert document["split_origin"] == "given in new.csv"


def test_a_later_extraction_keeps_what_was_set_until_it_is_reset(store, tlpipe):
    ids = ids_in(store)
    theirs, splits = labels_in(store), open_store(store).splits().tolist()
    rows = [f"{i},x,{k},val" for k, i in enumerate(ids)]
    tlpipe("relabel", store, write_csv(rows, "path,label,group,split"))
    write_photo(Path("photos/rose/new.png"), 99)

    code, out, err = tlpipe(*EXTRACT)

    assert (code, out.splitlines()[-1]) == (0, str(store))
    assert "24 found in the store, 1 embedded" in err
    assert (
        "Note: As set by `tlpipe relabel`: label, group, split from new.csv, in part. The data "
        "source's for 1 new sample. To take the data source's again:  "
        f"tlpipe relabel {store} --reset"
    ) in err
    opened = open_store(store)
    at = opened.ids().index("rose/new.png")
    assert labels_in(store) == dict.fromkeys(ids, "x") | {"rose/new.png": "rose"}
    assert opened.labels("group").tolist()[at] is None
    assert set(opened.splits().tolist()[:at]) == {"val"}
    assert opened.splits().tolist()[at] in ("train", "test")
    assert opened.split_origin.startswith("partly given in new.csv, else made: ")

    code, out, err = tlpipe("relabel", store, "--reset")
    assert (code, out.splitlines()) == (0, ["Forgotten: label, group, split", str(store)])
    assert labels_in(store)["rose/new.png"] == "rose"
    assert labels_in(store)[ids[0]] == "x"
    Path("photos/rose/new.png").unlink()
    code, _, err = tlpipe(*EXTRACT)
    assert code == 0
    assert "relabel" not in err
    opened = open_store(store)
    assert opened.label_columns == ("label",)
    assert labels_in(store) == theirs
    assert opened.splits().tolist() == splits
    assert opened.split_origin.startswith("made: ")


def test_an_extraction_between_leaves_the_store_alone(store, tlpipe):
    """Keeping what was set is no change: nothing is written, also where the source differs."""
    rows = [f"{i},x,{k},val" for k, i in enumerate(ids_in(store))]
    tlpipe("relabel", store, write_csv(rows, "path,label,group,split"))
    before = {path: path.stat().st_ino for path in store.glob("*.[hj]*")}
    tlpipe(*EXTRACT)
    assert {path: path.stat().st_ino for path in store.glob("*.[hj]*")} == before


def test_a_limit_does_not_drop_what_was_set(store, tlpipe):
    tlpipe("relabel", store, write_csv([f"{i},x" for i in ids_in(store)]))
    before = {path: path.read_bytes() for path in store.glob("*.[hj]*")}

    code, out, err = tlpipe(*EXTRACT, "--limit", 4)

    assert (code, out) == (2, "")
    assert f"16 samples would leave {store}, and what `tlpipe relabel` set" in err
    assert f"tlpipe relabel {store} --reset" in err
    assert {path: path.read_bytes() for path in store.glob("*.[hj]*")} == before
    code, out, _ = tlpipe(*EXTRACT, "--limit", 100)
    assert (code, set(labels_in(store).values())) == (0, {"x"})
    tlpipe("relabel", store, "--reset")
    assert tlpipe(*EXTRACT, "--limit", 4)[0] == 0
    assert len(ids_in(store)) == 8


def test_what_leaves_with_an_image_is_said(store, tlpipe):
    tlpipe("relabel", store, write_csv([f"{i},x" for i in ids_in(store)]))
    Path("photos/rose/00.png").rename("aside.png")
    code, _, err = tlpipe(*EXTRACT)
    assert code == 0
    assert "1 sample left the data source, and what was set for them is lost." in err
    assert "1 sample left the data source and the store's list." in err

    Path("aside.png").rename("photos/rose/00.png")
    assert "label from new.csv, in part. The data source's for 1 new sample." in tlpipe(*EXTRACT)[2]

    assert "label from new.csv, in part. To take" in tlpipe(*EXTRACT)[2]
    assert "label from new.csv, in part\n" in tlpipe("inspect", store)[1]
    assert labels_in(store)["rose/00.png"] == "rose"


def test_resetting_what_was_never_set(store, tlpipe):
    code, out, err = tlpipe("relabel", store, "--reset")
    assert (code, out) == (0, f"{store}\n")
    assert "nothing to forget" in err


@pytest.mark.parametrize(
    ("words", "rows", "exit_code", "text"),
    [
        (["{store}"], [], 2, "Give a manifest with the new columns, or --reset"),
        (["{store}", "new.csv", "--reset"], [], 2, "Give a manifest with the new columns, or"),
        (["{store}", "new.txt"], [], 2, "new.txt is no manifest"),
        (["{store}", "nothing.csv"], [], 4, "Cannot read nothing.csv"),
        (["photos", "new.csv"], ["rose/00.png,a,train"], 4, "photos is not a feature store"),
        (["{store}", "new.csv"], [], 4, "lists no image"),
        (["{store}", "new.csv"], ["rose/0.png,a,train"], 4, "lists none of the samples"),
        (["{store}", "new.csv"], ["rose/00.png,a,dev"], 4, "line 2: the split is 'dev'"),
        (["{store}", "new.csv"], ["/else/00.png,a,train"], 4, "not below the root"),
        (
            ["{store}", "new.csv"],
            ["rose/00.png,a,train", "rose/00.png,b,train"],
            4,
            "1 path given twice with other labels",
        ),
        (
            ["{store}", "new.csv", "--root", "photos"],
            ["rose/00.png,a,train", "photos/rose/00.png,b,train"],
            4,
            "new.csv lists an image both with and without 'photos/'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_one_clear_message(store, tlpipe, words, rows, exit_code, text):
    before = {path: path.stat().st_ino for path in store.glob("*.[hj]*")}
    write_csv(rows, "path,label,split")
    code, out, err = tlpipe("relabel", *(word.format(store=store) for word in words))
    assert (code, out) == (exit_code, "")
    assert err.count("Error: ") == 1
    assert "Traceback" not in err
    assert text in err
    assert {path: path.stat().st_ino for path in store.glob("*.[hj]*")} == before


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ("label", "new.csv has no column 'path' or 'id'. Found: 'label'."),
        ("path", "new.csv has nothing to set: no column but that of the samples."),
    ],
)
def test_a_manifest_that_lacks_a_column(store, tlpipe, header, text):
    write_csv(["rose/00.png"], header)
    code, _, err = tlpipe("relabel", store, "new.csv")
    assert code == 4
    assert text in err


def test_one_file_is_not_relabelled(store, tlpipe):
    code, _, err = tlpipe("relabel", store / "features.h5", write_csv(["rose/00.png,a"]))
    assert code == 4
    assert f"Make one of it:  tlpipe unpack {store / 'features.h5'}" in err


def test_a_store_that_is_being_written(store, tlpipe):
    write_csv([f"{i},x" for i in ids_in(store)])
    with StoreWriter.reopen(store):
        code, _, err = tlpipe("relabel", store, "new.csv")
    assert code == 6
    assert f"{store} is being written by process" in err


# What `tlpipe inspect` shows of it


def test_inspect_counts_every_class_in_every_split(store, tlpipe):
    ids = ids_in(store)
    rows = [f"{i},{['A', 'B', ''][k % 3]},{['train', ''][k % 2]}" for k, i in enumerate(ids)]
    tlpipe("relabel", store, write_csv(rows, "path,label,split"))

    document = json.loads(tlpipe("inspect", store, "--json")[1])

    assert document["splits"] == {"": 12, "train": 12}
    assert document["classes"] == {
        "label": {"(none)": {"": 4, "train": 4}, "A": {"": 4, "train": 4}, "B": {"": 4, "train": 4}}
    }
    assert document["n_classes"] == {"label": 2}
    assert document["relabelled"] == {"label": "new.csv", "split": "new.csv"}
    out = tlpipe("inspect", store)[1]
    assert "columns      label (2)\n" in out
    assert "relabelled   label from new.csv, split from new.csv\n" in out
    assert [line.split() for line in out.splitlines() if line.startswith((" A ", " (none)"))] == [
        ["(none)", "4", "4"], ["A", "4", "4"],
    ]  # fmt: skip


def test_inspect_shows_only_the_start_of_a_long_column(store, tlpipe):
    rows = [f"{i},{k:02d}" for k, i in enumerate(ids_in(store))]
    tlpipe("relabel", store, write_csv(rows, "path,serial number"))

    out = tlpipe("inspect", store)[1]

    shown = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert [word for word in shown if word.isdigit()] == [f"{k:02d}" for k in range(20)]
    assert "… 4 more" in out
    assert "columns      label (2), serial number (24)\n" in out
    document = json.loads(tlpipe("inspect", store, "--json")[1])
    assert len(document["classes"]["serial number"]) == document["n_classes"]["serial number"] == 24


def test_inspect_counts_no_class_of_samples_without_features(store, tlpipe):
    (Path("photos") / "empty").mkdir()
    (Path("photos") / "empty" / "zero.png").write_bytes(b"")
    tlpipe(*EXTRACT)
    document = json.loads(tlpipe("inspect", store, "--json")[1])
    assert document["n_classes"] == {"label": 2}
    assert set(document["classes"]["label"]) == {"iris", "rose"}
    assert sum(document["splits"].values()) == 24


def test_text_from_a_manifest_cannot_drive_the_terminal(store, tlpipe):
    ids = ids_in(store)
    rows = [f'{i},"\x1b[2J{k % 2}"' for k, i in enumerate([*ids, "\x1b[31m.png"])]
    code, out, err = tlpipe("relabel", store, write_csv(rows, 'path,"co\x1blour"'))
    assert code == 0, err
    assert "\x1b" not in out + err
    assert "co\\x1blour" in out
    assert "\x1b" not in tlpipe("inspect", store)[1]
