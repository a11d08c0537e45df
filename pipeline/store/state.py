"""The samples table as it stands: the last one written, brought up to date by the shards' logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from stat import S_ISREG

import numpy as np

from pipeline.errors import CorruptStoreError, TlpipeError
from pipeline.store.hdf5 import not_damage
from pipeline.store.key import file_sha256
from pipeline.store.manifest import FileInfo, Manifest, repair_command
from pipeline.store.samples_file import read_samples_file
from pipeline.store.shard import read_log
from pipeline.store.table import LogEntry, SampleTable

SHARD_FOLDER = "shards"


def shard_path(folder: Path, shard: FileInfo) -> Path:
    """Where a shard is."""
    return folder / SHARD_FOLDER / shard.file


def check_file(path: Path, info: FileInfo) -> None:
    """Compare a file with what was recorded of it when it was committed.

    Raises:
        CorruptStoreError: it is missing or differs.
        ResourceError: it cannot be read now.
        StoreError: it may not be read.
    """
    check_size(path, info)
    try:
        intact = file_sha256(path) == info.sha256
    except OSError as error:
        raise _unreadable(path, error) from error
    if not intact:
        raise CorruptStoreError(_damaged(path, "its sha256 is another"))


def check_size(path: Path, info: FileInfo) -> None:
    """The quick part of :func:`check_file`: whether the file is there and of the right size."""
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not S_ISREG(found.st_mode):
        raise CorruptStoreError(_damaged(path, "it is not a regular file"))
    size_bytes = found.st_size
    if size_bytes != info.size_bytes:
        raise CorruptStoreError(
            _damaged(path, f"{size_bytes:,} bytes on disk, {info.size_bytes:,} recorded")
        )


def _unreadable(path: Path, error: OSError) -> TlpipeError:
    damage = CorruptStoreError(_damaged(path, f"it cannot be read: {error.strerror}"))
    return not_damage(path, error) or damage


def _damaged(path: Path, how: str) -> str:
    folder = path.parent.parent if path.parent.name == SHARD_FOLDER else path.parent
    return (
        f"{path} does not hold the bytes that were committed: {how}.\n"
        "  It was damaged or changed from outside. Set it aside, then run the same tlpipe extract\n"
        "  again, which redoes only what it held:\n"
        f"  {repair_command(folder)}"
    )


def load_table(folder: Path, manifest: Manifest) -> SampleTable:
    """Read the samples table and apply every log that is not yet part of it.

    Raises:
        StoreError: a file is missing, damaged or not what it should be.
    """
    if manifest.samples is None:
        raise CorruptStoreError(f"{folder} has no samples table.")
    path = folder / manifest.samples.file
    check_file(path, manifest.samples)
    table = read_samples_file(path, manifest.samples.n)
    unfolded = [shard for shard in manifest.shards if shard.number > manifest.folded]
    if unfolded:
        index = {sample_id: i for i, sample_id in enumerate(table.ids)}
        for shard in unfolded:
            check_file(shard_path(folder, shard), shard)
            apply_log(table, index, read_log(shard_path(folder, shard)))
    return table


def apply_log(table: SampleTable, index: Mapping[str, int], log: Iterable[LogEntry]) -> None:
    """Write what the log says into the table; samples that it no longer lists are passed over."""
    for entry in log:
        i = index.get(entry.id)
        if i is None:
            continue
        table.digests[i] = np.frombuffer(entry.digest, np.uint8)
        table.sizes[i] = entry.size_bytes
        table.mtimes[i] = entry.mtime_ns
        table.statuses[i] = entry.status
        table.shards[i] = entry.shard
        table.rows[i] = entry.row
        if entry.reason:
            table.reasons[i] = entry.reason
        else:
            table.reasons.pop(i, None)
