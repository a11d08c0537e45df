"""One shard: features by row, and the log of what became of samples since the shard before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreFormatError
from pipeline.store.hdf5 import (
    build_file,
    chunk_rows,
    dataset,
    group,
    open_file,
    read_strings,
    set_text,
    write_strings,
)
from pipeline.store.manifest import FileInfo, LayerInfo, Manifest
from pipeline.store.table import DIGEST_BYTES, LogEntry, Status

KIND = "tlpipe-shard"


def shard_bytes(
    key: str,
    digests: Sequence[bytes],
    features: Mapping[str, NDArray[np.floating]],
    log: Sequence[LogEntry],
) -> memoryview:
    """The file of a shard.

    Args:
        key: the store's recipe key.
        digests: one a row.
        features: (n_rows, n_views, ...) by layer.
        log: what became of which sample.
    """

    def fill(file: h5py.File) -> None:
        set_text(file, "key", key)
        file["digest"] = _digest_array(digests)
        layers = file.create_group("features", track_order=True)
        for name, values in features.items():
            n_rows = len(values)
            chunks = None
            if n_rows:
                row_bytes = values.nbytes // n_rows
                chunks = (chunk_rows(row_bytes, n_rows), *values.shape[1:])
            layers.create_dataset(name, data=values, chunks=chunks)
        entries = file.create_group("log")
        write_strings(entries, "id", [entry.id for entry in log])
        entries["status"] = np.array([entry.status for entry in log], np.uint8)
        entries["digest"] = _digest_array([entry.digest for entry in log])
        entries["size"] = np.array([entry.size_bytes for entry in log], np.int64)
        entries["mtime_ns"] = np.array([entry.mtime_ns for entry in log], np.int64)
        entries["shard"] = np.array([entry.shard for entry in log], np.int32)
        entries["row"] = np.array([entry.row for entry in log], np.int32)
        write_strings(entries, "reason", [entry.reason for entry in log])

    return build_file(KIND, fill)


def read_log(path: Path) -> list[LogEntry]:
    """The log of a shard, in the order in which it was written."""
    with open_file(path, KIND) as file:
        log = group(file, "log")
        ids = read_strings(log, "id")
        n = len(ids)
        statuses = dataset(log, "status", np.uint8, (n,))[:].tolist()
        digests = dataset(log, "digest", np.uint8, (n, DIGEST_BYTES))[:]
        sizes = dataset(log, "size", np.int64, (n,))[:].tolist()
        mtimes = dataset(log, "mtime_ns", np.int64, (n,))[:].tolist()
        shards = dataset(log, "shard", np.int32, (n,))[:].tolist()
        rows = dataset(log, "row", np.int32, (n,))[:].tolist()
        reasons = read_strings(log, "reason", n)
    if not set(statuses) <= set(Status):
        raise StoreFormatError(f"{path} has a status that does not exist.")
    columns = zip(ids, statuses, digests, sizes, mtimes, shards, rows, reasons, strict=True)
    return [
        LogEntry(sample_id, Status(status), digest.tobytes(), *rest)
        for sample_id, status, digest, *rest in columns
    ]


def read_digests(path: Path, shard: FileInfo) -> list[bytes]:
    """The digest of each row of a shard."""
    return [digest.tobytes() for digest in read_digest_array(path, shard)]


def read_digest_array(path: Path, shard: FileInfo) -> NDArray[np.uint8]:
    """(n_rows, 32) the digest of each row of a shard."""
    with open_file(path, KIND) as file:
        digests: NDArray[np.uint8] = dataset(file, "digest", np.uint8, (shard.n, DIGEST_BYTES))[:]
    return digests


@contextmanager
def open_features(
    path: Path, shard: FileInfo, manifest: Manifest
) -> Iterator[dict[str, h5py.Dataset]]:
    """The feature datasets of a shard by layer, each (n_rows, n_views, ...)."""
    with open_file(path, KIND) as file:
        features = group(file, "features")
        yield {
            name: dataset(features, name, layer.dtype, feature_shape(shard.n, manifest, layer))
            for name, layer in manifest.layers.items()
        }


def feature_shape(n_rows: int, manifest: Manifest, layer: LayerInfo) -> tuple[int, ...]:
    """(n_rows, n_views, ...) of one layer."""
    return (n_rows, manifest.n_views, *layer.shape)


def _digest_array(digests: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
