"""Features for other tools: numpy arrays and CSV; ``pipeline.commands.parquet`` writes Parquet."""

from __future__ import annotations

import csv
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.store.durable import TEMPORARY_SUFFIX, sync_folder, write_error
from pipeline.store.pack import BATCH_BYTES, check_new, new_file
from pipeline.store.reader import FeatureArray, Store

SAMPLES_FILE = "samples.csv"


class Selection:
    """Samples of a store and some of their layers, as other tools want to have them.

    Attributes:
        layers: (n, ...) of each layer, plain view, read when it is indexed.
        columns: of n texts each: id, split and the labels; None for no split and for no label. A
            label column of which the name is taken is called ``label_<name>``.

    Args:
        store: where they are from.
        layers: names of layers; None for all of them.
        split: "train", "val", "test" or None for all samples.

    Raises:
        UsageError: there is no such layer or split, or no sample in it.
    """

    def __init__(
        self, store: Store, layers: Sequence[str] | None = None, split: str | None = None
    ) -> None:
        names = list(dict.fromkeys(store.layers if layers is None else layers))
        self.layers: dict[str, FeatureArray] = {
            name: store.features(split, [name]) for name in names
        }
        self.columns: dict[str, Sequence[str | None]] = {
            "id": store.ids(split),
            "split": [name or None for name in store.splits(split).tolist()],
        }
        if not len(self):
            where = "" if split is None else f" in split {split!r}"
            raise UsageError(f"{store.path} has no sample with features{where}.")
        for column in store.label_columns:
            name = column
            while name in self.columns or name in self.layers:
                name = f"label_{name}"
            self.columns[name] = store.labels(column, split).tolist()

    def __len__(self) -> int:
        return len(self.columns["id"])

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample's layers, as float32."""
        return sum(4 * int(np.prod(layer.shape[1:])) for layer in self.layers.values())

    def stretches(self) -> Iterator[slice]:
        """Samples that follow each other, few enough to be held in memory."""
        n_batch = max(1, BATCH_BYTES // self.row_bytes)
        for start in range(0, len(self), n_batch):
            yield slice(start, min(start + n_batch, len(self)))

    def rows(self, layer: str, here: slice) -> NDArray[np.float32]:
        """(n, n_features) of one layer; maps are flattened, row by row of each channel."""
        values = self.layers[layer][here]
        return values.reshape(len(values), -1).astype(np.float32)


def export_csv(selection: Selection, path: Path) -> None:
    """Write ids, splits, labels and features f0, f1, ... as CSV (RFC 4180, UTF-8).

    Numbers are written so that they are read back exactly, texts as they are: one that begins with
    ``=`` is a formula to a spreadsheet that opens the file.

    Raises:
        UsageError: ``path`` exists.
        StoreError: the folder cannot be written to.
        ResourceError: the disk is full or fails.
    """
    _write_csv(path, _csv_header(selection), _csv_rows(selection))


def _csv_header(selection: Selection) -> list[str]:
    header = list(selection.columns)
    for name, layer in selection.layers.items():
        prefix = "" if len(selection.layers) == 1 else f"{name}_"
        header += [f"{prefix}f{k}" for k in range(int(np.prod(layer.shape[1:])))]
    return header


def _csv_rows(selection: Selection) -> Iterator[Iterable[Any]]:
    for here in selection.stretches():
        columns = [column[here] for column in selection.columns.values()]
        rows = np.concatenate([selection.rows(name, here) for name in selection.layers], axis=1)
        for texts, numbers in zip(zip(*columns, strict=True), rows.tolist(), strict=True):
            yield [*texts, *numbers]


def export_npy(selection: Selection, folder: Path) -> None:
    """Write ``<layer>.npy`` for each layer, and ``samples.csv``, in a new folder.

    Arrays keep the dtype and shape of the store: (n, n_features), or (n, C, H, W) for maps. Row i
    belongs to line i of ``samples.csv``, not counting its header.

    Raises:
        UsageError: ``folder`` exists.
        StoreError: the folder cannot be written to.
        ResourceError: the disk is full or fails.
    """
    check_new(folder)
    unfinished = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        unfinished.mkdir()
        for name, layer in selection.layers.items():
            _write_npy(unfinished / npy_name(name), layer, selection.stretches())
        samples = zip(*selection.columns.values(), strict=True)
        _write_csv(unfinished / SAMPLES_FILE, list(selection.columns), samples)
        check_new(folder)  # another process may have been quicker
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def npy_name(layer: str) -> str:
    """The file of a layer, whose name may hold what a file's name may not."""
    return f"{quote(layer, safe='')}.npy"


def _write_npy(path: Path, layer: FeatureArray, stretches: Iterable[slice]) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(layer.dtype),
        "fortran_order": False,
        "shape": layer.shape,
    }
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for here in stretches:
            file.write(layer[here].tobytes())


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file; None is an empty cell."""
    with (
        new_file(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
