"""Writing a store: rows are gathered, written as an immutable shard, then acknowledged."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, MismatchError, ResourceError, StoreError
from pipeline.store.durable import make_folder, remove, write_durably
from pipeline.store.key import recipe_differences, recipe_key
from pipeline.store.leftovers import sweep
from pipeline.store.lock import WriterLock
from pipeline.store.manifest import (
    BACKUP_FILE,
    MANIFEST_FILE,
    FileInfo,
    LayerInfo,
    Manifest,
    file_info,
    is_store,
    read_manifest,
    repair_command,
)
from pipeline.store.row_index import Place, RowIndex
from pipeline.store.samples_file import samples_file_bytes
from pipeline.store.shard import feature_shape, read_digest_array, shard_bytes
from pipeline.store.state import SHARD_FOLDER, apply_log, check_size, load_table, shard_path
from pipeline.store.table import LogEntry, SampleTable, Status
from pipeline.store.view import VIEW_FILE, view_is_current, write_view

SHARD_BYTES = 64_000_000
SHARD_ROWS = 8192
COMMIT_SECONDS = 20.0


def full_shard_rows(manifest: Manifest, shard_rows: int = SHARD_ROWS) -> int:
    """Rows after which a shard is full: so many, or fewer where rows are large."""
    return max(1, min(shard_rows, SHARD_BYTES // max(1, manifest.row_bytes())))


def known_rows(folder: Path, manifest: Manifest) -> RowIndex:
    """Which row of a store belongs to which image bytes.

    Whoever reads a row checks its shard's sha256; a damaged digest matches no image.
    """
    return RowIndex(
        (shard.number, read_digest_array(shard_path(folder, shard), shard))
        for shard in manifest.shards
    )


class StoreWriter:
    """The one writer of a store; use as a context manager.

    What was added is acknowledged, and never lost again, once :meth:`commit` has returned. Rows
    are committed by themselves when a shard is full or ``commit_seconds`` have passed.

    Args:
        folder: the store; made if it is missing.
        recipe: everything that decides a feature's value.
        layers: what each row holds.
        source: name, spec, root, layout and split_origin of the data source.
        n_views: views a sample.
        provenance: versions, device and the like; None keeps what the store has.
        shard_rows: rows after which a shard is full.
        commit_seconds: time after which what was added is committed; None for the usual 20.

    Raises:
        LockedError: another process writes to this store.
        MismatchError: the folder holds features of another recipe.
        StoreError: the folder cannot be written to, or holds a damaged store.
    """

    def __init__(
        self,
        folder: Path,
        recipe: dict[str, Any],
        layers: Mapping[str, LayerInfo],
        source: dict[str, Any],
        *,
        n_views: int = 1,
        provenance: dict[str, Any] | None = None,
        shard_rows: int = SHARD_ROWS,
        commit_seconds: float | None = None,
    ) -> None:
        self.folder = folder
        self._new = Manifest(
            key=recipe_key(recipe),
            recipe=recipe,
            layers=dict(layers),
            n_views=n_views,
            source=source,
            provenance=provenance or {},
        )
        # As many rows as a shard takes: memory that is never touched costs nothing.
        n_rows = full_shard_rows(self._new, shard_rows)
        self._features = {
            name: np.empty(feature_shape(n_rows, self._new, layer), layer.dtype)
            for name, layer in layers.items()
        }
        self._shard_rows = n_rows
        self._commit_seconds = COMMIT_SECONDS if commit_seconds is None else commit_seconds

    @classmethod
    def reopen(cls, folder: Path) -> StoreWriter:
        """A writer of the store that is in ``folder``, under the recipe that it has.

        Raises:
            StoreError: there is no store, or it is damaged.
        """
        found = read_manifest(folder)
        return cls(folder, found.recipe, found.layers, found.source, n_views=found.n_views)

    def __enter__(self) -> StoreWriter:
        make_folder(self.folder / SHARD_FOLDER)
        self._lock = WriterLock(self.folder)
        self._lock.acquire()
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _open(self) -> None:
        self.manifest = self._new
        self.table: SampleTable | None = None
        self._digests: list[bytes] = []
        self._log: list[LogEntry] = []
        self._row_index: RowIndex | None = None
        self._last_commit = time.monotonic()
        found = read_manifest(self.folder) if is_store(self.folder) else None
        if found is not None:
            self._check_is_newest(found)
            self.manifest = found
            self._check_recipe(self._new.recipe)
            for shard in found.shards:
                check_size(shard_path(self.folder, shard), shard)
            self.table = load_table(self.folder, found)
            told = self._new.provenance or found.provenance
            self._on_disk, self.manifest = found, replace(found, provenance=told)
        elif any((self.folder / SHARD_FOLDER).glob("*.h5")):
            aside = self.folder.with_name(f"{self.folder.name}-damaged")
            raise CorruptStoreError(
                f"{self.folder} holds shards, but store.json and its copy are lost: nothing says "
                "what they hold.\n  Restore one of them from a backup, or set the folder aside:\n"
                f"  mv {shlex.quote(str(self.folder))} {shlex.quote(str(aside))}"
            )
        self._index = self._index_table()
        sweep(self.folder, found)

    def make_with(self, recipe: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Say what the rows to come are made with, where that was not known before.

        Raises:
            MismatchError: it is not the store's recipe.
        """
        self._check_recipe(recipe)
        self.manifest = replace(self.manifest, provenance=provenance)

    def _check_recipe(self, recipe: dict[str, Any]) -> None:
        if recipe_key(recipe) != self.manifest.key:
            lines = recipe_differences(self.manifest.recipe, recipe)
            raise MismatchError(
                f"{self.folder} holds features of another recipe than this run's:\n"
                + "".join(f"  {line}\n" for line in lines)
                + "  Nothing was overwritten."
            )

    def _check_is_newest(self, found: Manifest) -> None:
        """Going on from an older ``store.json`` would remove what was acknowledged since."""
        try:
            backup = read_manifest(self.folder, BACKUP_FILE)
        except (ResourceError, StoreError):
            return
        if backup.key == found.key and backup.age > found.age:
            raise CorruptStoreError(
                f"{self.folder / MANIFEST_FILE} is older than its copy {BACKUP_FILE}: it was put "
                f"back.\n  Restore it from the copy:\n  {repair_command(self.folder)}"
            )

    def _index_table(self) -> dict[str, int]:
        ids = [] if self.table is None else self.table.ids
        return {sample_id: i for i, sample_id in enumerate(ids)}

    def begin(
        self,
        table: SampleTable,
        *,
        source: dict[str, Any] | None = None,
        relabelled: dict[str, str] | None = None,
    ) -> None:
        """Make ``table`` the samples of the store; features that it does not point to are hidden.

        Args:
            table: of the data source as it is now, with what is still valid carried over.
            source: the data source, where it is not as the writer was told.
            relabelled: columns that were set after extraction, by the file that set them; None
                keeps those that the store has.
        """
        found = self.manifest
        self.manifest = replace(
            found,
            source=self._new.source if source is None else source,
            relabelled=found.relabelled if relabelled is None else relabelled,
        )
        if self.table is None or not table.equals(self.table) or self._unfolded():
            self._write_table(table)
        elif self.manifest != self._on_disk:
            self.manifest.write(self.folder)

    def find(self, digest: bytes) -> Place | None:
        """(shard number, row) of the features of these image bytes; None where there are none."""
        return self._known_rows().find(digest)

    def _known_rows(self) -> RowIndex:
        if self._row_index is None:
            self._row_index = known_rows(self.folder, self.manifest)
        return self._row_index

    def add(self, entry: LogEntry, features: Mapping[str, NDArray[np.floating]]) -> None:
        """Add a sample with its features.

        Args:
            entry: id, digest, size, time and note; its place is filled in here.
            features: (n_views, ...) by layer, finite, of the layer's shape and dtype.

        Raises:
            ValueError: the features are not that.
        """
        row = len(self._digests)
        if features.keys() != self._features.keys():
            raise ValueError(f"layers {list(features)}, expected {list(self._features)}")
        for name, values in features.items():
            rows = self._features[name]
            if values.shape != rows.shape[1:] or values.dtype != rows.dtype:
                raise ValueError(
                    f"layer {name!r} of {entry.id!r} is {values.dtype} {values.shape}, "
                    f"expected {rows.dtype} {rows.shape[1:]}"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"layer {name!r} of {entry.id!r} is not finite")
            rows[row] = values
        place = (self._next_number, row)
        self._known_rows().add(entry.digest, place)
        self._digests.append(entry.digest)
        self._log.append(replace(entry, status=Status.OK, shard=place[0], row=place[1]))
        self._commit_if_due()

    def link(self, entry: LogEntry) -> None:
        """Add a sample whose bytes are embedded already, under this or another id.

        Raises:
            KeyError: no row has the entry's digest.
        """
        place = self.find(entry.digest)
        if place is None:
            raise KeyError(entry.digest.hex())
        self._note(replace(entry, status=Status.OK, shard=place[0], row=place[1]))

    def fail(self, entry: LogEntry) -> None:
        """Record that a sample has no features, and why."""
        self._note(replace(entry, status=Status.FAILED, shard=-1, row=-1))

    def _note(self, entry: LogEntry) -> None:
        """Log what became of a sample, unless the table says so already."""
        i = self._index.get(entry.id)
        known = self.table is not None and i is not None and self.table.entry(i) == entry
        if not known:
            self._log.append(entry)
        self._commit_if_due()

    def _commit_if_due(self) -> None:
        full = len(self._digests) == self._shard_rows
        if full or time.monotonic() - self._last_commit >= self._commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Acknowledge everything added so far: it survives whatever comes."""
        self._last_commit = time.monotonic()
        if not self._log:
            return
        features = {name: rows[: len(self._digests)] for name, rows in self._features.items()}
        data = shard_bytes(self.manifest.key, self._digests, features, self._log)
        shard = file_info(f"{self._next_number:06d}.h5", data, len(self._digests))
        write_durably(shard_path(self.folder, shard), data)
        manifest = self.manifest.with_shard(shard)
        manifest.write(self.folder)
        self.manifest = manifest
        self._apply_log()
        self._digests = []

    def finish(self) -> None:
        """Commit, fold all logs into the samples table, and renew the ``features.h5`` view."""
        if self._digests:  # a log alone goes straight into the samples table
            self.commit()
        changed = bool(self._log) or self._unfolded()
        self._apply_log()
        assert self.table is not None, "begin() comes first"
        if changed:
            self._write_table(self.table)
        if not view_is_current(self.folder, self.manifest):
            write_view(self.folder, self.manifest, self.table)

    def replace_shards(self, shards: Sequence[FileInfo], table: SampleTable) -> None:
        """Make these the store's shards, in one commit, and remove those that are no longer.

        Args:
            shards: those of the store that stay, then new ones that are written already, under
                numbers from ``manifest.next_shard`` on.
            table: the store's samples, with their places in these shards; takes in all their logs.
        """
        last = max((shard.number for shard in shards), default=0)
        next_shard = max(self.manifest.next_shard, last + 1)
        self.manifest = replace(self.manifest, shards=tuple(shards), next_shard=next_shard)
        self._row_index = None
        self._write_table(table)
        sweep(self.folder, self.manifest)

    @property
    def _next_number(self) -> int:
        return self.manifest.next_shard

    def _unfolded(self) -> bool:
        return any(shard.number > self.manifest.folded for shard in self.manifest.shards)

    def _apply_log(self) -> None:
        if self.table is not None:
            apply_log(self.table, self._index, self._log)
        self._log = []

    def _write_table(self, table: SampleTable) -> None:
        data = samples_file_bytes(table)
        old = self.manifest.samples
        number = 1 if old is None else old.number + 1
        samples = file_info(f"samples-{number:06d}.h5", data, len(table))
        write_durably(self.folder / samples.file, data)
        # The view shows the table that is about to be replaced: better none than a stale one.
        remove(self.folder / VIEW_FILE)
        manifest = replace(self.manifest, samples=samples, folded=self._next_number - 1)
        manifest.write(self.folder)
        self.manifest = manifest
        if self.table is not table:
            self.table = table
            self._index = self._index_table()
        if old is not None:
            remove(self.folder / old.file)
