"""Labels, splits and columns change; features, shards and everything else do not."""

from dataclasses import replace

import h5py
import numpy as np
import pytest

from pipeline.errors import DataError, LockedError, StoreError
from pipeline.store import open_store
from pipeline.store.manifest import read_manifest
from pipeline.store.relabel import NewColumns, forget_relabelling, relabel, split_origin
from pipeline.store.table import SPLIT_NAMES, Status

from .conftest import entry_of, features_of, make_writer, table_of


def contents(folder, pattern="**/*"):
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.glob(pattern)}


def column(folder, name):
    """Labels of all samples, those without features too, by id."""
    table = open_store(folder).table
    return dict(zip(table.ids, table.labels[name].decode().tolist(), strict=True))


def test_columns_are_replaced_and_added_and_no_feature_is_touched(store_folder, ids):
    shards = contents(store_folder, "shards/*")
    features = np.asarray(open_store(store_folder).features())

    report = relabel(
        store_folder,
        NewColumns(
            "new.csv", ids, {"label": ["x"] * 20, "group": [f"g{i % 3}" for i in range(20)]}
        ),
    )

    store = open_store(store_folder)
    assert store.labels("label").tolist() == ["x"] * 20
    assert store.labels("group").tolist() == [f"g{i % 3}" for i in range(20)]
    assert np.asarray(store.features()).tobytes() == features.tobytes()
    assert contents(store_folder, "shards/*") == shards
    assert {name: vars(change) for name, change in report.columns.items()} == {
        "label": {"is_new": False, "n_changed": 20},
        "group": {"is_new": True, "n_changed": 20},
    }
    assert report.n_values == {"label": 1, "group": 3}
    assert (report.n_listed, report.n_unlisted, report.unknown) == (20, 0, [])
    assert report.splits is None


def test_the_plain_view_shows_the_new_columns(store_folder, ids):
    splits = ["val" if i % 2 else "" for i in range(20)]
    relabel(store_folder, NewColumns("new.csv", ids, {"group": ids[::-1]}, splits))
    with h5py.File(store_folder / "features.h5") as file:
        assert file["label/group"].asstr()[:].tolist() == ids[::-1]
        assert file["split"].asstr()[:].tolist() == splits
        assert "label/label" in file


def test_what_is_not_listed_keeps_what_it_had(store_folder, ids):
    before = open_store(store_folder)
    listed = [ids[7], "no/such.png", ids[2], ids[0]]
    new = NewColumns(
        "new.csv", listed, {"label": ["a", "b", None, "c"]}, ["val", "val", "", "test"]
    )

    report = relabel(store_folder, new)

    store = open_store(store_folder)
    labels, splits = before.labels().tolist(), before.splits().tolist()
    labels[7], labels[2], labels[0] = "a", None, "c"
    splits[7], splits[2], splits[0] = "val", "", "test"
    assert store.ids() == ids
    assert store.labels().tolist() == labels
    assert store.splits().tolist() == splits
    assert (report.n_listed, report.n_unlisted, report.unknown) == (3, 17, ["no/such.png"])
    assert report.splits == {"": 1, "val": 1, "test": 1}


def test_a_new_column_is_missing_where_nothing_is_listed(store_folder, ids):
    relabel(store_folder, NewColumns("new.csv", ids[:1], {"group": ["a"]}))
    assert column(store_folder, "group") == {ids[0]: "a"} | dict.fromkeys(ids[1:])


def test_categories_are_those_that_occur(store_folder, ids):
    relabel(store_folder, NewColumns("new.csv", ids, {"label": ["b", "a"] * 10}))
    assert open_store(store_folder).table.labels["label"].categories == ["a", "b"]


def test_failed_and_pending_samples_are_relabelled_too(tmp_path):
    folder, ids = tmp_path / "store", ["ok.png", "failed.png", "pending.png"]
    with make_writer(folder) as writer:
        writer.begin(table_of(ids))
        writer.add(entry_of("ok.png"), features_of("ok.png"))
        writer.fail(replace(entry_of("failed.png"), reason="empty file (0 bytes)"))
        writer.finish()

    relabel(folder, NewColumns("new.csv", ids, {"label": ["a", "b", "c"]}, ["test"] * 3))

    table = open_store(folder).table
    assert table.labels["label"].decode().tolist() == ["a", "b", "c"]
    assert [SPLIT_NAMES[split] for split in table.splits] == ["test"] * 3
    assert table.statuses.tolist() == [Status.OK, Status.FAILED, Status.PENDING]
    assert table.reasons == {1: "empty file (0 bytes)"}


def test_an_unfinished_store_keeps_what_its_log_says(tmp_path, ids):
    """Rows that were acknowledged, but are not in the samples table yet."""
    folder = tmp_path / "store"
    with make_writer(folder, shard_rows=6) as writer:
        writer.begin(table_of(ids))
        for sample_id in ids[:12]:
            writer.add(entry_of(sample_id), features_of(sample_id))

    relabel(folder, NewColumns("new.csv", ids, {"label": ids}))

    store = open_store(folder)
    assert store.ids() == store.labels().tolist() == ids[:12]


def test_what_was_set_is_marked_with_its_file(store_folder, ids):
    relabel(store_folder, NewColumns("a.csv", ids, {"label": ids, "group": ids}))
    relabel(store_folder, NewColumns("b.csv", ids, {"group": ids}, ["train"] * 20))
    assert read_manifest(store_folder).relabelled == {
        "label": "a.csv", "group": "b.csv", "split": "b.csv",
    }  # fmt: skip
    before = open_store(store_folder)

    assert set(forget_relabelling(store_folder)) == {"label", "group", "split"}

    assert read_manifest(store_folder).relabelled == {}
    assert open_store(store_folder).table.equals(before.table)
    assert forget_relabelling(store_folder) == {}


def test_saying_the_same_again_writes_nothing(store_folder, ids):
    new = NewColumns("new.csv", ids, {"label": ids}, ["train"] * 20)
    relabel(store_folder, new)
    before = contents(store_folder, "*.[hj]*")

    report = relabel(store_folder, new)

    assert contents(store_folder, "*.[hj]*") == before
    assert {change.n_changed for change in report.columns.values()} == {0}


def test_a_mark_alone_is_committed(store_folder, ids):
    """The values are as they were, but from now on the user's."""
    same = open_store(store_folder).labels().tolist()
    relabel(store_folder, NewColumns("new.csv", ids, {"label": same}))
    assert read_manifest(store_folder).relabelled == {"label": "new.csv"}


def test_how_the_splits_came_about_is_recorded(store_folder, ids):
    def origin_after(file, listed):
        relabel(store_folder, NewColumns(file, listed, {}, ["train"] * len(listed)))
        return open_store(store_folder).split_origin

    assert origin_after("a.csv", ids[:3]) == "partly given in a.csv, else none"
    assert origin_after("b.csv", ids[:5]) == "partly given in b.csv, else none"
    assert origin_after("c.csv", ids) == "given in c.csv"
    assert origin_after("d.csv", ids[1:]) == "partly given in d.csv, else given in c.csv"
    assert split_origin("e.csv", "made: 20%") == "partly given in e.csv, else made: 20%"


def test_labels_alone_leave_the_splits_origin(store_folder, ids):
    before = read_manifest(store_folder).source
    relabel(store_folder, NewColumns("new.csv", ids, {"label": ids}))
    assert read_manifest(store_folder).source == before


@pytest.mark.parametrize(
    ("listed", "remedy"),
    [
        ("photos/all/cat/001.png", "add:  --root photos/all"),
        ("my photos/dög/000.png", "add:  --root 'my photos'"),
        ("001.png", "Spell them as the store does, in a column 'path' or 'id'."),
    ],
)
def test_a_list_of_other_samples_changes_nothing(store_folder, listed, remedy):
    before = contents(store_folder, "*.[hj]*")
    with pytest.raises(DataError) as caught:
        relabel(store_folder, NewColumns("new.csv", [listed, "x"], {"label": ["a", "b"]}))
    assert caught.value.exit_code == 4
    first, theirs, ours, last = str(caught.value).splitlines()
    assert first == f"new.csv lists none of the samples of {store_folder}."
    assert repr(listed) in theirs
    assert repr("dög/000.png") in ours
    assert last.endswith(remedy)
    assert contents(store_folder, "*.[hj]*") == before


def test_a_store_that_is_being_written_is_not_relabelled(store_folder, ids):
    with make_writer(store_folder), pytest.raises(LockedError) as caught:
        relabel(store_folder, NewColumns("new.csv", ids, {"label": ids}))
    assert caught.value.exit_code == 6
    assert "is being written by process" in str(caught.value)


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="is not a feature store"):
        relabel(tmp_path, NewColumns("new.csv", ["a"], {"label": ["a"]}))
    assert list(tmp_path.iterdir()) == []


def test_a_reader_keeps_the_labels_of_its_moment(store_folder, ids):
    store = open_store(store_folder)
    before = store.labels().tolist()
    relabel(store_folder, NewColumns("new.csv", ids, {"label": ["x"] * 20}))
    assert store.labels().tolist() == before
    assert np.asarray(store.features()).shape == (20, 8)
