"""From feature stores to one matrix with labels: what a head is fitted on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.names import counted
from pipeline.errors import (
    DataError,
    MismatchError,
    ResourceError,
    UnknownNameError,
    UsageError,
)
from pipeline.heads.tasks import strata

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.store.reader import FeatureArray

Array = NDArray[Any]

DEFAULT_LAYER = "penultimate"


@dataclass(frozen=True)
class InputBlock:
    """The features that one store gives to a head.

    Attributes:
        store: the store's path, for people.
        key: key of the recipe.
        recipe: everything that decides the features' values.
        source: the store's data source: name, spec, root, layout.
        origin: the arguments of ``load_backbone`` that made the features; provenance.
        dtype: dtype that the features are stored with; fresh features are rounded to it too.
        layers: names of the layers, in the order in which they stand side by side.
        widths: features of each layer.
    """

    store: str
    key: str
    recipe: dict[str, Any]
    source: dict[str, Any]
    origin: dict[str, Any]
    dtype: str
    layers: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    def n_features(self) -> int:
        """Features of all its layers."""
        return sum(self.widths)


@dataclass(frozen=True)
class StoredFeatures:
    """Features of some samples, side by side from one or more stores, read when asked for.

    Attributes:
        stores: where they are.
        layers: names of the layers to take from each store.
        rows: rows of each store, aligned.
    """

    stores: tuple[Store, ...]
    layers: tuple[tuple[str, ...], ...]
    rows: tuple[NDArray[np.intp], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each store."""
        return tuple(
            sum(store.layers[name][0] for name in names)
            for store, names in zip(self.stores, self.layers, strict=True)
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(n_samples, n_features)."""
        return len(self.rows[0]), sum(self.widths)

    def __getitem__(self, samples: NDArray[np.intp]) -> Array:
        """(n, n_features) of some samples, as they are stored."""
        parts = [array[rows[samples]] for array, rows in zip(self._arrays, self.rows, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    @cached_property
    def _arrays(self) -> list[FeatureArray]:
        """The plain view of each store; to make one goes through the table of samples."""
        return [
            store.features(layers=names)
            for store, names in zip(self.stores, self.layers, strict=True)
        ]

    @property
    def dtype(self) -> np.dtype[Any]:
        """What they are stored as."""
        return np.result_type(*(array.dtype for array in self._arrays))

    @property
    def n_views(self) -> int:
        """Views a sample; 1 where the stores differ in it."""
        numbers = {store.n_views for store in self.stores}
        return numbers.pop() if len(numbers) == 1 else 1

    def read(self) -> NDArray[np.float32]:
        """The plain view of all of them: (n_samples, n_features).

        Raises:
            ResourceError: they do not fit into memory.
        """
        return self._read(1)[:, 0]

    def read_views(self) -> NDArray[np.float32]:
        """All of them: (n_samples, n_views, n_features).

        Raises:
            ResourceError: they do not fit into memory.
        """
        return self._read(self.n_views)

    def _read(self, n_views: int) -> NDArray[np.float32]:
        n_samples, n_features = self.shape
        if 4 * n_samples * n_views * n_features > available_bytes():
            raise self._too_large(n_views)
        try:
            X = np.empty((n_samples, n_views, n_features), dtype=np.float32)
            for view in range(n_views):
                start = 0
                for store, names, rows, width in zip(
                    self.stores, self.layers, self.rows, self.widths, strict=True
                ):
                    own = slice(start, start + width)
                    X[:, view, own] = store.features(layers=names, view=view)[rows]
                    start += width
        except MemoryError as error:
            raise self._too_large(n_views) from error
        return X

    def _too_large(self, n_views: int) -> ResourceError:
        n_samples, n_features = self.shape
        views = f"{n_views} views of " if n_views > 1 else ""
        return ResourceError(
            f"{n_samples:,} samples of {views}{n_features:,} features need "
            f"{4e-9 * n_samples * n_views * n_features:.1f} GB of memory, which is not there.\n"
            "  Fit from disk:  tlpipe fit-head --memory-limit 2GB, or use fewer layers:  "
            "--layers penultimate"
        )

    def file_positions(self) -> NDArray[np.intp]:
        """(n_samples,), where each sample comes among all rows of the first store's files."""
        table = self.stores[0].table
        order = np.lexsort((table.rows[table.ready], table.shards[table.ready]))
        positions = np.empty_like(order)
        positions[order] = np.arange(len(order))
        return positions[self.rows[0]]


@dataclass(frozen=True)
class HeadInputs:
    """Labelled features, rows aligned.

    Attributes:
        features: where they are read from, the blocks side by side.
        ids: (n_samples,), sample ids.
        labels: (n_samples,) str; of several columns, what the samples are stratified by.
        splits: (n_samples,), "train", "val" or "test".
        digests: (n_samples, 32) uint8, sha256 of each image.
        blocks: one a store.
        label_column: the column that the labels are from; names of several joined by " + ".
        groups: (n_samples,) str, samples that belong together; None where none were asked for.
        notes: what was left out, and why.
        columns: (n_samples,) labels of each column where there are several, None without one.
    """

    features: StoredFeatures
    ids: Array
    labels: Array
    splits: Array
    digests: NDArray[np.uint8]
    blocks: tuple[InputBlock, ...]
    label_column: str
    groups: Array | None = None
    notes: list[str] = field(default_factory=list)
    columns: Mapping[str, Array] = field(default_factory=dict)

    @cached_property
    def X(self) -> NDArray[np.float32]:  # noqa: N802 - the field's name for a feature matrix
        """(n_samples, n_features), read when first asked for.

        Raises:
            ResourceError: the features do not fit into memory.
        """
        return self.features.read()

    @cached_property
    def X_views(self) -> NDArray[np.float32]:  # noqa: N802
        """(n_samples, n_views, n_features), read when first asked for; view 0 is ``X``.

        Raises:
            ResourceError: the features do not fit into memory.
        """
        return self.features.read_views()

    def matrix(self, with_views: bool) -> NDArray[np.float32]:
        """``X_views`` for a head that learns from views, where there are several; else ``X``."""
        return self.X_views if with_views and self.features.n_views > 1 else self.X

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each layer of each block."""
        return tuple(width for block in self.blocks for width in block.widths)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """One a layer of each block; with the number of its store before it, if several."""
        several = len(self.blocks) > 1
        return tuple(
            f"{number}:{name}" if several else name
            for number, block in enumerate(self.blocks, 1)
            for name in block.layers
        )

    def take(self, layers: Sequence[int]) -> HeadInputs:
        """The same samples with some of the layers.

        Args:
            layers: places in ``layer_names``, in any order; they keep the order of the stores.
        """
        chosen = sorted(set(layers))
        if len(chosen) == len(self.widths):
            return self
        ends = np.cumsum((0, *self.widths))
        blocks, used, first = [], [], 0
        for place, block in enumerate(self.blocks):
            own = [i - first for i in chosen if first <= i < first + len(block.layers)]
            first += len(block.layers)
            if own:
                names = tuple(block.layers[i] for i in own)
                widths = tuple(block.widths[i] for i in own)
                blocks.append(replace(block, layers=names, widths=widths))
                used.append(place)
        features = StoredFeatures(
            tuple(self.features.stores[place] for place in used),
            tuple(block.layers for block in blocks),
            tuple(self.features.rows[place] for place in used),
        )
        taken = replace(self, features=features, blocks=tuple(blocks))
        for name in ("X", "X_views"):
            if name in vars(self):  # no need to read it again
                whole = getattr(self, name)
                parts = [whole[..., ends[i] : ends[i + 1]] for i in chosen]
                vars(taken)[name] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return taken

    def digest(self, column: str | None = None) -> str:
        """sha256 over the sorted (id, digest, label) of the samples.

        Args:
            column: one of several, as if it were learned alone; None for the labels of all.
        """
        labels = list(self.columns.values()) or [self.labels]
        labels = labels if column is None else [self.columns[column]]
        total = hashlib.sha256()
        # Ids are unique: sorted by id is sorted by all three.
        for i in np.argsort(self.ids, kind="stable"):
            if column is not None and self.columns[column][i] is None:
                continue
            row = [str(self.ids[i]), self.digests[i].tobytes().hex()]
            row += ["" if column[i] is None else str(column[i]) for column in labels]
            total.update(json.dumps(row).encode() + b"\n")
        return total.hexdigest()


def load_inputs(
    stores: Sequence[Store],
    *,
    layers: Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    groups: str | None = None,
) -> HeadInputs:
    """Find labelled features in one or more stores, joined by sample.

    Labels and splits are those of the first store. A sample is the same in another store if both
    its id and its image are.

    Args:
        stores: open stores of the same images.
        layers: names of layers; ("all",) for every one; None for "penultimate", or every one
            where there is no such layer.
        label: label column, or several: then a sample needs a label in one of them; None for
            "label", or the only one.
        groups: column of the first store that says which samples belong together.

    Raises:
        UsageError: layers or columns that are not there, or maps that were not pooled.
        DataError: there are no labels.
        MismatchError: the stores share no sample.
    """
    first = stores[0]
    if len({store.path.resolve() for store in stores}) < len(stores):
        raise UsageError("The same store was given twice; its features would only be repeated.")
    chosen = choose_layers(stores, layers)
    names = choose_label_columns(first, label)
    notes = [note for store in stores for note in _missing_notes(store)]
    columns = {name: np.asarray(first.labels(name)) for name in names}
    labels = strata(columns)
    rows = _usable_rows(first, labels, names, notes)
    rows_by_store = _join(stores, rows, notes)
    rows = rows_by_store[0]
    splits = np.asarray(first.splits())[rows]
    if not (splits != "").any():
        splits = np.full(len(rows), "train")
        notes.append("The store has no splits: every sample is taken as train.")
    return HeadInputs(
        features=StoredFeatures(tuple(stores), tuple(chosen), tuple(rows_by_store)),
        ids=np.array(first.ids(), dtype=object)[rows],
        labels=labels[rows],
        splits=splits,
        digests=first.table.digests[first.table.ready[rows]],
        blocks=tuple(_block(store, names) for store, names in zip(stores, chosen, strict=True)),
        label_column=" + ".join(names),
        groups=None if groups is None else _groups(first, groups)[rows],
        notes=notes,
        columns={name: column[rows] for name, column in columns.items()} if len(names) > 1 else {},
    )


def _groups(store: Store, column: str) -> Array:
    """The group of each sample; one that names none is a group of its own."""
    if column not in store.label_columns:
        raise UnknownNameError("group column", column, store.label_columns)
    named = zip(store.labels(column).tolist(), store.ids(), strict=True)
    return np.array(
        [f"= {group}" if group is not None else f"alone {i}" for group, i in named], dtype=object
    )


def _missing_notes(store: Store) -> list[str]:
    """What a user must know who takes the store for the whole data source."""
    n_failed = len(store.failures)
    n_pending = len(store.table) - len(store) - n_failed
    notes = []
    if n_pending:
        notes.append(
            f"Warning: {n_pending:,} of {counted(len(store.table), 'sample')} of {store.path} are "
            "not embedded yet; run the same tlpipe extract again to finish it."
        )
    if n_failed:
        notes.append(
            f"{counted(n_failed, 'sample')} of {store.path} were skipped when it was extracted; "
            f"see  tlpipe inspect {store.path} --failures"
        )
    return notes


def choose_layers(stores: Sequence[Store], layers: Sequence[str] | None) -> list[tuple[str, ...]]:
    """Layers to read from each store.

    Raises:
        UnknownNameError: no store has a layer of that name.
        UsageError: a store has none of the layers, or one of them is not pooled.
    """
    known = {name for store in stores for name in store.layers}
    for name in layers or ():
        if name != "all" and name not in known:
            raise UnknownNameError(
                "layer", name, sorted(known), "tlpipe inspect STORE lists the layers of a store."
            )
    chosen = [_layers_of(store, layers) for store in stores]
    for store, names in zip(stores, chosen, strict=True):
        if not names:
            raise UsageError(
                f"{store.path} has none of the layers {', '.join(layers or ())}; "
                f"it has: {', '.join(store.layers)}."
            )
        for name in names:
            if len(store.layers[name]) != 1:
                raise UsageError(
                    f"Layer {name!r} of {store.path} holds maps of shape {store.layers[name]}, "
                    "but a head takes one row of numbers a sample.\n"
                    "  Extract it pooled:  tlpipe extract … --pooling avg"
                )
    return chosen


def _layers_of(store: Store, layers: Sequence[str] | None) -> tuple[str, ...]:
    if layers is None:
        layers = [DEFAULT_LAYER] if DEFAULT_LAYER in store.layers else ["all"]
    if "all" in layers:
        return tuple(store.layers)
    return tuple(dict.fromkeys(name for name in layers if name in store.layers))


def choose_label_column(store: Store, label: str | None) -> str:
    """The label column to learn.

    Raises:
        DataError: the store has no labels.
        UsageError: there is no such column, or several and none is called "label".
    """
    columns = store.label_columns
    if not columns:
        raise DataError(
            f"{store.path} has no labels, so there is nothing to learn.\n"
            "  Sort the images into one folder a class, or list them in a CSV file with the "
            "columns path and label,\n  and extract again."
        )
    if label is not None and label not in columns:
        raise UnknownNameError("label column", label, columns)
    if label is not None:
        return label
    if "label" in columns or len(columns) == 1:
        return "label" if "label" in columns else columns[0]
    raise UsageError(
        f"{store.path} has several label columns: {', '.join(columns)}.\n"
        f"  Say which one to learn:  --label {columns[0]}"
    )


def choose_label_columns(store: Store, label: str | Sequence[str] | None) -> tuple[str, ...]:
    """The label columns to learn; see :func:`choose_label_column`.

    Raises:
        DataError, UsageError: as there, or a column was named twice.
    """
    if label is None or isinstance(label, str):
        return (choose_label_column(store, label),)
    names = tuple(choose_label_column(store, name) for name in label)
    if len(set(names)) < len(names):
        raise UsageError(f"A label column was named twice: {', '.join(names)}.")
    return names


def _usable_rows(
    store: Store, labels: Array, columns: Sequence[str], notes: list[str]
) -> NDArray[np.intp]:
    """Rows with a label and, where any sample has a split, with a split."""
    where = f"column {' or '.join(map(repr, columns))}"
    labelled = np.array([value is not None for value in labels], dtype=bool)
    if not labelled.any():
        raise DataError(f"No sample of {store.path} with features has a label in {where}.")
    if not labelled.all():
        notes.append(
            f"{(~labelled).sum():,} of {counted(len(labels), 'sample')} without a label in "
            f"{where}: left out."
        )
    splits = np.asarray(store.splits())
    without_split = labelled & (splits == "")
    if without_split.any() and (splits != "").any():
        labelled &= ~without_split
        n_samples = int(without_split.sum())
        notes.append(f"{counted(n_samples, 'sample')} in no split: left out.")
    rows: NDArray[np.intp] = np.flatnonzero(labelled)
    return rows


def _join(
    stores: Sequence[Store], rows: NDArray[np.intp], notes: list[str]
) -> list[NDArray[np.intp]]:
    """Rows of each store that hold the same samples in the same order."""
    if len(stores) == 1:
        return [rows]
    first = stores[0]
    samples = _samples(first)
    places = [{sample: row for row, sample in enumerate(_samples(s))} for s in stores[1:]]
    shared = [row for row in rows if all(samples[row] in place for place in places)]
    if not shared:
        others = ", ".join(str(store.path) for store in stores[1:])
        raise MismatchError(
            f"{first.path} and {others} share no labelled sample: neither id nor image agree.\n"
            "  Stores are joined by sample; extract them from the same data source."
        )
    if len(shared) < len(rows):
        notes.append(
            f"{len(rows) - len(shared):,} of {counted(len(rows), 'sample')} not in every store: "
            "left out."
        )
    kept = np.array(shared, dtype=np.intp)
    return [kept, *(np.array([place[samples[row]] for row in kept], np.intp) for place in places)]


def _samples(store: Store) -> list[tuple[str, str]]:
    return list(zip(store.ids(), store.digests().tolist(), strict=True))


def _block(store: Store, names: tuple[str, ...]) -> InputBlock:
    return InputBlock(
        store=str(store.path),
        key=store.key,
        recipe=store.recipe,
        source={name: value for name, value in store.source.items() if name != "root"},
        origin=dict(store.manifest.provenance.get("backbone", {})),
        dtype=str(store.features(layers=names).dtype),
        layers=names,
        widths=tuple(store.layers[name][0] for name in names),
    )


def available_bytes() -> float:
    """Memory that this process could still take; infinity where the system does not say."""
    found = [math.inf]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found += [
            1024.0 * int(line.split()[1])
            for line in meminfo.read_text().splitlines()
            if line.startswith("MemAvailable:")
        ]
    return min(found)
