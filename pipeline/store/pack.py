"""A packed file: a whole store as one ordinary HDF5 file, which every HDF5 reader understands.

At its top stand the ids, splits, labels and features of the samples that have features, as in
``features.h5``. The group ``tlpipe`` holds what it takes to make a store of it again: the samples
table, and a manifest in which the features are the rows of one shard.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, StoreError, StoreFormatError, UsageError
from pipeline.store.durable import replacing, write_error
from pipeline.store.hdf5 import chunk_rows, dataset, group, open_file, set_text, write_file
from pipeline.store.key import canonical_json, open_regular
from pipeline.store.manifest import (
    MAX_MANIFEST_BYTES,
    FileInfo,
    Manifest,
    is_store,
    parse_manifest,
)
from pipeline.store.samples_file import read_table, write_table
from pipeline.store.shard import feature_shape
from pipeline.store.table import DIGEST_BYTES, SampleTable
from pipeline.store.view import write_columns

if TYPE_CHECKING:
    from pipeline.store.reader import Store

KIND = "tlpipe-pack"

# The number of the one shard that the features are.
_SHARD = 1

# Of any HDF5 file: no shard is smaller, though it has no row.
_SUPERBLOCK_BYTES = 48
BATCH_BYTES = 16_000_000


def pack_store(store: Store, path: Path) -> None:
    """Write ``store`` as one HDF5 file, holding one batch of its features in memory.

    Args:
        store: what to write; failed and pending samples are kept too.
        path: a new file; it is there once it is complete, and not before.

    Raises:
        UsageError: ``path`` exists, or lies within the store.
        StoreError: the store is damaged, or the folder cannot be written to.
        ResourceError: the disk is full or fails.
    """
    if store.path.resolve() in path.resolve().parents:
        raise UsageError(f"{path} lies within the store, which holds no files but its own.")
    with new_file(path) as temporary, _Output(temporary, "w+") as output:
        write_file(output, KIND, lambda file: _fill(file, store, output))
        output.check()
        _seal(temporary, output)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to fill, which is put at ``path`` when the block ends well and nothing came there.

    Raises:
        UsageError: there is something at ``path``, perhaps only since the block began.
        StoreError: the folder cannot be made or written to.
        ResourceError: the disk is full or fails.
    """
    check_new(path)
    try:
        with replacing(path, unique=True) as temporary:
            yield temporary
    except FileExistsError as error:
        raise exists_error(path) from error


def check_new(path: Path) -> None:
    """See that nothing is at ``path`` and that it can be written; make the folder around it.

    Raises:
        UsageError: there is something.
        StoreError: the folder cannot be made or written to.
    """
    if os.path.lexists(path):
        raise exists_error(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{path} cannot be written: {path.parent} is not a folder.") from error
    except OSError as error:
        raise write_error(path, error) from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StoreError(
            f"{path} cannot be written: the permissions of {path.parent} forbid it.\n"
            "  Give another path, or change them."
        )


def exists_error(path: Path) -> UsageError:
    """What to say where something is that is not replaced."""
    return UsageError(
        f"{path} exists already; nothing was overwritten.\n"
        "  Give another name, or move it away first."
    )


class _Output(io.FileIO):
    """A file whose failures are kept from HDF5, which would crash the process on its way out.

    After the first one nothing more is written, and :meth:`check` raises it.
    """

    _failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of ``data``; HDF5 would take a short write for a whole one."""
        left = memoryview(data).cast("B")
        size_bytes = len(left)
        while self._failure is None and len(left):
            try:
                left = left[super().write(left) :]
            except OSError as error:
                self._failure = error
        return size_bytes

    def truncate(self, size: int | None = None, /) -> int:
        """Set the file's size."""
        try:
            return super().truncate(size) if self._failure is None else 0
        except OSError as error:
            self._failure = error
            return 0

    def check(self) -> None:
        """Raise the failure that was kept back."""
        if self._failure is not None:
            raise self._failure


def _fill(file: h5py.File, store: Store, output: _Output) -> None:
    manifest, n_rows = store.manifest, len(store)
    set_text(file, "key", manifest.key)
    set_text(file, "recipe", canonical_json(manifest.recipe).decode())
    set_text(file, "source", canonical_json(manifest.source).decode())
    write_columns(file, store.table)
    features = file.create_group("features", track_order=True)
    digests = {name: _write_layer(features, store, name, output) for name in manifest.layers}
    ours = file.create_group("tlpipe")
    samples = ours.create_group("samples")
    table = _packed_table(store.table)
    write_table(samples, table)
    packed = replace(
        manifest,
        samples=FileInfo(
            f"samples-{_SHARD:06d}.h5", table_sha256(table), _stored_bytes(samples), len(table)
        ),
        shards=(
            FileInfo(
                f"{_SHARD:06d}.h5",
                features_sha256(digests),
                _SUPERBLOCK_BYTES + n_rows * (manifest.row_bytes() + DIGEST_BYTES),
                n_rows,
            ),
        ),
        folded=_SHARD,
        next_shard=_SHARD + 1,
    )
    ours["manifest"] = np.frombuffer(canonical_json(packed.to_json()), np.uint8)
    ours["sha256"] = np.zeros(DIGEST_BYTES, np.uint8)


def _seal(path: Path, output: _Output) -> None:
    """Put the sha256 of the whole file into it, where there are zeros so far."""
    with open_file(path, KIND) as file:
        offset = file["tlpipe/sha256"].id.get_offset()
    output.seek(0)
    digest = hashlib.file_digest(output, "sha256").digest()
    output.seek(offset)
    output.write(digest)
    output.check()


def _write_layer(features: h5py.Group, store: Store, layer: str, output: _Output) -> str:
    """Write one layer, and return the sha256 of its values."""
    n_rows = len(store)
    info = store.manifest.layers[layer]
    shape = feature_shape(n_rows, store.manifest, info)
    row_bytes = math.prod(shape[1:]) * np.dtype(info.dtype).itemsize
    n_chunk = chunk_rows(row_bytes, n_rows)
    written = features.create_dataset(
        layer,
        shape,
        info.dtype,
        chunks=(n_chunk, *shape[1:]) if n_rows else None,
        fletcher32=n_rows > 0,
    )
    total = hashlib.sha256()
    # Whole chunks: HDF5 would read a part of one back to add to it.
    n_batch = n_chunk * max(1, BATCH_BYTES // (n_chunk * row_bytes))
    for start in range(0, n_rows, n_batch):
        rows = read_rows(store, layer, slice(start, start + n_batch))
        written[start : start + n_batch] = rows
        total.update(rows.tobytes())
        output.check()
    set_text(written, "sha256", total.hexdigest())
    return total.hexdigest()


def read_rows(store: Store, layer: str, here: slice) -> NDArray[np.floating]:
    """(n, n_views, ...) of one layer of the samples that have features."""
    views = [store.features(layers=[layer], view=view)[here] for view in range(store.n_views)]
    return np.stack(views, axis=1)


def _packed_table(table: SampleTable) -> SampleTable:
    """The same samples; each that has features has the row at which it stands among those."""
    ready = table.ready
    shards = np.full(len(table), -1, np.int32)
    rows = shards.copy()
    shards[ready] = _SHARD
    rows[ready] = np.arange(len(ready))
    return replace(table, shards=shards, rows=rows)


def _stored_bytes(written: h5py.Group) -> int:
    sizes: list[int] = []

    def add(_: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            sizes.append(item.id.get_storage_size())

    written.visititems(add)
    return sum(sizes)


def table_sha256(table: SampleTable) -> str:
    """sha256 over everything that a samples table says."""
    texts = [
        list(table.ids),
        [[name, column.categories] for name, column in table.labels.items()],
        sorted(table.reasons.items()),
    ]
    columns: tuple[NDArray[Any], ...] = (
        table.digests, table.sizes, table.mtimes, table.splits, table.statuses, table.shards,
        table.rows, *(column.codes for column in table.labels.values()),
    )  # fmt: skip
    total = hashlib.sha256(canonical_json(texts))
    for column in columns:
        total.update(column.tobytes())
    return total.hexdigest()


def features_sha256(digests: Mapping[str, str]) -> str:
    """One sha256 for those of the values of each layer."""
    return hashlib.sha256(canonical_json(dict(digests))).hexdigest()


def read_pack(path: Path) -> tuple[Manifest, SampleTable]:
    """The manifest and the samples table of a packed file, checked.

    Raises:
        StoreFormatError: it is not a packed file, or of a version this release does not read.
        CorruptStoreError: what is read is not what was written.
    """
    if is_store(path.parent):
        raise StoreFormatError(
            f"{path} is a part of a feature store. Give the folder:  "
            f"tlpipe inspect {shlex.quote(str(path.parent))}"
        )
    if not h5py.is_hdf5(path):
        raise StoreFormatError(
            f"{path} is not a feature store: neither a folder with a store.json nor a file of "
            "tlpipe pack.\n  List the stores of the cache:  tlpipe ls"
        )
    with _opened(path) as file:
        manifest = _read_manifest(path, file)
        _feature_datasets(file, manifest)
        assert manifest.samples is not None
        table = read_table(group(group(file, "tlpipe"), "samples"), manifest.samples.n)
        if table_sha256(table) != manifest.samples.sha256:
            raise CorruptStoreError(f"{path}: the samples table is not the one that was written.")
    ready = table.ready
    if len(ready) != manifest.shards[0].n or not (
        np.array_equal(table.rows[ready], np.arange(len(ready)))
        and (table.shards[ready] == _SHARD).all()
    ):
        raise StoreFormatError(f"{path}: the samples do not stand in the order of the features.")
    return manifest, table


@contextmanager
def open_packed(path: Path, manifest: Manifest) -> Iterator[dict[str, h5py.Dataset]]:
    """The feature datasets of a packed file by layer, each (n_rows, n_views, ...).

    HDF5 compares each chunk with its checksum when it is read.

    Raises:
        CorruptStoreError: damaged, or not the file any more of which ``manifest`` was read.
    """
    with _opened(path) as file:
        if _read_manifest(path, file) != manifest:
            raise CorruptStoreError(f"{path} was replaced after it was opened.")
        yield _feature_datasets(file, manifest)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with open_file(path, KIND) as file:
            yield file
    except CorruptStoreError as error:
        raise CorruptStoreError(f"{error}\n{_remedy(path)}") from error


def _remedy(path: Path) -> str:
    return (
        "  If it is damaged, remove it and make it again from its store:\n"
        f"  tlpipe pack STORE {shlex.quote(str(path))}"
    )


def _read_manifest(path: Path, file: h5py.File) -> Manifest:
    stored = dataset(group(file, "tlpipe"), "manifest", np.uint8, (None,))
    if len(stored) > MAX_MANIFEST_BYTES:
        raise StoreFormatError(f"{path}: the manifest has {len(stored):,} bytes.")
    manifest = parse_manifest(path, stored[:].tobytes())
    if manifest.samples is None or [shard.number for shard in manifest.shards] != [_SHARD]:
        raise StoreFormatError(f"{path}: the manifest is not that of a packed file.")
    return manifest


def _feature_datasets(file: h5py.File, manifest: Manifest) -> dict[str, h5py.Dataset]:
    features, n_rows = group(file, "features"), manifest.shards[0].n
    return {
        name: dataset(
            features,
            name,
            layer.dtype,
            feature_shape(n_rows, manifest, layer),
            checksums=n_rows > 0,
        )
        for name, layer in manifest.layers.items()
    }


def pack_problems(path: Path, *, content: bool) -> list[str]:
    """What is wrong with a packed file, in words; nothing where it is intact.

    Args:
        path: the file.
        content: read every byte, too, and compare them with what was written.
    """
    try:
        manifest, _ = read_pack(path)
        if not content:
            return []
        with _opened(path) as file:
            seal = dataset(group(file, "tlpipe"), "sha256", np.uint8, (DIGEST_BYTES,))
            recorded, offset = seal[:].tobytes(), seal.id.get_offset()
        if offset is None or _unsealed_sha256(path, offset) != recorded:
            return [f"{path} does not hold the bytes that were written.\n{_remedy(path)}"]
        with _opened(path) as file:
            layers = _feature_datasets(file, manifest)
            return [
                f"{path}: features/{name} holds NaN or infinity."
                for name, layer in layers.items()
                if not _is_finite(layer)
            ]
    except StoreError as error:
        said = str(error)
        return [said if "tlpipe " in said else f"{said}\n{_remedy(path)}"]


def _unsealed_sha256(path: Path, offset: int) -> bytes:
    """sha256 of a file as it was before it was sealed: with zeros for the seal at ``offset``."""
    total = hashlib.sha256()
    try:
        with open_regular(path) as file:
            _feed(total, file, offset)
            total.update(bytes(len(file.read(DIGEST_BYTES))))
            _feed(total, file, math.inf)
    except OSError as error:
        raise CorruptStoreError(f"{path} cannot be read ({error.strerror}).") from error
    return total.digest()


def _feed(total: hashlib._Hash, file: io.BufferedReader, n_bytes: float) -> None:
    while n_bytes and (data := file.read(int(min(n_bytes, 1 << 20)))):
        total.update(data)
        n_bytes -= len(data)


def _is_finite(layer: h5py.Dataset) -> bool:
    row_bytes = math.prod(layer.shape[1:]) * layer.dtype.itemsize
    n_batch = max(1, BATCH_BYTES // row_bytes)
    starts = range(0, len(layer), n_batch)
    return all(np.isfinite(layer[start : start + n_batch]).all() for start in starts)
