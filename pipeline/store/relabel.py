"""Labels, splits and other columns of a store, changed without touching a feature.

What was set here is marked in ``store.json``, so that a later extraction keeps it where it would
otherwise list the data source's values again.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.store.table import SPLIT_NAMES, LabelColumn, SampleTable
from pipeline.store.writer import StoreWriter

SPLIT = "split"
"""What the splits are called among the relabelled columns; no label column has this name."""


@dataclass(frozen=True)
class NewColumns:
    """What to say of some samples from now on.

    Attributes:
        origin: name of the file that says so.
        ids: (n,) sample ids, each once.
        labels: (n,) labels by column, None where one is missing.
        splits: (n,) "train", "val", "test" or "" for none; None where splits stay as they are.
    """

    origin: str
    ids: Sequence[str]
    labels: Mapping[str, Sequence[str | None]]
    splits: Sequence[str] | None = None


@dataclass(frozen=True)
class ColumnChange:
    """What became of one column.

    Attributes:
        is_new: whether the store did not have it.
        n_changed: samples whose value is another than before.
    """

    is_new: bool
    n_changed: int


@dataclass(frozen=True)
class RelabelReport:
    """What was changed.

    Attributes:
        columns: what was set, "split" for the splits.
        n_values: different values of each label column that the store has now.
        splits: how many of the listed samples are in which split now; None where splits stayed.
        n_listed: samples of the store that were listed.
        n_unlisted: samples of the store that were not, and kept what they had.
        unknown: ids that were listed and that the store does not have.
    """

    columns: dict[str, ColumnChange]
    n_values: dict[str, int]
    splits: dict[str, int] | None
    n_listed: int
    n_unlisted: int
    unknown: list[str]


def relabel(folder: Path, new: NewColumns) -> RelabelReport:
    """Replace or add columns of the samples table, in one commit.

    Samples that are not listed keep what they had. Failed and pending samples change as well.

    Args:
        folder: the store.
        new: the columns.

    Raises:
        DataError: the store has none of the samples that are listed.
        StoreError: there is no store, or it is damaged.
        LockedError: another process writes to it.
    """
    with StoreWriter.reopen(folder) as writer:
        assert writer.table is not None, "a store that was reopened has a table"
        before, manifest = writer.table, writer.manifest
        index = {sample_id: i for i, sample_id in enumerate(before.ids)}
        found = np.fromiter((index.get(i, -1) for i in new.ids), np.intp, count=len(new.ids))
        listed = found >= 0
        if not listed.any():
            raise DataError(_nothing_matches(folder, new, index))
        table = _changed(before, new, found)
        source = manifest.source
        marks = {**manifest.relabelled, **dict.fromkeys(new.labels, new.origin)}
        n_listed = int(np.count_nonzero(listed))
        if new.splits is not None:
            marks[SPLIT] = new.origin
            others = str(source.get("split_origin", "none")) if n_listed < len(before) else ""
            source = {**source, "split_origin": split_origin(new.origin, others)}
        writer.begin(table, source=source, relabelled=marks)
        writer.finish()
    return RelabelReport(
        columns=_changes(before, table, new),
        n_values={name: len(column.categories) for name, column in table.labels.items()},
        splits=None if new.splits is None else _split_counts(table.splits[found[listed]]),
        n_listed=n_listed,
        n_unlisted=len(before) - n_listed,
        unknown=[new.ids[i] for i in np.flatnonzero(~listed).tolist()],
    )


def forget_relabelling(folder: Path) -> dict[str, str]:
    """Let the next extraction take every column from the data source again.

    Returns:
        The columns that were marked, and the file that each was set from.

    Raises:
        StoreError: there is no store, or it is damaged.
        LockedError: another process writes to it.
    """
    with StoreWriter.reopen(folder) as writer:
        assert writer.table is not None, "a store that was reopened has a table"
        forgotten = writer.manifest.relabelled
        writer.begin(writer.table, source=writer.manifest.source, relabelled={})
        writer.finish()
    return forgotten


def with_labels(
    column: LabelColumn | None,
    n_samples: int,
    at: NDArray[np.intp],
    labels: Sequence[str | None] | NDArray[np.object_],
) -> LabelColumn:
    """The column with other labels at some samples; a new one is missing everywhere else."""
    values = np.full(n_samples, None, object) if column is None else column.decode()
    values[at] = np.array(labels, dtype=object)
    return LabelColumn.of(values.tolist())


def _changed(table: SampleTable, new: NewColumns, found: NDArray[np.intp]) -> SampleTable:
    """The table with the new columns; ``found`` says where each listed sample is, or -1."""
    listed = np.flatnonzero(found >= 0)
    at = found[listed]
    labels = dict(table.labels)
    for name, values in new.labels.items():
        chosen = np.array(values, dtype=object)[listed]
        labels[name] = with_labels(labels.get(name), len(table), at, chosen)
    splits = table.splits.copy()
    if new.splits is not None:
        splits[at] = [SPLIT_NAMES.index(new.splits[i]) for i in listed.tolist()]
    return replace(table, labels=labels, splits=splits)


def _changes(before: SampleTable, now: SampleTable, new: NewColumns) -> dict[str, ColumnChange]:
    changes = {}
    for name in new.labels:
        old = before.labels.get(name)
        was = np.full(len(before), None, object) if old is None else old.decode()
        differs = was != now.labels[name].decode()
        changes[name] = ColumnChange(old is None, int(np.count_nonzero(differs)))
    if new.splits is not None:
        n_changed = int(np.count_nonzero(before.splits != now.splits))
        changes[SPLIT] = ColumnChange(False, n_changed)
    return changes


def _split_counts(splits: NDArray[np.uint8]) -> dict[str, int]:
    counts = np.bincount(splits, minlength=len(SPLIT_NAMES)).tolist()
    return {name: n for name, n in zip(SPLIT_NAMES, counts, strict=True) if n}


def split_origin(file: str, others: str) -> str:
    """How splits came about that were set from a file, for people.

    Args:
        file: its name.
        others: how those came about that it does not give; "" where it gives all.
    """
    if not others:
        return f"given in {file}"
    # What was partly given twice is told once.
    return f"partly given in {file}, else {others.rpartition(', else ')[2]}"


def _nothing_matches(folder: Path, new: NewColumns, index: Mapping[str, int]) -> str:
    """What to say where no sample that is listed is in the store."""
    root = next(filter(None, (_root_in(sample_id, index) for sample_id in new.ids[:100])), None)
    if root is None:
        remedy = "Spell them as the store does, in a column 'path' or 'id'."
    else:
        remedy = f"The manifest's paths begin at another folder; add:  --root {shlex.quote(root)}"
    return (
        f"{new.origin} lists none of the samples of {folder}.\n"
        f"  The manifest has, for example:  {new.ids[0]!r}\n"
        f"  The store has, for example:     {next(iter(index), '')!r}\n"
        f"  {remedy}"
    )


def _root_in(listed: str, index: Mapping[str, int]) -> str | None:
    """What comes before a sample's id in a path, as ``photos`` in ``photos/rose/1.jpg``."""
    parts = listed.split("/")
    cuts = (k for k in range(1, len(parts)) if "/".join(parts[k:]) in index)
    cut = next(cuts, None)
    return None if cut is None else "/".join(parts[:cut])
