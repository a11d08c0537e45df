"""From feature stores to one matrix with labels: what a head is fitted on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
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

if TYPE_CHECKING:
    from pipeline.store import Store

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
class HeadInputs:
    """Labelled features, rows aligned.

    Attributes:
        X: (n_samples, n_features) float32, the blocks side by side.
        ids: (n_samples,), sample ids.
        labels: (n_samples,) str.
        splits: (n_samples,), "train", "val" or "test".
        digests: (n_samples,), sha256 of each image.
        blocks: one a store.
        label_column: the column that the labels are from.
        notes: what was left out, and why.
    """

    X: NDArray[np.float32]
    ids: Array
    labels: Array
    splits: Array
    digests: Array
    blocks: tuple[InputBlock, ...]
    label_column: str
    notes: list[str] = field(default_factory=list)

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of each layer of each block."""
        return tuple(width for block in self.blocks for width in block.widths)

    def digest(self) -> str:
        """sha256 over the sorted (id, digest, label) of the samples."""
        total = hashlib.sha256()
        for row in sorted(zip(self.ids, self.digests, self.labels, strict=True)):
            total.update(json.dumps([str(value) for value in row]).encode() + b"\n")
        return total.hexdigest()


def load_inputs(
    stores: Sequence[Store], *, layers: Sequence[str] | None = None, label: str | None = None
) -> HeadInputs:
    """Read labelled features from one or more stores, joined by sample.

    Labels and splits are those of the first store. A sample is the same in another store if both
    its id and its image are.

    Args:
        stores: open stores of the same images.
        layers: names of layers; ("all",) for every one; None for "penultimate", or every one
            where there is no such layer.
        label: label column; None for "label", or the only one.

    Raises:
        UsageError: layers or label column that are not there, or maps that were not pooled.
        DataError: there are no labels.
        MismatchError: the stores share no sample.
        ResourceError: the features do not fit into memory.
    """
    first = stores[0]
    if len({store.path.resolve() for store in stores}) < len(stores):
        raise UsageError("The same store was given twice; its features would only be repeated.")
    chosen = choose_layers(stores, layers)
    column = choose_label_column(first, label)
    notes = [note for store in stores for note in _missing_notes(store)]
    labels = first.labels(column)
    rows = _usable_rows(first, labels, column, notes)
    rows_by_store = _join(stores, rows, notes)
    rows = rows_by_store[0]
    splits = np.asarray(first.splits())[rows]
    if not (splits != "").any():
        splits = np.full(len(rows), "train")
        notes.append("The store has no splits: every sample is taken as train.")
    return HeadInputs(
        X=_read(stores, chosen, rows_by_store),
        ids=np.array(first.ids(), dtype=object)[rows],
        labels=labels[rows],
        splits=splits,
        digests=np.asarray(first.digests())[rows],
        blocks=tuple(_block(store, names) for store, names in zip(stores, chosen, strict=True)),
        label_column=column,
        notes=notes,
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


def _usable_rows(store: Store, labels: Array, column: str, notes: list[str]) -> NDArray[np.intp]:
    """Rows with a label and, where any sample has a split, with a split."""
    labelled = np.array([value is not None for value in labels], dtype=bool)
    if not labelled.any():
        raise DataError(
            f"No sample of {store.path} with features has a label in column {column!r}."
        )
    if not labelled.all():
        notes.append(
            f"{(~labelled).sum():,} of {counted(len(labels), 'sample')} without a label in column "
            f"{column!r}: left out."
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


def _read(
    stores: Sequence[Store],
    layers: Sequence[tuple[str, ...]],
    rows_by_store: Sequence[NDArray[np.intp]],
) -> NDArray[np.float32]:
    widths = [
        sum(store.layers[name][0] for name in names)
        for store, names in zip(stores, layers, strict=True)
    ]
    shape = (len(rows_by_store[0]), sum(widths))
    try:
        X = np.empty(shape, dtype=np.float32)
        start = 0
        for store, names, rows, width in zip(stores, layers, rows_by_store, widths, strict=True):
            X[:, start : start + width] = store.features(layers=names)[rows]
            start += width
    except MemoryError as error:
        raise ResourceError(
            f"{shape[0]:,} samples of {shape[1]:,} features need "
            f"{4e-9 * shape[0] * shape[1]:.1f} GB of memory, which is not there.\n"
            "  Use fewer layers:  --layers penultimate"
        ) from error
    return X


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
