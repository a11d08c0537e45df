"""Thousands of single faults in every file of a store: each is found, and none is ever served.

After a sample of them the store is repaired and filled again as the extractor would. What is
embedded anew are the images that were in the damaged shard and nowhere else.
"""

import random
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.store import open_store
from pipeline.store.manifest import BACKUP_FILE, read_manifest
from pipeline.store.repair import repair_store
from pipeline.store.shard import read_digests
from pipeline.store.state import shard_path
from pipeline.store.table import Status
from pipeline.store.verify import Verifier, verify_store
from pipeline.store.view import VIEW_FILE

from .conftest import entry_of, features_of, make_writer, table_of

IDS = [f"{'cat' if i % 2 else 'dög'}/{i:02d}.png" for i in range(17)]
BROKEN = IDS[7]
TWICE = IDS[12]  # has a row of its own although the same bytes are in an earlier shard
# Nothing in this package reads these two, so what they hold cannot be served.
NEVER_READ = (BACKUP_FILE, VIEW_FILE)
# To read everything takes longer than to find the fault: these are read back after some faults,
# the others, on which a reader fails at once, after every one.
READ_EVERY = {BACKUP_FILE: 20, VIEW_FILE: 20, "shards/000001.h5": 3, "shards/000002.h5": 3}
CONTENT = {i: i for i in IDS} | {IDS[6]: IDS[0], TWICE: IDS[1], IDS[15]: IDS[2]}
READY = [i for i in IDS if i != BROKEN]


def embed(writer, ids) -> int:
    """Write what becomes of samples as the extractor does; how many were embedded."""
    n_embedded = 0
    for sample_id in ids:
        entry = entry_of(sample_id, CONTENT[sample_id])
        if sample_id == BROKEN:
            writer.fail(replace(entry, reason="empty file (0 bytes)"))
        elif writer.find(entry.digest) is not None:
            writer.link(entry)
        else:
            writer.add(entry, features_of(CONTENT[sample_id]))
            n_embedded += 1
    return n_embedded


def build(folder: Path) -> None:
    """A store of two shards in its samples table, and a third that an interrupted run left."""
    with make_writer(folder, shard_rows=5) as writer:
        writer.begin(table_of(IDS))
        embed(writer, IDS[:11])
        writer.finish()
    with make_writer(folder, shard_rows=5) as writer:
        writer.begin(writer.table)
        embed(writer, IDS[11:12])
        writer.add(entry_of(TWICE, CONTENT[TWICE]), features_of(CONTENT[TWICE]))
        embed(writer, IDS[13:])
    manifest = read_manifest(folder)
    assert (len(manifest.shards), manifest.folded) == (3, 2)


def extract(folder: Path) -> int:
    """What ``tlpipe extract`` does to the store; how many images it embeds."""
    with make_writer(folder) as writer:
        table, known = table_of(IDS), writer.table
        index = {sample_id: i for i, sample_id in enumerate(known.ids)}
        for i, sample_id in enumerate(IDS):
            j = index.get(sample_id)
            if j is not None and known.statuses[j] != Status.PENDING:
                for column in ("digests", "sizes", "mtimes", "statuses", "shards", "rows"):
                    getattr(table, column)[i] = getattr(known, column)[j]
                if j in known.reasons:
                    table.reasons[i] = known.reasons[j]
        writer.begin(table)
        todo = np.flatnonzero(table.statuses != Status.OK)
        n_embedded = embed(writer, [IDS[i] for i in todo.tolist()])
        writer.finish()
    return n_embedded


def read_everything(folder: Path) -> list:
    """Everything that a reader can be served."""
    store = open_store(folder)
    served = [store.ids(), store.labels().tolist(), store.splits().tolist(), store.failures]
    return served + [np.asarray(store.features(layers=[name])).tobytes() for name in store.layers]


def expected() -> list:
    rows = [features_of(CONTENT[sample_id]) for sample_id in READY]
    table = table_of(IDS)
    return [
        READY,
        [sample_id.split("/")[0] for sample_id in READY],
        ["test" if i % 4 == 3 else "train" for i, s in enumerate(table.ids) if s != BROKEN],
        {BROKEN: "empty file (0 bytes)"},
        *(np.concatenate([row[name] for row in rows]).tobytes() for name in ("low", "top")),
    ]


def images_only_in(folder: Path) -> dict[str, int]:
    """How many images are in a shard and in no other, by shard."""
    found = {
        f"shards/{shard.file}": set(read_digests(shard_path(folder, shard), shard))
        for shard in read_manifest(folder).shards
    }
    return {
        name: len(here.difference(*(found[other] for other in found if other != name)))
        for name, here in found.items()
    }


def flip_bit(rng, data, _):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite_byte(rng, data, _):
    data[rng.randrange(len(data))] = rng.randrange(256)


def zero_region(rng, data, _):
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randint(1, 4096))
    data[start:stop] = bytes(stop - start)


def truncate(rng, data, _):
    del data[rng.randrange(len(data)) :]


def extend(rng, data, _):
    data += rng.randbytes(rng.randint(1, 4096))


def swap_regions(rng, data, _):
    n = rng.randint(1, min(512, len(data) // 3))
    a = rng.randrange(len(data) - 2 * n + 1)
    b = rng.randrange(a + n, len(data) - n + 1)
    data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]


def empty(rng, data, _):
    data.clear()


def replace_by_another(rng, data, others):
    data[:] = rng.choice(others)


def delete(rng, data, _):
    return "deleted"


KINDS = (
    *(flip_bit, overwrite_byte, zero_region, truncate, extend, swap_regions) * 4,
    *(empty, replace_by_another, delete),
)


@dataclass
class Count:
    """Faults tried and found by what they were, and repairs."""

    tried: Counter = field(default_factory=Counter)
    found: Counter = field(default_factory=Counter)
    missed: list = field(default_factory=list)
    served: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    n_repaired: int = 0
    n_redone: int = 0


def is_found(report, name: str, gone: bool) -> bool:
    """Whether a report tells of a fault in this file, and of none in another."""
    if report.problems:
        return {problem.where for problem in report.problems} == {name}
    # The copy and the view may be absent, and spaces in JSON mean nothing: worth a note.
    return (gone or name.endswith(".json")) and any(name in note for note in report.notes)


def try_faults(root: Path, n_faults: int, seed: int, *, repair_every: int) -> Count:
    """Damage one store in many ways, one after the other."""
    rng = random.Random(seed)
    intact, folder = root / "intact", root / "store"
    build(intact)
    files = {
        path.relative_to(intact).as_posix(): path.read_bytes()
        for path in sorted(intact.rglob("*"))
        if path.suffix in (".h5", ".json")
    }
    assert len(files) == 7
    shutil.copytree(intact, folder)
    n_to_redo, right = images_only_in(intact), expected()
    verifier, count = Verifier(folder, content=True), Count()
    assert verifier.verify().ok
    assert read_everything(folder) == right
    while count.tried.total() < n_faults:
        name, kind = rng.choice(list(files)), rng.choice(KINDS)
        data = bytearray(files[name])
        gone = kind(rng, data, [other for path, other in files.items() if path != name])
        if not gone and data == files[name]:
            continue
        path = folder / name
        path.unlink() if gone else path.write_bytes(data)
        count.tried[name] += 1
        n = count.tried.total()

        # Now and then by a verifier that has not seen the intact store.
        report = verify_store(folder, content=True) if n % 50 == 0 else verifier.verify()
        if is_found(report, name, bool(gone)):
            count.found[name] += 1
        else:
            count.missed.append((name, kind.__name__, report))

        if n % READ_EVERY.get(name, 1) == 0:
            try:
                assert read_everything(folder) == right
                count.served[name] += 1
            except StoreError:
                count.refused[name] += 1
                assert name not in NEVER_READ

        if n % repair_every == 0:
            repaired = repair_store(folder)
            assert repaired.after.ok
            n_redone = extract(folder)
            assert n_redone == n_to_redo.get(name, 0)
            assert verifier.verify().ok
            assert read_everything(folder) == right
            count.n_repaired += 1
            count.n_redone += n_redone
            shutil.rmtree(folder)
            shutil.copytree(intact, folder)
        else:
            path.write_bytes(files[name])
    assert verifier.verify().ok
    return count


def show(count: Count, capsys) -> None:
    with capsys.disabled():
        print("\nfile                tried  found  missed  read back: refused  right")
        for name, n_tried in sorted(count.tried.items()):
            print(
                f"{name:<18} {n_tried:>6,} {count.found[name]:>6,} "
                f"{n_tried - count.found[name]:>7,} {count.refused[name]:>19,} "
                f"{count.served[name]:>6,}"
            )
        print(
            f"{count.tried.total():,} faults tried, {count.found.total():,} found, "
            f"{len(count.missed):,} missed; {count.n_repaired:,} repaired, "
            f"{count.n_redone:,} images embedded again"
        )


def test_every_single_fault_is_found_and_none_is_served(tmp_path, capsys):
    count = try_faults(tmp_path, 2100, seed=0, repair_every=21)
    show(count, capsys)
    assert not count.missed
    assert count.n_repaired == 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_more_faults(tmp_path, capsys, seed):
    count = try_faults(tmp_path, 2000, seed, repair_every=100)
    show(count, capsys)
    assert not count.missed
