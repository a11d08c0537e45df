"""From a packed file to a store again: the folder that the next extraction goes on with."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.errors import CorruptStoreError, StoreFormatError, UsageError
from pipeline.store.durable import sync_folder, write_error
from pipeline.store.lock import HOLDER_FILE
from pipeline.store.pack import BATCH_BYTES, check_new, features_sha256, read_rows
from pipeline.store.reader import Store
from pipeline.store.table import SampleTable, Status
from pipeline.store.writer import StoreWriter

UNFINISHED_SUFFIX = ".unpacking"


def unpack_store(store: Store, folder: Path) -> None:
    """Make the folder of a feature store from a packed file.

    Samples, labels, failures, sizes and times are kept, so that extracting the same data again
    embeds nothing; identical images share a row. The folder is there once it is complete; what an
    interrupted call left beside it is used by the next one.

    Args:
        store: an open packed file.
        folder: where the store goes; nothing may be there.

    Raises:
        UsageError: ``folder`` exists, or ``store`` is not packed.
        StoreError: the packed file is damaged, or the folder cannot be written to.
        LockedError: another process unpacks to the same place.
        ResourceError: the disk is full or fails.
    """
    manifest = store.manifest
    if not store.path.is_file():
        raise UsageError(f"{store.path} is not a file of tlpipe pack: it needs no unpacking.")
    if folder.name.endswith(UNFINISHED_SUFFIX):
        raise UsageError(f"{folder} is called as what an interrupted unpack leaves; rename it.")
    check_new(folder)
    unfinished = folder.with_name(folder.name + UNFINISHED_SUFFIX)
    with StoreWriter(
        unfinished,
        manifest.recipe,
        manifest.layers,
        manifest.source,
        n_views=manifest.n_views,
        provenance=manifest.provenance,
        commit_seconds=math.inf,  # only full shards: there is no work to lose
    ) as writer:
        writer.manifest = replace(writer.manifest, relabelled=manifest.relabelled)
        writer.begin(_not_yet(store.table))
        _copy_rows(store, writer)
        writer.finish()
        _place(unfinished, folder)


def _place(unfinished: Path, folder: Path) -> None:
    """Give the whole store its name, while its lock keeps another process from going on with it."""
    check_new(folder)
    try:
        unfinished.rename(folder)
        # The lock, which is at its old name, cannot remove it any more.
        (folder / HOLDER_FILE).unlink(missing_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise write_error(folder, error) from error


def _not_yet(table: SampleTable) -> SampleTable:
    """The same samples, none of which has features yet."""
    table = copy.deepcopy(table)
    table.statuses[table.ready] = Status.PENDING
    table.shards[:] = table.rows[:] = -1
    return table


def _copy_rows(store: Store, writer: StoreWriter) -> None:
    """Write every row once, and compare what was read with the sha256 that was recorded."""
    ready = store.table.ready
    totals = {name: hashlib.sha256() for name in store.layers}
    n_batch = max(1, BATCH_BYTES // store.manifest.row_bytes())
    for start in range(0, len(ready), n_batch):
        here = slice(start, start + n_batch)
        batch = {name: read_rows(store, name, here) for name in store.layers}
        for name, rows in batch.items():
            totals[name].update(rows.tobytes())
            if not np.isfinite(rows).all():
                raise StoreFormatError(f"{store.path}: features/{name} holds NaN or infinity.")
        for k, i in enumerate(ready[here].tolist()):
            entry = store.table.entry(i)
            if writer.find(entry.digest) is None:
                writer.add(entry, {name: rows[k] for name, rows in batch.items()})
            else:
                writer.link(entry)
    read = {name: total.hexdigest() for name, total in totals.items()}
    if features_sha256(read) != store.manifest.shards[0].sha256:
        raise CorruptStoreError(
            f"{store.path} does not hold the features that were written: their sha256 is another.\n"
            "  Make it again from its store:  tlpipe pack STORE FILE"
        )
