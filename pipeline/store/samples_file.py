"""The samples table as an HDF5 file: ``samples-NNNNNN.h5``."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from pipeline.errors import StoreFormatError
from pipeline.store.hdf5 import build_file, dataset, group, open_file, read_strings, write_strings
from pipeline.store.table import DIGEST_BYTES, SPLIT_NAMES, LabelColumn, SampleTable, Status

KIND = "tlpipe-samples"


def samples_file_bytes(table: SampleTable) -> memoryview:
    """The file that holds ``table``."""
    return build_file(KIND, lambda file: write_table(file, table))


def read_samples_file(path: Path, n: int) -> SampleTable:
    """Read a table of ``n`` samples.

    Raises:
        StoreError: it is not such a file; see :mod:`pipeline.store.hdf5`.
    """
    with open_file(path, KIND) as file:
        return read_table(file, n)


def write_table(target: h5py.Group, table: SampleTable) -> None:
    """Write the columns of ``table`` into a file or a group."""
    write_strings(target, "id", table.ids)
    target["digest"] = table.digests
    target["size"] = table.sizes
    target["mtime_ns"] = table.mtimes
    target["split"] = table.splits
    target["split"].attrs["names"] = np.array(SPLIT_NAMES, "S")
    target["status"] = table.statuses
    target["status"].attrs["names"] = np.array([status.name.lower() for status in Status], "S")
    target["shard"] = table.shards
    target["row"] = table.rows
    labels = target.create_group("labels", track_order=True)
    write_strings(labels, "names", list(table.labels))
    for number, column in enumerate(table.labels.values()):
        written = labels.create_group(str(number))
        write_strings(written, "categories", column.categories)
        written["codes"] = column.codes
    reasons = target.create_group("reasons")
    reasons["sample"] = np.fromiter(table.reasons, np.int64, count=len(table.reasons))
    write_strings(reasons, "text", list(table.reasons.values()))


def read_table(source: h5py.Group, n: int) -> SampleTable:
    """What :func:`write_table` wrote, checked column by column.

    Raises:
        StoreFormatError: a column is missing or not what it should be.
    """
    labels = group(source, "labels")
    names = read_strings(labels, "names")
    columns = {name: _read_labels(labels, str(k), n) for k, name in enumerate(names)}
    reasons = group(source, "reasons")
    samples = dataset(reasons, "sample", np.int64, (None,))[:]
    texts = read_strings(reasons, "text", len(samples))
    table = SampleTable(
        ids=read_strings(source, "id", n),
        digests=dataset(source, "digest", np.uint8, (n, DIGEST_BYTES))[:],
        sizes=dataset(source, "size", np.int64, (n,))[:],
        mtimes=dataset(source, "mtime_ns", np.int64, (n,))[:],
        splits=dataset(source, "split", np.uint8, (n,))[:],
        statuses=dataset(source, "status", np.uint8, (n,))[:],
        shards=dataset(source, "shard", np.int32, (n,))[:],
        rows=dataset(source, "row", np.int32, (n,))[:],
        labels=columns,
        reasons=dict(zip(samples.tolist(), texts, strict=True)),
    )
    where = source.file.filename
    if n and (table.splits.max() >= len(SPLIT_NAMES) or table.statuses.max() >= len(Status)):
        raise StoreFormatError(f"{where} has a split or a status that does not exist.")
    if len(columns) != len(names):
        raise StoreFormatError(f"{where} has two label columns of one name.")
    if len(samples) and not (samples.min() >= 0 and samples.max() < n):
        raise StoreFormatError(f"{where} gives a reason for a sample that it does not hold.")
    return table


def _read_labels(labels: h5py.Group, name: str, n: int) -> LabelColumn:
    column = group(labels, name)
    categories = list(read_strings(column, "categories"))
    codes = dataset(column, "codes", np.int32, (n,))[:]
    if n and (codes.min() < -1 or codes.max() >= len(categories)):
        raise StoreFormatError(f"{labels.file.filename}: a label code has no category.")
    return LabelColumn(categories, codes)
