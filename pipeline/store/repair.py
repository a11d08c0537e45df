"""``tlpipe verify --repair``: set damage aside, so that the next extraction redoes only that.

The order of the steps makes every instant a safe one to be killed in. A damaged file is moved away
first: until the manifest is replaced the store lacks a file that was of no use, and the next repair
finds that as it found the damage. The other way round the file would for a moment be one that the
manifest does not name, and the next writer would remove it for good. Then come the new samples
table, the manifest that names it and no longer names what was lost (this is the commit), and
``features.h5``, which can be absent at any time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, StoreFormatError
from pipeline.store.durable import sync_folder, write_durably, write_error
from pipeline.store.leftovers import QUARANTINE_FOLDER
from pipeline.store.lock import WriterLock
from pipeline.store.manifest import BACKUP_FILE, MANIFEST_FILE, Manifest, file_info, repair_command
from pipeline.store.samples_file import read_samples_file, samples_file_bytes
from pipeline.store.shard import read_log
from pipeline.store.state import SHARD_FOLDER, apply_log, check_file, shard_path
from pipeline.store.table import SampleTable, Status
from pipeline.store.verify import (
    Verifier,
    VerifyReport,
    counted,
    find_manifest,
    own_rows,
    positions,
    row_digests,
    unfolded,
)
from pipeline.store.view import VIEW_FILE, view_is_current, write_view


@dataclass(frozen=True)
class RepairReport:
    """What a repair found, did and left.

    Attributes:
        before: what was wrong.
        after: what is wrong still.
        done: what was done about it, a sentence each.
        n_lost: samples that lost their features; the next extraction makes them again.
        forgot: whether it was lost what became of some samples after they were embedded: the next
            extraction should read every file instead of trusting sizes and times.
    """

    before: VerifyReport
    after: VerifyReport
    done: list[str] = field(default_factory=list)
    n_lost: int = 0
    forgot: bool = False


def repair_store(folder: Path, *, on_progress: Callable[[int], None] | None = None) -> RepairReport:
    """Read every byte of a store and mend what can be mended.

    Nothing is done where a file cannot be read for another reason than damage (bytes that have the
    recorded sha256 are never damage because HDF5 cannot read them), or where both
    copies of the manifest are damaged: ``after`` is ``before`` then.

    Args:
        folder: the store.
        on_progress: is told how many more bytes were read.

    Raises:
        StoreError: there is no store, or it is of another tool or of a newer release.
        LockedError: another process writes to it.
        ResourceError: the disk is full or fails; the repair can be run again.
    """
    find_manifest(folder)  # where there is no store, no lock file is left either
    verifier = Verifier(folder, content=True, on_progress=on_progress)
    lock = WriterLock(folder)
    lock.acquire()
    try:
        before = verifier.verify()
        if any(problem.remedy != repair_command(folder) for problem in before.problems):
            return RepairReport(before, before)
        repair = _Repair(folder, {problem.where for problem in before.problems})
        repair.run()
        after = verifier.verify() if before.problems or repair.done else before
        return RepairReport(before, after, repair.done, repair.n_lost, repair.forgot)
    except OSError as error:
        raise write_error(folder / MANIFEST_FILE, error) from error
    finally:
        lock.release()


class _Repair:
    """One repair, under the lock; see :class:`RepairReport` for what it leaves.

    Args:
        folder: the store.
        bad: the damaged files, relative to the folder.
    """

    def __init__(self, folder: Path, bad: set[str]) -> None:
        self.folder = folder
        self.bad = bad
        self.done: list[str] = []
        self.n_lost = 0
        self.forgot = False

    def run(self) -> None:
        """Mend the manifest, then the shards, the samples table and the view."""
        if VIEW_FILE in self.bad and not (self.folder / VIEW_FILE).is_file():
            self._set_aside(VIEW_FILE)
        manifest = self._mend_manifest()
        kept = self._without_bad_shards(manifest)
        table = self._read_table(kept)
        if table is None:
            table = self._rebuild_table(kept)
            kept = replace(kept, samples=None, relabelled={})
        changed = self._mend_places(kept, table)
        if unfolded(kept):
            self.done.append("Brought the samples table up to date with the logs of the shards.")
        if changed or kept != manifest or unfolded(kept):
            kept = self._commit(manifest, kept, table)
        elif self.bad & {MANIFEST_FILE, BACKUP_FILE}:
            kept.write(self.folder)
        if VIEW_FILE in self.bad or not view_is_current(self.folder, kept):
            write_view(self.folder, kept, table)
            if (self.folder / VIEW_FILE).exists():  # not where rows lie too scattered
                self.done.append(f"Wrote {VIEW_FILE} again.")

    def _mend_manifest(self) -> Manifest:
        """What ``store.json`` said, from its copy where need be."""
        manifest = find_manifest(self.folder)
        assert manifest is not None, "the remedy of two damaged copies is another"
        if BACKUP_FILE in self.bad:
            self._set_aside(BACKUP_FILE)
            self.done.append(f"Wrote {BACKUP_FILE} again.")
        if MANIFEST_FILE in self.bad:
            self._set_aside(MANIFEST_FILE)
            self.done.append(f"Restored {MANIFEST_FILE} from its copy {BACKUP_FILE}.")
            # The copy may be one commit older, and a shard's number is never used again.
            shards = self.folder.glob(f"{SHARD_FOLDER}/*.h5")
            last = max((int(path.stem) for path in shards if path.stem.isdecimal()), default=0)
            self.forgot = last >= manifest.next_shard
            manifest = replace(manifest, next_shard=max(manifest.next_shard, last) + 1)
        return manifest

    def _without_bad_shards(self, manifest: Manifest) -> Manifest:
        """The manifest of the shards that are good; the others are moved away."""
        good = []
        for shard in manifest.shards:
            name = f"{SHARD_FOLDER}/{shard.file}"
            if name not in self.bad:
                good.append(shard)
                continue
            if not self._set_aside(name):
                self.done.append(f"Took {name}, which is missing, off the list.")
            self.forgot |= shard in unfolded(manifest)
        return replace(manifest, shards=tuple(good))

    def _read_table(self, manifest: Manifest) -> SampleTable | None:
        """The samples table with the logs of good shards applied; None if it is damaged."""
        file = manifest.samples
        if file is None:
            return None
        try:
            check_file(self.folder / file.file, file)
            table = read_samples_file(self.folder / file.file, file.n)
        except (CorruptStoreError, StoreFormatError):
            self._set_aside(file.file)
            return None
        index = positions(table)
        if len(index) < len(table):
            self._set_aside(file.file)
            return None
        for shard in unfolded(manifest):
            apply_log(table, index, read_log(shard_path(self.folder, shard)))
        return table

    def _rebuild_table(self, manifest: Manifest) -> SampleTable:
        """A samples table of what the logs of the shards say."""
        log = [
            entry
            for shard in sorted(manifest.shards, key=lambda shard: shard.number)
            for entry in read_log(shard_path(self.folder, shard))
        ]
        ids = list(dict.fromkeys(entry.id for entry in log))
        nowhere = np.full(len(ids), -1, np.int64)
        table = SampleTable.pending(ids, nowhere, nowhere.copy(), np.zeros(len(ids), np.uint8), {})
        apply_log(table, positions(table), log)
        self.forgot = True
        self.done.append(
            f"Made the samples table again from the shards' logs: {counted(len(ids), 'sample')}, "
            "without labels, splits and their order until the next tlpipe extract."
        )
        for column, file in manifest.relabelled.items():
            self.done.append(f"Lost what tlpipe relabel had set: {column!r}, from {file}.")
        return table

    def _mend_places(self, manifest: Manifest, table: SampleTable) -> bool:
        """Let every sample point to a row of its own or to none; whether that was to be done.

        Identical images may have rows in several shards: where one is lost another will do.
        """
        digests = {
            shard.number: row_digests(shard_path(self.folder, shard), shard)
            for shard in manifest.shards
        }
        ready = table.statuses == Status.OK
        astray = np.flatnonzero(ready & ~own_rows(table, digests)).tolist()
        stray = ~ready & ((table.shards != -1) | (table.rows != -1))
        failed = np.flatnonzero(table.statuses == Status.FAILED).tolist()
        unexplained = [i for i in failed if not table.reasons.get(i)]
        places = _places(digests) if astray else {}
        lost = []
        for i in astray:
            place = places.get(table.digests[i].tobytes())
            if place is None:
                lost.append(i)
            else:
                table.shards[i], table.rows[i] = place
        table.shards[stray] = table.rows[stray] = -1
        _forget(table, [*lost, *unexplained])
        self.n_lost = len(lost)
        if lost:
            self.done.append(f"Marked {counted(len(lost), 'sample')} as not embedded.")
        return bool(astray or stray.any() or unexplained)

    def _commit(self, manifest: Manifest, kept: Manifest, table: SampleTable) -> Manifest:
        """Write ``table``, and then that it is the store's and what shards it is of."""
        old = manifest.samples
        data = samples_file_bytes(table)
        name = f"samples-{1 if old is None else old.number + 1:06d}.h5"
        samples = file_info(name, data, len(table))
        kept = replace(kept, samples=samples, folded=kept.next_shard - 1)
        write_durably(self.folder / name, data)
        (self.folder / VIEW_FILE).unlink(missing_ok=True)
        kept.write(self.folder)
        if old is not None:
            (self.folder / old.file).unlink(missing_ok=True)
        return kept

    def _set_aside(self, name: str) -> bool:
        """Move a file of the store to the quarantine; whether there was one."""
        path = self.folder / name
        if not os.path.lexists(path):
            return False
        quarantine = self.folder / QUARANTINE_FOLDER
        quarantine.mkdir(exist_ok=True)
        names = (f"{path.stem}{'-' + str(k) if k > 1 else ''}{path.suffix}" for k in count(1))
        target = next(t for t in map(quarantine.joinpath, names) if not os.path.lexists(t))
        path.rename(target)
        sync_folder(quarantine)
        sync_folder(path.parent)
        self.done.append(f"Moved {name} to {target.relative_to(self.folder).as_posix()}.")
        return True


def _places(digests: dict[int, NDArray[np.uint8]]) -> dict[bytes, tuple[int, int]]:
    """(shard number, row) of the features of each image, by digest."""
    return {
        digest.tobytes(): (number, row)
        for number, known in digests.items()
        for row, digest in enumerate(known)
    }


def _forget(table: SampleTable, samples: list[int]) -> None:
    """Let samples be as if they had never been embedded."""
    table.digests[samples] = 0
    table.statuses[samples] = Status.PENDING
    for column in (table.sizes, table.mtimes, table.shards, table.rows):
        column[samples] = -1
    for i in samples:
        table.reasons.pop(i, None)
