"""``tlpipe compact`` and ``tlpipe gc``: what they print, and that they delete nothing else."""

import copy
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.store import StoreWriter, open_store
from pipeline.store.key import recipe_key
from pipeline.store.leftovers import remove_folder
from pipeline.store.lock import WriterLock
from pipeline.store.manifest import read_manifest
from pipeline.store.table import Status
from tests.store.conftest import LAYERS, RECIPE, entry_of, features_of, table_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def gc(tlpipe):
    """Run ``tlpipe gc --json``: the document that it prints."""

    def run(*words):
        code, out, _ = tlpipe("gc", "--json", *words)
        assert code == 0
        return json.loads(out)

    return run


def make_store(name="photos", layout="folders", root=None) -> Path:
    """A store of the folder ``name``, or ``root``, which is made too."""
    root = Path(root or name)
    root.mkdir(parents=True)
    folder = Path("cache", name, "toy-0123abcd")
    source = {"name": name, "root": str(root.absolute()), "layout": layout}
    ids = ("rose/1", "rose/2", "iris/1")
    with StoreWriter(folder, RECIPE, LAYERS, source) as writer:
        writer.begin(table_of(ids))
        for sample_id in ids:
            writer.add(entry_of(sample_id), features_of(sample_id))
            writer.commit()
        writer.finish()
    return folder


def make_run(store: Path, name="runs/photos/logreg-toy-0001") -> Path:
    run = Path(name)
    run.mkdir(parents=True)
    document = {"format": "tlpipe-run", "format_version": 1, "stores": [str(store)]}
    (run / "run.json").write_text(json.dumps(document))
    return run


def make_data_set(name: str, days_old: float = 2) -> Path:
    """A data set as ``written.py`` leaves it."""
    folder = Path("cache", "data", name)
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "1.png").write_bytes(b"x" * 1000)
    (folder / ".written.json").write_text('{"n_images": 1}')
    age(folder / ".written.json", days_old)
    return folder


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(path, (then, then))


def contents(*folders: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file()}


def paths(found: list[dict]) -> list[str]:
    return [one["path"] for one in found]


# compact


def test_compact_shows_before_and_after_and_the_path_last(here, tlpipe):
    store = make_store()
    want = np.asarray(open_store(store).features())
    code, out, err = tlpipe("compact", store)
    assert code == 0
    before, after = (next(x for x in out.splitlines() if w in x) for w in ("before", "after"))
    assert before.split()[:3] == ["before", "3", "3"]
    assert after.split()[:3] == ["after", "1", "3"]
    assert out.splitlines()[-1] == str(store)
    assert f"tlpipe verify {store}" in err
    np.testing.assert_array_equal(np.asarray(open_store(store).features()), want)


def test_compact_says_when_there_is_nothing_to_do(here, tlpipe):
    store = make_store()
    tlpipe("compact", store)
    before = contents(store)
    code, out, err = tlpipe("compact", store)
    assert (code, out) == (0, f"{store}\n")
    assert "Nothing to do: 1 shard(s) with 3 rows, all in use." in err
    assert contents(store) == before


def test_compact_prints_one_document(here, tlpipe):
    store = make_store()
    code, out, _ = tlpipe("compact", store, "--json")
    document = json.loads(out)
    size_bytes = open_store(store).manifest.size_bytes
    assert code == 0
    assert document["store"] == str(store)
    assert document["n_rewritten"] == document["before"]["n_shards"] == 3
    assert document["after"] == {"n_shards": 1, "n_rows": 3, "size_bytes": size_bytes}


def test_compact_waits_for_nobody(here, tlpipe):
    store = make_store()
    lock = WriterLock(store)
    lock.acquire()
    try:
        code, out, err = tlpipe("compact", store)
    finally:
        lock.release()
    assert (code, out) == (6, "")
    assert f"{store} is being written by process {os.getpid()}" in err


def test_compact_needs_a_store(here, tlpipe):
    code, out, err = tlpipe("compact", "photos")
    assert (code, out) == (4, "")
    assert "photos is not a feature store" in err


# gc: stores


def test_a_clean_cache_has_no_garbage(here, tlpipe):
    make_store()
    before = contents(here)
    code, out, err = tlpipe("gc")
    assert (code, out, err) == (0, "Nothing to delete in cache.\n", "")
    assert contents(here) == before


def test_no_cache_at_all(here, tlpipe):
    code, out, err = tlpipe("gc", "--cache", "nowhere")
    assert (code, out) == (0, "Nothing to delete in nowhere.\n")
    assert "There is no cache in nowhere yet." in err
    assert list(here.iterdir()) == []


def leave_over(store: Path) -> list[Path]:
    """What a killed writer and ``tlpipe verify --repair`` leave in a store."""
    left = [
        store / "shards" / "000009.h5",
        store / "shards" / "000010.h5.tmp",
        store / "samples-000009.h5",
        store / "store.json.tmp",
        store / "quarantine" / "000002.h5",
    ]
    (store / "quarantine").mkdir()
    for path in left:
        path.write_bytes(b"half")
    return left


def test_what_killed_writers_leave_is_listed_then_deleted(here, tlpipe, gc):
    store = make_store()
    intact = contents(here)
    leave_over(store)
    full = contents(here)
    code, out, err = tlpipe("gc")
    assert code == 0
    assert "4 files that a killed writer left behind" in out
    assert "1 damaged file that tlpipe verify --repair set aside" in out
    assert "20 B to free. Nothing was deleted." in out
    assert err.splitlines()[-1] == "  tlpipe gc --delete"
    assert contents(here) == full
    document = gc()
    assert [one["kind"] for one in document["garbage"]] == ["left over", "quarantine"]
    assert (document["size_bytes"], document["deleted"]) == (20, False)
    code, out, err = tlpipe("gc", "--delete")
    assert out.splitlines()[-1] == "Freed 20 B."
    assert contents(here) == intact
    assert not (store / "quarantine").exists()
    assert gc()["garbage"] == []


def test_a_store_that_is_being_written_is_passed_over(here, tlpipe):
    """Its newest files are named by no store.json yet, and its data root may be gone already."""
    store = make_store()
    leave_over(store)
    Path("photos").rmdir()
    before = contents(store)
    lock = WriterLock(store)
    lock.acquire()
    try:
        for words in ([], ["--delete"]):
            code, out, err = tlpipe("gc", *words)
            assert (code, out) == (0, "Nothing to delete in cache.\n")
            assert f"Passed over: {store} is being written by process {os.getpid()}" in err
    finally:
        lock.release()
    assert contents(store) == before


def test_unused_rows_are_for_compact(here, tlpipe, gc):
    store = make_store()
    with StoreWriter.reopen(store) as writer:
        table = copy.deepcopy(writer.table)
        table.statuses[0], table.shards[0], table.rows[0] = Status.PENDING, -1, -1
        writer.begin(table)
        writer.finish()
    before = contents(here)
    document = gc("--delete")
    assert document["garbage"] == []
    assert document["kept"] == [
        {
            "path": str(store),
            "kind": "unused rows",
            "why": "1 of 3 rows are used by no sample",
            "size_bytes": 3 * 4 + 5 * 2,
            "remedy": f"tlpipe compact {store}",
        }
    ]
    assert contents(here) == before
    assert f"tlpipe compact {store}" in tlpipe("gc")[1]
    tlpipe("compact", store)
    assert gc()["kept"] == []


def test_a_store_whose_data_is_gone_is_deleted(here, tlpipe, gc):
    store, other = make_store(), make_store("birds")
    Path("photos").rmdir()
    kept = contents(other)
    assert f"its data root {here / 'photos'} is gone" in tlpipe("gc")[1]
    document = gc("--delete")
    assert paths(document["garbage"]) == [str(store)]
    assert document["size_bytes"] > 1000
    assert not Path("cache", "photos").exists()
    assert contents(other) == kept
    assert contents(Path("cache")) == kept


@pytest.mark.parametrize("given", ["cache/photos/toy-0123abcd", "photos/toy-0123abcd/",
                                   "../x/cache/photos/toy-0123abcd", "toy-0123abcd"])  # fmt: skip
def test_a_store_that_a_run_uses_is_kept(here, gc, given):
    """Wherever the run was started from."""
    store = make_store()
    Path("photos").rmdir()
    run = make_run(Path(given))
    document = gc("--delete")
    assert document["garbage"] == []
    assert f"is gone; kept for {run}, which uses it" in document["kept"][0]["why"]
    assert open_store(store).ids()


def test_a_run_of_another_store_keeps_nothing(here, gc):
    store = make_store()
    Path("photos").rmdir()
    make_run(Path("cache/birds/toy-0123abcd"))
    assert paths(gc()["garbage"]) == [str(store)]


def test_data_on_a_disk_that_is_not_here_is_not_gone(here, gc):
    """An empty mount point, or a store from another machine."""
    stores = [make_store(root="disk/photos"), make_store("birds", root="machine/birds")]
    Path("disk/photos").rmdir()
    shutil.rmtree("machine")
    document = gc("--delete")
    assert document["garbage"] == []
    assert {one["remedy"] for one in document["kept"]} == {f"rm -r {store}" for store in stores}
    assert all("cannot be reached" in one["why"] for one in document["kept"])


def test_a_data_root_in_another_spelling_is_not_gone(here, gc):
    """A store has its root in Unicode's composed form; a disk may have it decomposed."""
    Path("e\u0301te\u0301").mkdir()
    make_store("\u00e9t\u00e9")
    Path("\u00e9t\u00e9").rmdir()
    assert gc()["garbage"] == []


def test_a_builtin_set_is_never_gone(here, gc):
    make_store("digits", layout="digits")
    Path("digits").rmdir()
    document = gc()
    assert (document["garbage"], document["kept"]) == ([], [])


def test_old_stores_are_deleted_when_asked_for(here, tlpipe, gc):
    old, used = make_store(), make_store("birds")
    make_run(used)
    for store in (old, used):
        age(store / "store.json", 45)
    assert gc()["garbage"] == []
    assert gc("--older-than", 60)["garbage"] == []
    _, out, err = tlpipe("gc", "--older-than", 30)
    assert "last used 45 days ago" in out
    assert err.splitlines()[-1] == "  tlpipe gc --older-than 30 --delete"
    assert paths(gc("--older-than", 30, "--delete")["garbage"]) == [str(old)]
    assert not old.exists()
    age(Path("runs/photos/logreg-toy-0001/run.json"), 31)
    (one,) = gc("--older-than", 30)["garbage"]
    assert (one["path"], one["why"]) == (str(used), "last used 31 days ago")


def test_a_damaged_store_is_no_garbage(here, gc):
    lost, cut, foreign, torn = (make_store(name) for name in ("lost", "cut", "foreign", "torn"))
    (lost / "store.json").unlink()
    (cut / "store.json").write_bytes((cut / "store.json").read_bytes()[:-20])
    (foreign / "store.json").write_text('{"format": "something else"}')
    (torn / "shards" / "000002.h5").write_bytes(b"")
    for name in ("lost", "cut", "foreign", "torn"):
        Path(name).rmdir()
        leave_over(Path("cache", name, "toy-0123abcd"))
    before = contents(here)
    document = gc("--delete")
    assert document["garbage"] == []
    assert {one["path"]: one["remedy"] for one in document["kept"]} == {
        str(cut): f"tlpipe verify {cut}",
        str(foreign): f"tlpipe verify {foreign}",
        str(lost): f"tlpipe verify {lost}",
        str(torn): f"tlpipe verify {torn}",
    }
    assert contents(here) == before


def test_half_made_stores_are_deleted(here, gc):
    for names in (["store.lock"], ["store.lock", "samples-000001.h5", "store.json.tmp"], []):
        folder = Path("cache", f"x{len(names)}", "toy-1")
        (folder / "shards").mkdir(parents=True)
        for name in names:
            (folder / name).touch()
    document = gc("--delete")
    assert [one["kind"] for one in document["garbage"]] == ["half-made"] * 3
    assert list(Path("cache").iterdir()) == []


def test_what_an_interrupted_gc_left_is_finished(here, gc, monkeypatch):
    store = make_store()
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            remove_folder(store)
    assert not store.exists()
    (left,) = Path("cache", "photos").iterdir()
    assert not (left / "store.json").exists()
    (one,) = gc("--delete")["garbage"]
    assert (one["path"], one["kind"]) == (str(left), "half-deleted")
    assert list(Path("cache").iterdir()) == []


# gc: trainings


def make_training(name: str, files=("checkpoint.pt", "metrics.jsonl"), days_old=0.0) -> Path:
    folder = Path("runs", "photos", f".finetune-{name}")
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_bytes(b"x" * 100)
        age(folder / file, days_old)
    return folder


def test_a_stopped_training_is_listed_and_goes_when_it_is_old(here, tlpipe, gc):
    new, old = make_training("0123", days_old=3), make_training("4567", days_old=40)
    before = contents(here)
    document = gc("--delete")
    assert document["garbage"] == []
    assert paths(document["kept"]) == [str(new), str(old)]
    why = "a training that was stopped 3 days ago; its command goes on with --resume"
    assert document["kept"][0]["why"] == why
    assert document["kept"][0]["remedy"] == f"rm -r {new}"
    assert contents(here).items() >= before.items()
    document = gc("--older-than", 30, "--delete")
    assert paths(document["garbage"]) == [str(old)]
    assert document["size_bytes"] >= 200
    assert (new / "checkpoint.pt").exists()
    assert not old.exists()


def test_a_training_that_kept_nothing_goes_and_one_with_a_file_of_yours_stays(here, gc):
    empty, mine = make_training("0123", ["metrics.jsonl"]), make_training("4567", ["notes.txt"])
    document = gc("--delete")
    assert paths(document["garbage"]) == [str(empty)]
    assert not empty.exists()
    assert "kept for notes.txt, which is not ours" in document["kept"][0]["why"]
    assert (mine / "notes.txt").exists()


def test_a_training_that_a_process_is_at_is_passed_over(here, tlpipe):
    folder = make_training("0123", days_old=40)
    lock = WriterLock(folder)
    lock.acquire()
    try:
        code, out, err = tlpipe("gc", "--older-than", "30", "--delete")
    finally:
        lock.release()
    assert (code, out) == (0, "Nothing to delete in cache.\n")
    assert f"Passed over: {folder} is being written by process {os.getpid()}" in err
    assert (folder / "checkpoint.pt").exists()


def test_an_unfinished_comparison_is_listed_and_goes_when_it_is_old(here, gc):
    new, old = (Path("runs", "photos", f".compare-{name}.json") for name in ("0123", "4567"))
    new.parent.mkdir(parents=True)
    for path, days_old in ((new, 3), (old, 40)):
        path.write_text("{}")
        age(path, days_old)
    assert paths(gc("--delete")["kept"]) == [str(new), str(old)]
    document = gc("--older-than", 30, "--delete")
    assert (paths(document["garbage"]), paths(document["kept"])) == ([str(old)], [str(new)])
    assert "its command goes on with it" in document["kept"][0]["why"]
    assert (new.exists(), old.exists()) == (True, False)


# gc: data sets


def test_data_sets_that_no_store_uses_are_deleted(here, gc):
    used, unused, new = make_data_set("digits"), make_data_set("emnist"), make_data_set("usps", 0)
    make_store("digits", layout="digits")
    downloads = Path("cache", "data", "torchvision", "USPS")
    downloads.mkdir(parents=True)
    (downloads / "usps.bz2").write_bytes(b"x")
    kept = contents(used, new, downloads)
    document = gc("--delete")
    assert paths(document["garbage"]) == [str(unused)]
    assert document["size_bytes"] == 1000 + len('{"n_images": 1}')
    assert not unused.exists()
    assert contents(used, new, downloads) == kept


def test_data_sets_are_kept_while_a_store_cannot_be_read(here, gc):
    unused, store = make_data_set("emnist"), make_store()
    (store / "store.json").write_text("{")
    document = gc("--delete")
    assert document["garbage"] == []
    assert unused.exists()
    assert any("as long as a store cannot be read" in note for note in document["notes"])


def test_half_written_data_sets_are_deleted_unless_they_are_being_written(here, gc):
    from filelock import FileLock

    folders = [Path("cache", "data", ".digits.writing"),
               Path("cache", "data", "torchvision", ".USPS.writing")]  # fmt: skip
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"x")
    with FileLock(folders[0].with_name(".digits.lock")):
        document = gc("--delete")
        assert paths(document["garbage"]) == [str(folders[1])]
        assert document["notes"] == [f"Passed over: {folders[0]} is being written."]
        assert folders[0].exists()
    assert paths(gc("--delete")["garbage"]) == [str(folders[0])]
    assert not any(folder.exists() for folder in folders)


# gc: what is not ours


def test_files_of_others_are_neither_listed_nor_deleted(here, gc):
    for name in ("notes.txt", "photos/notes.txt", "shards/000001.h5", "x/shards/000000.tar",
                 "x/samples-000001.h5", "data/mine/1.png", "data/list.csv", "x/y/z/store.lock",
                 "x/store.json.tmp"):  # fmt: skip
        path = Path("cache", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    Path("cache", "empty", "folder").mkdir(parents=True)
    before = sorted(here.rglob("*"))
    document = gc("--delete", "--older-than", 1)
    assert (document["garbage"], document["kept"]) == ([], [])
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("name", ["notes.txt", "shards/notes.txt", "more/notes.txt"])
def test_a_store_with_files_of_others_is_kept(here, gc, name):
    store = make_store()
    Path("photos").rmdir()
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).write_text("mine")
    before = contents(here)
    document = gc("--delete")
    assert document["garbage"] == []
    assert "which is not ours" in document["kept"][0]["why"]
    assert contents(here) == before


def test_links_are_not_followed(here, gc):
    """Neither to a store elsewhere, nor to its shards."""
    outside, store = make_store("outside"), make_store("photos")
    shutil.move("cache/outside", "elsewhere")
    outside = Path("elsewhere", outside.name)
    leave_over(outside)
    Path("cache/outside").symlink_to(Path("elsewhere").absolute())
    Path("cache/linked").mkdir()
    Path("cache/linked/store").symlink_to(outside.absolute())
    shutil.move(store / "shards", "shards")
    (store / "shards").symlink_to(Path("shards").absolute())
    (here / "shards" / "000009.h5").touch()
    for name in ("outside", "photos"):
        Path(name).rmdir()
    before = contents(here)
    document = gc("--delete")
    assert document["garbage"] == []
    assert contents(here) == before
    assert len(open_store(store)) == 3


def test_a_store_that_cannot_be_locked_is_passed_over(here, gc):
    store, other = make_store(), make_store("birds")
    leave_over(store)
    leave_over(other)
    (store / "store.lock").unlink(missing_ok=True)
    (store / "store.lock").mkdir()
    before = contents(store)
    document = gc("--delete")
    assert set(paths(document["garbage"])) == {str(other)}
    assert len(document["notes"]) == 1
    assert document["notes"][0].startswith(f"Passed over: Writing {store}/store.lock failed")
    assert contents(store) == before


def test_a_run_that_cannot_be_read_is_mentioned(here, tlpipe):
    make_store()
    Path("runs/x/y").mkdir(parents=True)
    Path("runs/x/y/run.json").write_text("{")
    code, _, err = tlpipe("gc")
    assert code == 0
    assert "it is not known which stores this run uses: runs/x/y/run.json is not valid" in err


def test_rows_that_a_limit_hides_are_not_for_compact(here, tlpipe, gc):
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        path = Path("photos", ("iris", "rose")[i % 2], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    extract = ("extract", "photos", "--backbone", "pixels:4")
    for limit in ((), ("--limit", 1)):
        assert tlpipe(*extract, *limit)[0] == 0

    (one,) = gc()["kept"]

    assert (one["kind"], one["remedy"]) == ("hidden rows", "")
    assert one["why"] == "4 of 6 rows are hidden by --limit 1, until an extraction without it"
    assert tlpipe(*extract)[0] == 0
    assert gc()["kept"] == []


def test_an_unpack_that_was_stopped_is_no_store_and_is_deleted(here, tlpipe, gc):
    store = make_store()
    unfinished = store.with_name("other-0123abcd.unpacking")
    shutil.copytree(store, unfinished)

    code, out, err = tlpipe("ls", "--json")

    assert code == 0
    assert paths(json.loads(out)["stores"]) == [str(store)]
    assert f"Warning: {unfinished} is what an unfinished tlpipe unpack left" in err
    lock = WriterLock(unfinished)
    lock.acquire()
    assert gc("--delete")["garbage"] == []
    lock.release()
    (one,) = gc("--delete")["garbage"]
    assert (one["path"], one["kind"]) == (str(unfinished), "half-unpacked")
    assert (unfinished.exists(), len(open_store(store))) == (False, 3)


@pytest.mark.parametrize("odd", ["x", 5, None, [1]])
def test_ls_and_inspect_show_odd_recipes_or_refuse_them(here, tlpipe, odd):
    """A store of a stranger may say anything; the others are listed all the same."""
    good, bad = make_store("photos"), make_store("odd")
    manifest = read_manifest(bad)
    recipe = {**manifest.recipe, "preprocess": odd, "pooling": odd}
    replace(manifest, recipe=recipe, key=recipe_key(recipe)).write(bad)

    code, out, err = tlpipe("ls", "--json")

    listed = paths(json.loads(out)["stores"])
    assert code == 0
    assert str(good) in listed
    assert str(bad) in listed or f"Warning: {bad}" in err
    code, _, err = tlpipe("inspect", bad)
    assert code == 0 or (code == 4 and err.startswith(f"Error: {bad}"))
