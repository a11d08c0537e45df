"""What has to be embedded: the data source as it is now against what the store knows."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.samples import DataSource
from pipeline.store.relabel import SPLIT, with_labels
from pipeline.store.table import SPLIT_NAMES, LabelColumn, SampleTable, Status

_COLUMNS = ("digests", "statuses", "shards", "rows")


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    Attributes:
        table: of the data source, with everything that is still valid carried over.
        todo: (n,) indices of samples whose files must be read.
        n_added: samples that the store did not know.
        n_removed: samples that the store knew and the data source no longer has.
        reads_all: whether every file is read, also those that seem current.
    """

    table: SampleTable
    todo: NDArray[np.intp]
    n_added: int
    n_removed: int
    reads_all: bool


def make_plan(
    source: DataSource,
    known: SampleTable | None,
    *,
    verify_content: bool = False,
    is_elsewhere: bool = False,
    relabelled: Collection[str] = (),
) -> Plan:
    """Compare a data source with a store's samples table.

    A sample is current if its file has the size and modification time with which it was embedded.
    Others are read: what decides in the end is the digest of their bytes.

    Args:
        source: the samples as they are now.
        known: the store's table; None for a new store.
        verify_content: read every file, whatever its size and time.
        is_elsewhere: the files are not those that the store was made from, though they may be
            equal: every file is read, and until it was its size and time count as unknown.
        relabelled: columns, and perhaps "split", that keep the store's values where it has any.
    """
    sizes, mtimes = _stat(source)
    ids = [sample.id for sample in source.samples]
    splits = np.array([SPLIT_NAMES.index(sample.split) for sample in source.samples], np.uint8)
    labels = {
        name: LabelColumn.of([sample.labels[k] for sample in source.samples])
        for k, name in enumerate(source.label_columns)
    }
    nowhere = np.full(len(ids), -1, np.int64)
    table = SampleTable.pending(ids, nowhere, nowhere.copy(), splits, labels)
    n_added, n_removed = len(ids), 0
    if known is not None:
        old = _positions(ids, known.ids)
        n_added = int(np.count_nonzero(old < 0))
        n_removed = len(known) - (len(ids) - n_added)
        _keep_relabelled(table, known, old, relabelled)
        current = np.flatnonzero(old >= 0)
        was = old[current]
        same_file = (known.sizes[was] == sizes[current]) & (known.mtimes[was] == mtimes[current])
        # What failed is tried again, and still known as failed until then.
        failed = (known.statuses[was] == Status.FAILED) & (same_file | (known.sizes[was] < 0))
        unchanged = ((known.statuses[was] == Status.OK) & same_file) | failed
        current, was = current[unchanged], was[unchanged]
        kept = _COLUMNS if is_elsewhere else (*_COLUMNS, "sizes", "mtimes")
        for column in kept:
            getattr(table, column)[current] = getattr(known, column)[was]
        if known.reasons:
            pairs = zip(current.tolist(), was.tolist(), strict=True)
            table.reasons = {i: known.reasons[j] for i, j in pairs if j in known.reasons}
    todo = np.flatnonzero(table.statuses != Status.OK)
    everything = verify_content or is_elsewhere
    return Plan(table, np.arange(len(ids)) if everything else todo, n_added, n_removed, everything)


def _keep_relabelled(
    table: SampleTable, known: SampleTable, old: NDArray[np.intp], relabelled: Collection[str]
) -> None:
    """Set the relabelled columns of ``table`` as ``known`` has them, for the samples it knows."""
    current = np.flatnonzero(old >= 0)
    was = old[current]
    if SPLIT in relabelled:
        table.splits[current] = known.splits[was]
    for name in [name for name in known.labels if name in relabelled]:
        labels = known.labels[name].decode(was)
        table.labels[name] = with_labels(table.labels.get(name), len(table), current, labels)


def _stat(source: DataSource) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) size in bytes and (n,) modification time in ns of each file; -2 where there is none."""
    sizes = np.full(len(source.samples), -2, np.int64)
    mtimes = sizes.copy()
    for i, sample in enumerate(source.samples):
        try:
            stat = os.stat(sample.file)  # noqa: PTH116 - names may not be UTF-8
        except OSError:
            continue
        sizes[i], mtimes[i] = stat.st_size, stat.st_mtime_ns
    return sizes, mtimes


def _positions(ids: list[str], known: Sequence[str]) -> NDArray[np.intp]:
    """(n,) where each id stands in ``known``; -1 for nowhere."""
    if len(ids) == len(known) and all(map(str.__eq__, ids, known)):
        return np.arange(len(ids))
    index = {sample_id: i for i, sample_id in enumerate(known)}
    return np.fromiter((index.get(i, -1) for i in ids), np.intp, count=len(ids))
