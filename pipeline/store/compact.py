"""Merging a store's small shards into full ones, without the rows that no sample uses.

New shards are written beside the old ones, and one replacement of ``store.json`` takes them into
use. A process that is killed before leaves files that the next writer removes; one that is killed
after leaves old shards that the next writer removes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, TlpipeError
from pipeline.store.durable import write_durably
from pipeline.store.leftovers import sweep
from pipeline.store.manifest import FileInfo, Manifest, file_info, read_manifest
from pipeline.store.reader import Store, open_store
from pipeline.store.shard import read_digest_array, read_log, shard_bytes
from pipeline.store.state import shard_path
from pipeline.store.table import SampleTable, Status
from pipeline.store.writer import SHARD_ROWS, StoreWriter, full_shard_rows

Indices = NDArray[np.intp]

# Rows that may be read for each one that there is, to bring them into the samples' order.
_MAX_READ_RATIO = 2


@dataclass(frozen=True)
class Size:
    """How large a store is: its shards, their rows, and the bytes of all its files."""

    n_shards: int
    n_rows: int
    size_bytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> Size:
        """The size of a store."""
        n_rows = sum(shard.n for shard in manifest.shards)
        return cls(len(manifest.shards), n_rows, manifest.size_bytes)


@dataclass(frozen=True)
class CompactReport:
    """What compaction did.

    Attributes:
        before: the store as it was.
        after: the store as it is.
        n_rewritten: shards that were read and replaced; 0 where there was nothing to do.
    """

    before: Size
    after: Size
    n_rewritten: int


def compact_store(
    folder: Path,
    *,
    shard_rows: int = SHARD_ROWS,
    on_plan: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> CompactReport:
    """Merge small shards and drop rows that no sample uses; features stay equal bit by bit.

    Shards that are full and wholly used are left as they are. Memory holds about one shard; the
    disk holds old and new shards side by side until the new ones are in use.

    Args:
        folder: the store.
        shard_rows: rows after which a shard is full.
        on_plan: is told the number of rows in use and how many of them will be moved.
        on_progress: is told how many more rows are written.

    Raises:
        StoreError: there is no store, it is damaged, or the folder cannot be written to.
        LockedError: another process writes to it.
        ResourceError: out of disk space; the store is as it was.
    """
    with StoreWriter.reopen(folder) as writer:
        before = writer.manifest
        store = open_store(folder)
        rows = _Rows(store)
        stale = rows.stale_shards(full_shard_rows(before, shard_rows))
        if on_plan is not None:
            on_plan(len(rows.first), rows.count_in(stale))
        if stale:
            try:
                _Compaction(store, rows, stale, shard_rows, on_progress).commit(writer)
            except BaseException:
                _tidy(folder)
                raise
        writer.finish()
        return CompactReport(Size.of(before), Size.of(writer.manifest), len(stale))


def count_unused_rows(store: Store) -> int:
    """Rows that no sample points to: of images that changed, or left the data source."""
    return sum(shard.n for shard in store.manifest.shards) - len(_Rows(store).first)


def _tidy(folder: Path) -> None:
    """Make room again after a failure; what store.json on the disk names decides, old or new."""
    with suppress(TlpipeError):  # the next writer sweeps as well
        sweep(folder, read_manifest(folder))


class _Rows:
    """The rows that samples use.

    Attributes:
        shards: (n_rows,) number of the shard that holds each, ascending.
        first: (n_rows,) the first sample that uses each, counted among those that have features.
        of_sample: (n_ready,) which of these rows each sample with features uses.
    """

    def __init__(self, store: Store) -> None:
        self.shards_of_store = store.manifest.shards
        ready = store.table.ready
        places = store.table.shards[ready].astype(np.int64) << 32 | store.table.rows[ready]
        unique, self.first, self.of_sample = np.unique(
            places, return_index=True, return_inverse=True
        )
        self.shards = (unique >> 32).astype(np.int32)
        self.rows = (unique & 0xFFFFFFFF).astype(np.intp)

    def stale_shards(self, n_full: int) -> tuple[FileInfo, ...]:
        """Shards that are worth rewriting; none where that would neither merge nor drop any."""
        numbers, counts = np.unique(self.shards, return_counts=True)
        n_used = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        stale = tuple(
            shard
            for shard in self.shards_of_store
            if n_used.get(shard.number, 0) < shard.n or shard.n < n_full
        )
        n_rows = self.count_in(stale)
        n_after = max(1, -(-n_rows // n_full))  # one may hold nothing but a log
        all_used = n_rows == sum(shard.n for shard in stale)
        return () if all_used and n_after == len(stale) else stale

    def count_in(self, shards: Collection[FileInfo]) -> int:
        """How many of the rows are in these shards."""
        return len(self.within(shards))

    def within(self, shards: Collection[FileInfo]) -> Indices:
        """The rows that are in these shards."""
        return np.flatnonzero(np.isin(self.shards, [shard.number for shard in shards]))


class _Compaction:
    """The rows of some shards, on their way into new ones."""

    def __init__(
        self,
        store: Store,
        rows: _Rows,
        stale: tuple[FileInfo, ...],
        shard_rows: int,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.store = store
        self.rows = rows
        self.n_full = full_shard_rows(store.manifest, shard_rows)
        self.kept = [shard for shard in store.manifest.shards if shard not in stale]
        self.moved = _in_order(rows, stale, self.n_full)
        self.on_progress = on_progress
        self._check_digests(stale)
        self.table = self._new_table()

    def _new_table(self) -> SampleTable:
        """The samples, with the places that they will have."""
        number = np.full(len(self.rows.first), -1, np.int32)
        row = number.copy()
        n = np.arange(len(self.moved))
        number[self.moved] = self.store.manifest.next_shard + n // self.n_full
        row[self.moved] = n % self.n_full
        old = self.store.table
        shards, rows = old.shards.copy(), old.rows.copy()
        moves = number[self.rows.of_sample] >= 0
        samples, targets = old.ready[moves], self.rows.of_sample[moves]
        shards[samples], rows[samples] = number[targets], row[targets]
        return replace(old, shards=shards, rows=rows)

    def _check_digests(self, stale: tuple[FileInfo, ...]) -> None:
        """A row of another image than the table says must not be written under the table's word."""
        table = self.store.table
        by_shard = np.argsort(table.shards, kind="stable")
        numbers = table.shards[by_shard]
        for shard in stale:
            start, stop = np.searchsorted(numbers, [shard.number, shard.number + 1])
            samples = by_shard[start:stop]
            samples = samples[table.statuses[samples] == Status.OK]
            digests = read_digest_array(shard_path(self.store.path, shard), shard)
            differs = (digests[table.rows[samples]] != table.digests[samples]).any(axis=1)
            if differs.any():
                i = int(samples[differs][0])
                raise CorruptStoreError(
                    f"{shard_path(self.store.path, shard)}: row {table.rows[i]} holds the features "
                    f"of another image than the samples table says of {table.ids[i]!r}.\n"
                    "  Nothing was changed. See what is damaged:  "
                    f"tlpipe verify {shlex.quote(str(self.store.path))}"
                )

    def commit(self, writer: StoreWriter) -> None:
        """Write the new shards and take them into use."""
        n_new = -(-len(self.moved) // self.n_full)
        if not n_new and len(self._untold()):
            n_new = 1  # no row is left, but something to tell
        new = [self._write_shard(k, is_last=k == n_new - 1) for k in range(n_new)]
        writer.replace_shards([*self.kept, *new], self.table)

    def _write_shard(self, k: int, *, is_last: bool) -> FileInfo:
        """Write the k-th new shard."""
        store, manifest = self.store, self.store.manifest
        moved = self.moved[k * self.n_full : (k + 1) * self.n_full]
        samples = self.rows.first[moved]  # one of each row
        features = {
            name: np.stack(
                [store.features(layers=[name], view=v)[samples] for v in range(store.n_views)],
                axis=1,
            )
            for name in manifest.layers
        }
        digests = [digest.tobytes() for digest in self.table.digests[self.table.ready[samples]]]
        number = manifest.next_shard + k
        told = np.flatnonzero((self.table.shards == number) & (self.table.statuses == Status.OK))
        if is_last:
            told = np.concatenate([told, self._untold()])
        log = [self.table.entry(i) for i in told.tolist()]
        data = shard_bytes(manifest.key, digests, features, log)
        shard = file_info(f"{number:06d}.h5", data, len(digests))
        write_durably(shard_path(store.path, shard), data)
        if self.on_progress is not None:
            self.on_progress(len(digests))
        return shard

    def _untold(self) -> Indices:
        """Samples of whose state no log would tell: failed, or copies whose log goes.

        The table holds it all, but should the table be lost, the logs are what it is made of again.
        """
        table = self.table
        told = (table.statuses == Status.PENDING) | (table.shards >= self.store.manifest.next_shard)
        index = {sample_id: i for i, sample_id in enumerate(table.ids)}
        for shard in sorted(self.kept, key=lambda shard: shard.number):
            for entry in read_log(shard_path(self.store.path, shard)):
                i = index.get(entry.id)
                if i is not None and table.shards[i] < self.store.manifest.next_shard:
                    told[i] = entry == table.entry(i)
        return np.flatnonzero(~told)


def _in_order(rows: _Rows, stale: Collection[FileInfo], n_full: int) -> Indices:
    """The rows of some shards in the samples' order, where that costs little to read.

    As long as every new shard takes one stretch of each old one, all is read once. Where samples
    were shuffled since, each would read all the old ones: rows then stay as they are.
    """
    stored = rows.within(stale)
    if not len(stored):
        return stored
    ordered = stored[np.argsort(rows.first[stored])]
    _, source = np.unique(rows.shards[ordered], return_inverse=True)
    stretch = np.arange(len(ordered)) // n_full * len(stale) + source
    order = np.argsort(stretch, kind="stable")
    starts = np.flatnonzero(np.diff(stretch[order], prepend=-1))
    at = rows.rows[ordered][order]
    lengths = np.maximum.reduceat(at, starts) - np.minimum.reduceat(at, starts) + 1
    n_stored = sum(shard.n for shard in stale)
    return ordered if lengths.sum() <= _MAX_READ_RATIO * n_stored else stored
