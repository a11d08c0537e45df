"""The samples table as an HDF5 file: ``samples-NNNNNN.h5``."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from pipeline.errors import StoreFormatError
from pipeline.store.hdf5 import build_file, dataset, group, open_file, read_strings, write_strings
from pipeline.store.table import DIGEST_BYTES, SPLIT_NAMES, LabelColumn, SampleTable, Status

KIND = "tlpipe-samples"


def samples_file_bytes(table: SampleTable) -> bytes:
    """The file that holds ``table``."""

    def fill(file: h5py.File) -> None:
        write_strings(file, "id", table.ids)
        file["digest"] = table.digests
        file["size"] = table.sizes
        file["mtime_ns"] = table.mtimes
        file["split"] = table.splits
        file["split"].attrs["names"] = list(SPLIT_NAMES)
        file["status"] = table.statuses
        file["status"].attrs["names"] = [status.name.lower() for status in Status]
        file["shard"] = table.shards
        file["row"] = table.rows
        labels = file.create_group("labels", track_order=True)
        write_strings(labels, "names", list(table.labels))
        for number, column in enumerate(table.labels.values()):
            target = labels.create_group(str(number))
            write_strings(target, "categories", column.categories)
            target["codes"] = column.codes
        reasons = file.create_group("reasons")
        reasons["sample"] = np.fromiter(table.reasons, np.int64, count=len(table.reasons))
        write_strings(reasons, "text", list(table.reasons.values()))

    return build_file(KIND, fill)


def read_samples_file(path: Path, n: int) -> SampleTable:
    """Read a table of ``n`` samples.

    Raises:
        StoreError: it is not such a file; see :mod:`pipeline.store.hdf5`.
    """
    with open_file(path, KIND) as file:
        labels = group(file, "labels")
        names = read_strings(labels, "names")
        columns = {name: _read_labels(labels, str(k), n) for k, name in enumerate(names)}
        reasons = group(file, "reasons")
        samples = dataset(reasons, "sample", np.int64, (None,))[:]
        texts = read_strings(reasons, "text", len(samples))
        table = SampleTable(
            ids=read_strings(file, "id", n),
            digests=dataset(file, "digest", np.uint8, (n, DIGEST_BYTES))[:],
            sizes=dataset(file, "size", np.int64, (n,))[:],
            mtimes=dataset(file, "mtime_ns", np.int64, (n,))[:],
            splits=dataset(file, "split", np.uint8, (n,))[:],
            statuses=dataset(file, "status", np.uint8, (n,))[:],
            shards=dataset(file, "shard", np.int32, (n,))[:],
            rows=dataset(file, "row", np.int32, (n,))[:],
            labels=columns,
            reasons=dict(zip(samples.tolist(), texts, strict=True)),
        )
    if n and (table.splits.max() >= len(SPLIT_NAMES) or table.statuses.max() >= len(Status)):
        raise StoreFormatError(f"{path} has a split or a status that does not exist.")
    return table


def _read_labels(labels: h5py.Group, name: str, n: int) -> LabelColumn:
    column = group(labels, name)
    categories = read_strings(column, "categories")
    codes = dataset(column, "codes", np.int32, (n,))[:]
    if n and (codes.min() < -1 or codes.max() >= len(categories)):
        raise StoreFormatError(f"{labels.file.filename}: a label code has no category.")
    return LabelColumn(categories, codes)
