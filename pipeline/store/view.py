"""``features.h5``: every feature, id, label and split of a store for plain h5py, without copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ResourceError, StoreError
from pipeline.store.durable import remove, write_durably
from pipeline.store.hdf5 import attribute, build_file, open_file, set_text
from pipeline.store.key import canonical_json
from pipeline.store.manifest import LayerInfo, Manifest
from pipeline.store.shard import feature_shape
from pipeline.store.state import SHARD_FOLDER
from pipeline.store.table import SPLIT_NAMES, SampleTable

VIEW_FILE = "features.h5"
KIND = "tlpipe-view"

# A virtual data set is a list of runs; past this many, HDF5 takes longer to open it than to read.
MAX_RUNS = 50_000
# HDF5 keeps every shard open that a virtual data set is read from, and shows NaN, without a word,
# for those that it cannot open: many systems allow a process no more than 1,024 files.
MAX_SHARDS = 256
# Other releases of HDF5 may lay the same file out in other bytes.
WRITTEN_WITH = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"


def write_view(folder: Path, manifest: Manifest, table: SampleTable) -> None:
    """Write ``features.h5``; it is removed where there is a :func:`hindrance`."""
    data = view_bytes(manifest, table)
    if data is None:
        remove(folder / VIEW_FILE)
    else:
        write_durably(folder / VIEW_FILE, data)


def view_bytes(manifest: Manifest, table: SampleTable) -> memoryview | None:
    """The file that shows ``table``; None where there is a :func:`hindrance`."""
    ready = table.ready
    runs = _runs(table.shards[ready], table.rows[ready])
    if _hindrance(manifest, runs):
        return None

    def fill(file: h5py.File) -> None:
        set_text(file, "key", manifest.key)
        set_text(file, "samples", "" if manifest.samples is None else manifest.samples.sha256)
        set_text(file, "written_with", WRITTEN_WITH)
        set_text(file, "recipe", canonical_json(manifest.recipe).decode())
        write_columns(file, table)
        features = file.create_group("features", track_order=True)
        for name, layer in manifest.layers.items():
            layout = _layout(manifest, name, layer, runs, len(ready))
            # Where HDF5 cannot open a shard it says nothing: better NaN than zeros.
            features.create_virtual_dataset(name, layout, fillvalue=np.nan)

    return build_file(KIND, fill)


def hindrance(manifest: Manifest, table: SampleTable) -> str:
    """Why a store has no ``features.h5``; "" where nothing stands in its way."""
    ready = table.ready
    return _hindrance(manifest, _runs(table.shards[ready], table.rows[ready]))


def _hindrance(manifest: Manifest, runs: Sequence[tuple[int, int, int, int]]) -> str:
    n_shards = len({shard for _, _, shard, _ in runs})
    if n_shards > MAX_SHARDS:
        return f"features lie in {n_shards:,} shards, more than a program may have open at once"
    if len(runs) * len(manifest.layers) > MAX_RUNS:
        return f"rows lie scattered over {len(runs):,} places, which HDF5 takes too long to find"
    return ""


def write_columns(file: h5py.File, table: SampleTable) -> None:
    """Write id, split and labels of the samples that have features, as text for any reader."""
    ready = table.ready
    text = h5py.string_dtype()
    ids = [_without_nul(table.ids[i]) for i in ready]
    file.create_dataset("id", data=ids, dtype=text, shape=ready.shape)
    names = np.array(SPLIT_NAMES, dtype=object)
    file.create_dataset("split", data=names[table.splits[ready]], dtype=text)
    for name, column in table.labels.items():
        labels = ["" if label is None else _without_nul(label) for label in column.decode(ready)]
        file.create_dataset(_label_path(name), data=labels, dtype=text, shape=ready.shape)


def _label_path(column: str) -> str:
    """Where a label column is; ``/`` and ``.`` mean something to HDF5 and are escaped."""
    name = _without_nul(column).replace("/", "%2F")
    return "label/" + (name.replace(".", "%2E") if set(name) <= {"."} else name)


def _without_nul(text: str) -> str:
    """HDF5 ends a string at a NUL."""
    return text.replace("\0", "\\0")


def view_is_current(folder: Path, manifest: Manifest) -> bool:
    """Whether ``features.h5`` shows the samples table that ``store.json`` names."""
    try:
        with open_file(folder / VIEW_FILE, KIND) as file:
            return manifest.samples is not None and bool(
                attribute(file, "samples") == manifest.samples.sha256
            )
    except (StoreError, ResourceError):
        return False


def _runs(shards: NDArray[np.int32], rows: NDArray[np.int32]) -> list[tuple[int, int, int, int]]:
    """(start, stop, shard, first row) of each stretch of samples whose rows follow each other."""
    if not len(shards):
        return []
    breaks = np.flatnonzero((np.diff(shards) != 0) | (np.diff(rows) != 1)) + 1
    starts = np.concatenate([[0], breaks])
    stops = np.concatenate([breaks, [len(shards)]])
    return [
        (int(start), int(stop), int(shards[start]), int(rows[start]))
        for start, stop in zip(starts, stops, strict=True)
    ]


def _layout(
    manifest: Manifest,
    name: str,
    layer: LayerInfo,
    runs: list[tuple[int, int, int, int]],
    n_samples: int,
) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout(
        shape=feature_shape(n_samples, manifest, layer), dtype=np.dtype(layer.dtype)
    )
    sources = {
        shard.number: h5py.VirtualSource(
            f"{SHARD_FOLDER}/{shard.file}",
            f"features/{name}",
            shape=feature_shape(shard.n, manifest, layer),
            dtype=np.dtype(layer.dtype),
        )
        for shard in manifest.shards
    }
    for start, stop, number, row in runs:
        layout[start:stop] = sources[number][row : row + stop - start]
    return layout
