"""Reading a store: ids, labels, splits and features, aligned, as of one moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from h5py import Dataset
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, StoreFormatError, UnknownNameError, UsageError
from pipeline.store.manifest import FileInfo, Manifest, read_manifest
from pipeline.store.pack import open_packed, read_pack
from pipeline.store.shard import open_features, read_digests
from pipeline.store.state import check_file, load_table, shard_path
from pipeline.store.table import SPLIT_NAMES, SampleTable, Status

Indices = NDArray[np.intp]

_SNAPSHOT_TRIES = 20
_STRETCH_BYTES = 16_000_000
_NOWHERE = (-1, -1)


def open_store(path: str | Path) -> Store:
    """Open a feature store for reading; possible at any time, also while it is being written.

    Args:
        path: the store's folder, or a file of ``tlpipe pack``.

    Raises:
        StoreError: there is no store, or it is damaged or of another format.
    """
    return Store(Path(path))


class Store:
    """A consistent snapshot of one feature store.

    Every method that takes ``split`` returns the samples of that split which have features, in the
    data source's order: ids, labels and features of one split are aligned.

    Attributes:
        path: the store's folder, or the packed file.
        manifest: what ``store.json`` held when the store was opened.
        table: the samples table, failed and pending samples included.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_packed = path.is_file()
        self.manifest, self.table = read_pack(path) if self._is_packed else _snapshot(path)
        self._shard_of = self.table.shards.astype(np.intp)
        self._row_of = self.table.rows.astype(np.intp)
        self._use_shards(self.manifest)
        self._check_places()
        if self._is_packed:
            # Rows of one shard are read in one stretch: a whole packed file would be a long one.
            self._shard_of = self._row_of // max(1, _STRETCH_BYTES // self.manifest.row_bytes())

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, n_samples={len(self)}, layers={list(self.layers)})"

    def __len__(self) -> int:
        return self.table.count(Status.OK)

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything that decides a feature's value."""
        return self.manifest.recipe

    @property
    def key(self) -> str:
        """sha256 of the recipe."""
        return self.manifest.key

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shape of one sample's features by layer: (n_features,), or (C, H, W) for maps."""
        return {name: layer.shape for name, layer in self.manifest.layers.items()}

    @property
    def n_views(self) -> int:
        """Views a sample; view 0 is the plain one."""
        return self.manifest.n_views

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Names of the label columns."""
        return tuple(self.table.labels)

    @property
    def source(self) -> dict[str, Any]:
        """name, spec, root, layout and split_origin of the data source."""
        return self.manifest.source

    @property
    def split_origin(self) -> str:
        """How the splits came about."""
        return str(self.source.get("split_origin", ""))

    @property
    def failures(self) -> dict[str, str]:
        """Why a sample has no features, by id."""
        failed = np.flatnonzero(self.table.statuses == Status.FAILED)
        return {self.table.ids[i]: self.table.reasons.get(i, "") for i in failed.tolist()}

    def ids(self, split: str | None = None) -> list[str]:
        """Sample ids."""
        return [self.table.ids[i] for i in self._indices(split).tolist()]

    def labels(self, column: str | None = None, split: str | None = None) -> NDArray[np.object_]:
        """(n,) labels as str, None where missing.

        Args:
            column: label column; may be left out where there is one, or one named "label".
            split: "train", "val", "test" or None for all samples.

        Raises:
            UsageError: the store has no labels, or no such column.
        """
        return self.table.labels[self._column(column)].decode(self._indices(split))

    def splits(self, split: str | None = None) -> NDArray[np.str_]:
        """(n,) split of each sample, "" for none."""
        return np.array(SPLIT_NAMES)[self.table.splits[self._indices(split)]]

    def digests(self, split: str | None = None) -> NDArray[np.str_]:
        """(n,) sha256 of each sample's bytes, 64 hex digits; equal for identical images."""
        digests = self.table.digests[self._indices(split)]
        return np.array([digest.tobytes().hex() for digest in digests], dtype="U64")

    def batches(
        self,
        split: str | None = None,
        layers: Sequence[str] | None = None,
        *,
        column: str | None = None,
        view: int = 0,
        batch_size: int = 4096,
    ) -> Iterator[Batch]:
        """Go once through a split in its order, holding one batch in memory.

        Args:
            split: "train", "val", "test" or None for all samples.
            layers: names of layers; None for all of them.
            column: label column, as in :meth:`labels`; a store without labels gives None each.
            view: 0 is the plain view.
            batch_size: samples a batch; the last one may be smaller.

        Raises:
            UsageError: there is no such split, layer, column or view.
        """
        features = self.features(split, layers, view=view)
        indices = self._indices(split)
        labels = None
        if column is not None or self.label_columns:
            labels = self.table.labels[self._column(column)]
        for start in range(0, len(indices), batch_size):
            here = slice(start, start + batch_size)
            ids = [self.table.ids[int(i)] for i in indices[here]]
            known = [None] * len(ids) if labels is None else labels.decode(indices[here])
            yield Batch(ids, features[here], np.array(known, dtype=object))

    def features(
        self,
        split: str | None = None,
        layers: Sequence[str] | None = None,
        *,
        view: int = 0,
    ) -> FeatureArray:
        """Features of several layers side by side, read when they are indexed.

        Args:
            split: "train", "val", "test" or None for all samples.
            layers: names of layers; None for all of them.
            view: 0 is the plain view.

        Returns:
            (n, n_features) lazily; one unpooled layer alone gives (n, C, H, W).

        Raises:
            UsageError: there is no such split, layer or view.
        """
        names = list(self.layers) if layers is None else list(layers)
        for name in names:
            if name not in self.layers:
                raise UnknownNameError("layer", name, self.layers, f"{self.path} holds no other.")
        if not 0 <= view < self.n_views:
            raise UsageError(f"There is no view {view}: {self.path} holds {self.n_views}.")
        maps = [name for name in names if len(self.layers[name]) != 1]
        if maps and len(names) > 1:
            raise UsageError(
                f"Layer {maps[0]!r} holds maps of shape {self.layers[maps[0]]}, which cannot stand "
                "beside other layers. Ask for one layer at a time."
            )
        return FeatureArray(self, self._indices(split), names, view)

    def _column(self, column: str | None) -> str:
        columns = self.label_columns
        if column is not None:
            if column not in columns:
                raise UnknownNameError("label column", column, columns)
            return column
        if "label" in columns:
            return "label"
        if len(columns) == 1:
            return columns[0]
        if not columns:
            raise UsageError(f"{self.path} has no labels.")
        raise UsageError(f"Say which label column: {', '.join(columns)}.")

    def _indices(self, split: str | None) -> Indices:
        ready = self.table.ready
        if split is None:
            return ready
        if split not in SPLIT_NAMES:
            raise UnknownNameError("split", split, SPLIT_NAMES[1:])
        chosen: Indices = ready[self.table.splits[ready] == SPLIT_NAMES.index(split)]
        return chosen

    def _use_shards(self, manifest: Manifest) -> None:
        """Take rows from the shards of ``manifest``; the bytes of none have been checked yet."""
        self._shards = {shard.number: shard for shard in manifest.shards}
        self._checked: set[int] = set()

    def _check_places(self) -> None:
        """Every sample with features must point to a row that exists."""
        ready = self.table.ready
        shards, rows = self._shard_of[ready], self._row_of[ready]
        numbers = np.array(sorted(self._shards), np.int64)
        n_rows = np.array([self._shards[number].n for number in numbers.tolist()], np.int64)
        at = np.searchsorted(numbers, shards)
        exists = np.isin(shards, numbers) & (rows >= 0)
        if not (exists.all() and (rows < n_rows[at]).all()):
            raise StoreFormatError(
                f"{self.path}: the samples table points to a row that no shard holds."
            )

    def _read_rows(
        self, number: int, rows: Indices, layers: Sequence[str], view: int
    ) -> list[NDArray[np.floating]]:
        """(n, ...) of each layer from one shard."""
        first, last = int(rows.min()), int(rows.max())
        is_whole = np.array_equal(rows, np.arange(first, last + 1))
        with self._open_features(number) as datasets:
            stretches = (datasets[name][first : last + 1, view] for name in layers)
            return [found if is_whole else found[rows - first] for found in stretches]

    def _open_features(self, number: int) -> AbstractContextManager[dict[str, Dataset]]:
        """The datasets of one shard, whose bytes are checked when first used."""
        if self._is_packed:
            return open_packed(self.path, self.manifest)
        shard: FileInfo = self._shards[number]
        path = shard_path(self.path, shard)
        if number not in self._checked:
            check_file(path, shard)
            self._checked.add(number)
        return open_features(path, shard, self.manifest)

    def _follow(self) -> bool:
        """Find the rows again where another process has merged the shards; whether it had.

        Rows are found by the digest of their images: under one recipe equal digests mean equal
        features, wherever they lie.
        """
        if self._is_packed:
            return False
        for _ in range(_SNAPSHOT_TRIES):
            manifest = read_manifest(self.path)
            now = {shard.number for shard in manifest.shards}
            if manifest.key != self.key or self._shards.keys() <= now:
                return False
            try:
                self._move_to(manifest)
            except CorruptStoreError:
                if read_manifest(self.path).shards == manifest.shards:
                    raise
            else:
                return True
        raise CorruptStoreError(f"{self.path} is rewritten faster than it can be read.")

    def _move_to(self, manifest: Manifest) -> None:
        """Take rows from the shards of ``manifest``; those whose shard is gone, by digest.

        A row that is nowhere any more only matters to whoever reads it.
        """
        places = {
            digest: (shard.number, row)
            for shard in manifest.shards
            if shard.number not in self._shards
            for row, digest in enumerate(read_digests(shard_path(self.path, shard), shard))
        }
        shards, rows = self._shard_of.copy(), self._row_of.copy()
        gone = ~np.isin(shards, [shard.number for shard in manifest.shards])
        for i in np.flatnonzero(gone & (self.table.statuses == Status.OK)).tolist():
            shards[i], rows[i] = places.get(self.table.digests[i].tobytes(), _NOWHERE)
        self._shard_of, self._row_of = shards, rows
        self._use_shards(manifest)


class Batch(NamedTuple):
    """Some samples that follow each other in the data source's order.

    Attributes:
        ids: sample ids.
        features: (n, n_features), or (n, C, H, W) for one unpooled layer.
        labels: (n,) str, None where missing.
    """

    ids: list[str]
    features: NDArray[Any]
    labels: NDArray[np.object_]


class FeatureArray:
    """Features of some samples that behave like an (n, n_features) array and are read on demand.

    Index the first axis with an integer, a slice, an index array or a mask to get a numpy array,
    further axes with integers and slices; ``np.asarray`` reads everything. Values have the dtype of
    the store.
    """

    def __init__(self, store: Store, indices: Indices, layers: list[str], view: int) -> None:
        self._store = store
        self._indices = indices
        self._view = view
        self.layers = layers

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, n_features), or (n, C, H, W) for one unpooled layer."""
        shapes = [self._store.layers[name] for name in self.layers]
        if len(shapes) == 1:
            return (len(self), *shapes[0])
        return (len(self), sum(shape[0] for shape in shapes))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The widest dtype of the layers."""
        layers = self._store.manifest.layers
        return np.result_type(*(np.dtype(layers[name].dtype) for name in self.layers))

    def __len__(self) -> int:
        return len(self._indices)

    def __array__(
        self, dtype: np.dtype[Any] | None = None, copy: bool | None = None
    ) -> NDArray[Any]:
        values = self[:]
        return values if dtype is None else values.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        if key is Ellipsis:
            key = slice(None)
        if isinstance(key, tuple):
            plain = all(isinstance(k, int | np.integer | slice) for k in key[1:])
            if not key or key[0] is Ellipsis or not plain:
                raise IndexError(
                    "Features take integers and slices on axes after the first. "
                    "Read the rows first: features[rows][:, columns]"
                )
            one_row = isinstance(key[0], int | np.integer)
            return self[key[0]][key[1:] if one_row else (slice(None), *key[1:])]
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            row: NDArray[Any] = self[[int(key)]][0]
            return row
        chosen = self._indices[key]
        if key is None or isinstance(key, bool | np.bool_) or chosen.ndim != 1:
            raise IndexError(f"Features take no index of this kind: {key!r}")
        while True:
            try:
                return self._read(chosen)
            except CorruptStoreError:
                if not self._store._follow():
                    raise

    def _read(self, chosen: Indices) -> NDArray[Any]:
        """(n, ...) of the samples ``chosen``, shard by shard."""
        shards, rows = self._store._shard_of[chosen], self._store._row_of[chosen]
        if (shards == _NOWHERE[0]).any():
            gone = self._store.table.ids[int(chosen[shards == _NOWHERE[0]][0])]
            raise CorruptStoreError(
                f"{self._store.path}: the row of {gone!r} was removed after the store was opened.\n"
                "  Open it again."
            )
        if len(chosen) and (shards == shards[0]).all():
            return self._read_shard(int(shards[0]), rows)
        out = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        order = np.argsort(shards, kind="stable")
        stops = np.flatnonzero(np.diff(shards[order])) + 1
        for here in np.split(order, stops) if len(order) else []:
            out[here] = self._read_shard(int(shards[here[0]]), rows[here])
        return out

    def _read_shard(self, number: int, rows: Indices) -> NDArray[Any]:
        """(n, ...) of some rows of one shard."""
        parts = self._store._read_rows(number, rows, self.layers, self._view)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _snapshot(path: Path) -> tuple[Manifest, SampleTable]:
    """A manifest and its table; read again where a writer replaced the table in between."""
    for _ in range(_SNAPSHOT_TRIES):
        manifest = read_manifest(path)
        try:
            return manifest, load_table(path, manifest)
        except CorruptStoreError:
            now = read_manifest(path)
            if (now.samples, now.shards) == (manifest.samples, manifest.shards):
                raise
    raise CorruptStoreError(f"{path} is rewritten faster than it can be read.")
