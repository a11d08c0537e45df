"""Whether ``features.h5`` shows the samples table that it was made from, to the last byte."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.errors import CorruptStoreError
from pipeline.store.hdf5 import FORMAT_VERSION, attribute, open_file
from pipeline.store.manifest import Manifest
from pipeline.store.table import SampleTable
from pipeline.store.view import KIND, WRITTEN_WITH, view_bytes

_Spans = list[tuple[int, int]]


def is_comparable(path: Path, manifest: Manifest) -> bool:
    """Check that ``features.h5`` opens and was made from the manifest's samples table.

    Returns:
        Whether this release would write the very same bytes; not of a file of another release, or
        that was written with another HDF5.

    Raises:
        CorruptStoreError: it is damaged, or shows another table.
    """
    with open_file(path, KIND) as view:
        version = attribute(view, "format_version")
        shown = attribute(view, "samples")
        written_with = attribute(view, "written_with")
    if version != FORMAT_VERSION:
        return False
    if manifest.samples is None or shown != manifest.samples.sha256:
        raise CorruptStoreError(f"{path} shows another samples table than the store's.")
    return written_with == WRITTEN_WITH


def compare_view(path: Path, found: bytes, manifest: Manifest, table: SampleTable) -> None:
    """Compare ``features.h5`` with what it must be.

    Its texts lie in a heap without checksums, in which HDF5 can lose its way for ever: it is asked
    to read no more than headers, and only after all the other bytes were found right.

    Args:
        path: where it is.
        found: its bytes.
        manifest: of the store.
        table: as it was written, without the logs that came later.

    Raises:
        CorruptStoreError: it shows something else, or is damaged.
    """
    expected = view_bytes(manifest, table)
    if expected is None:
        raise CorruptStoreError(f"{path} is there although it cannot be relied on.")
    with h5py.File(io.BytesIO(expected)) as wanted:
        layers = wanted["features"]
        # HDF5 writes down, under a checksum, when it made a virtual dataset.
        headers = [h5py.h5o.get_info(layer.id) for layer in layers.values()]
        spans = [(header.addr, header.addr + header.hdr.space.total) for header in headers]
        same = _equal_outside(spans, found, expected)
        if same:
            with open_file(path, KIND) as view:
                same = all(_shows_same(layers[name], view["features"], name) for name in layers)
    if not same:
        raise CorruptStoreError(f"{path} is not what was written: bytes of it differ.")


def _equal_outside(spans: _Spans, found: bytes, expected: memoryview) -> bool:
    """Whether two files are equal but for some stretches of bytes."""
    if len(found) != len(expected):
        return False
    differs = np.frombuffer(found, np.uint8) != np.frombuffer(expected, np.uint8)
    for start, stop in spans:
        differs[start:stop] = False
    return not differs.any()


def _shows_same(wanted: h5py.Dataset, layers: h5py.Group, name: str) -> bool:
    """Whether a layer shows the same rows of the same shards; HDF5 checks its header's checksum."""
    try:
        found: Any = layers[name]
        return bool(
            (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            and np.array_equal(found.fillvalue, wanted.fillvalue, equal_nan=True)
            and _rows(found) == _rows(wanted)
        )
    except (KeyError, TypeError, ValueError, AttributeError):  # what h5py makes of a damaged header
        return False


def _rows(layer: h5py.Dataset) -> list[tuple[bytes, str, str, bytes]]:
    """Which rows of a virtual dataset are which rows of which file."""
    return [
        (part.vspace.encode(), part.file_name, part.dset_name, part.src_space.encode())
        for part in layer.virtual_sources()
    ]
