"""HDF5 files built in memory, and read as data from a stranger.

Reading never follows a link out of the file, and checks a dataset's kind, dtype and shape before
anything of that shape is allocated.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.errors import CorruptStoreError, StoreFormatError

FORMAT_VERSION = 1
CHUNK_BYTES = 2_000_000


def build_file(kind: str, fill: Callable[[h5py.File], None]) -> bytes:
    """The bytes of a new HDF5 file marked as ``kind`` and filled by ``fill``."""
    buffer = io.BytesIO()
    # v110 puts a checksum on every piece of metadata, and files from it open with HDF5 1.10.
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        file.attrs["format"] = kind
        file.attrs["format_version"] = FORMAT_VERSION
        fill(file)
    return buffer.getvalue()


@contextmanager
def open_file(path: Path, kind: str) -> Iterator[h5py.File]:
    """Open the HDF5 file at ``path`` for reading and check that it is marked as ``kind``.

    Raises:
        CorruptStoreError: it is not there or not readable as HDF5.
        StoreFormatError: it is of another kind, or of a version this release does not read.
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise CorruptStoreError(f"{path} is missing.") from None
    except (OSError, RuntimeError) as error:
        raise CorruptStoreError(f"{path} cannot be read as HDF5: {error}") from error
    with file:
        found, version = file.attrs.get("format"), file.attrs.get("format_version")
        if found != kind:
            raise StoreFormatError(f"{path} is marked {found!r}, expected {kind!r}.")
        if version != FORMAT_VERSION:
            raise StoreFormatError(
                f"{path} has format version {version}; this release reads {FORMAT_VERSION}."
            )
        yield file


def chunk_rows(row_bytes: int, n_rows: int) -> int:
    """Whole rows in a chunk of about 2 MB."""
    return max(1, min(n_rows, CHUNK_BYTES // max(1, row_bytes)))


def dataset(
    group: h5py.Group, name: str, dtype: DTypeLike, shape: Sequence[int | None]
) -> h5py.Dataset:
    """The plain dataset ``name`` of ``group``, checked against what it must be.

    Args:
        shape: expected lengths; None for any length.

    Raises:
        StoreFormatError: it is missing, a link, stored elsewhere, or of another dtype or shape.
    """
    where = f"{group.file.filename}: {group.name.rstrip('/')}/{name}"
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise StoreFormatError(f"{where} is missing or a link; a dataset was expected.")
    found = group[name]
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise StoreFormatError(f"{where} is not a plain dataset of this file.")
    fits = len(found.shape) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, found.shape, strict=True)
    )
    if found.dtype != np.dtype(dtype) or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise StoreFormatError(
            f"{where} is {found.dtype} {found.shape}, expected {np.dtype(dtype)} ({wanted})."
        )
    return found


def group(parent: h5py.Group, name: str) -> h5py.Group:
    """The group ``name`` of ``parent``; a link or anything else is refused."""
    if isinstance(parent.get(name, getlink=True), h5py.HardLink):
        found = parent[name]
        if isinstance(found, h5py.Group):
            return found
    raise StoreFormatError(f"{parent.file.filename}: {parent.name}{name} is not a group.")


def write_strings(parent: h5py.Group, name: str, values: Sequence[str]) -> None:
    """Store strings as one run of UTF-8 bytes and the (n + 1,) offsets between them."""
    encoded = [value.encode() for value in values]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, count=len(encoded)), out=offsets[1:])
    target = parent.create_group(name)
    target["utf8"] = np.frombuffer(b"".join(encoded), np.uint8)
    target["offsets"] = offsets


def read_strings(parent: h5py.Group, name: str, n: int | None = None) -> list[str]:
    """What :func:`write_strings` stored; ``n`` strings where the number is known."""
    source = group(parent, name)
    offsets: NDArray[np.int64] = dataset(
        source, "offsets", np.int64, (None if n is None else n + 1,)
    )[:]
    utf8: bytes = dataset(source, "utf8", np.uint8, (None,))[:].tobytes()
    if (
        len(offsets) == 0
        or offsets[0] != 0
        or offsets[-1] != len(utf8)
        or (np.diff(offsets) < 0).any()
    ):
        raise StoreFormatError(f"{parent.file.filename}: the offsets of {name} do not fit.")
    bounds = offsets.tolist()
    try:
        return [utf8[start:end].decode() for start, end in pairwise(bounds)]
    except UnicodeDecodeError as error:
        raise StoreFormatError(f"{parent.file.filename}: {name} is not UTF-8.") from error
