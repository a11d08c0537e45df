"""HDF5 files built in memory, and read as data from a stranger.

Reading never follows a link out of the file, and checks a dataset's kind, dtype and shape before
anything of that shape is allocated.
"""

from __future__ import annotations

import errno
import io
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, SupportsIndex, overload

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.errors import CorruptStoreError, ResourceError, StoreError, StoreFormatError
from pipeline.store.key import open_regular

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
CHUNK_BYTES = 2_000_000

# What the system says of a file that is gone or was replaced by something that is no file. It says
# anything else (EMFILE, ENOMEM, EIO, ESTALE, ETIMEDOUT ...) of files that may be intact.
_DAMAGE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO,
    errno.ENAMETOOLONG,
}  # fmt: skip
DENIED = {errno.EACCES, errno.EPERM}

# What fletcher32 adds to a chunk.
_CHECKSUM_BYTES = 4


def build_file(kind: str, fill: Callable[[h5py.File], None]) -> memoryview:
    """The bytes of a new HDF5 file marked as ``kind`` and filled by ``fill``."""
    buffer = io.BytesIO()
    write_file(buffer, kind, fill)
    return buffer.getbuffer()


def write_file(target: io.IOBase, kind: str, fill: Callable[[h5py.File], None]) -> None:
    """Write an HDF5 file marked as ``kind`` and filled by ``fill``."""
    # v110 puts a checksum on every piece of metadata, and files from it open with HDF5 1.10.
    with h5py.File(target, "w", libver=("v110", "v110")) as file:
        set_text(file, "format", kind)
        file.attrs["format_version"] = FORMAT_VERSION
        fill(file)


@contextmanager
def open_file(path: Path, kind: str) -> Iterator[h5py.File]:
    """Open the HDF5 file at ``path`` for reading and check that it is marked as ``kind``.

    Raises:
        CorruptStoreError: it is not there or not readable as HDF5, or what is read from it is not.
        StoreFormatError: it is of another kind, or of a version this release does not read.
        ResourceError: it cannot be read now; see :func:`not_damage`.
        StoreError: it may not be read.
    """
    try:
        with open_regular(path) as raw, _opened(raw, path) as file:
            version = attribute(file, "format_version")
            if version is None:
                raise StoreFormatError(f"{path} is not a file of tlpipe, expected {kind!r}.")
            check_version(path, version)
            # Version 1 kept its mark where HDF5 cannot be trusted to find it, see attribute().
            if version != 1 and (found := attribute(file, "format")) != kind:
                raise StoreFormatError(f"{path} is marked {found!r}, expected {kind!r}.")
            yield file
    except FileNotFoundError:
        raise CorruptStoreError(f"{path} is missing.") from None
    except (OSError, RuntimeError) as error:  # what HDF5 raises for anything it cannot read
        why = error.strerror if isinstance(error, OSError) and error.errno else error
        damage = CorruptStoreError(f"{path} cannot be read as HDF5: {why}")
        raise not_damage(path, error) or damage from error


def _opened(raw: BinaryIO, path: Path) -> h5py.File:
    """The HDF5 file whose bytes ``raw`` reads.

    HDF5 shares what it has open within a process: of a file that was opened by its name, as the
    sources of ``features.h5`` are, it refuses to open it otherwise. By way of Python it shares
    nothing, and what the system says of a failed read arrives here with its number.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, raw)
    return h5py.File(h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, fapl=access))


def not_damage(path: Path, error: Exception) -> ResourceError | StoreError | None:
    """What to raise where a file cannot be read although nothing may be wrong with it.

    Args:
        path: the file.
        error: what reading it raised.

    Returns:
        None where the file is gone, is no file, or holds what HDF5 cannot read.
    """
    if not isinstance(error, OSError) or error.errno is None or error.errno in _DAMAGE:
        return None
    if error.errno in DENIED:
        return StoreError(
            f"{path} cannot be read: {error.strerror}.\n"
            f"  Allow it:  chmod u+r {shlex.quote(str(path))}"
        )
    return ResourceError(
        f"{path} cannot be read now: {error.strerror}.\n"
        "  That does not say that it is damaged. Mend the cause, then run the same command again."
    )


def check_version(path: Path, version: object) -> None:
    """Refuse a file of a version that this release does not read.

    Raises:
        StoreFormatError: it is newer, or no version at all.
    """
    if version not in READ_VERSIONS or isinstance(version, bool):
        raise StoreFormatError(
            f"{path} has format version {version}; this release reads "
            f"{READ_VERSIONS[0]} to {READ_VERSIONS[-1]}.\n"
            "  A store of a newer release is read after:  pip install --upgrade tlpipe"
        )


def set_text(file: h5py.File, name: str, text: str) -> None:
    """Store a text as an attribute of the file's root that :func:`attribute` reads."""
    data = text.encode()
    file.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", max(1, len(data))))


def attribute(file: h5py.File, name: str) -> str | int | None:
    """A text or integer attribute of the file's root; None where there is no such.

    Text of variable length is not read: it lies in a heap without checksums, in which HDF5 loops
    for ever when a few bytes are wrong.
    """
    try:
        attributes = file.attrs
    except KeyError as error:  # HDF5 cannot make out the root
        raise CorruptStoreError(f"{file.filename} cannot be read as HDF5: {error}") from error
    if name not in attributes:
        return None
    kind = attributes.get_id(name)
    dtype = _dtype(kind)
    if dtype is None:
        raise StoreFormatError(f"{file.filename}: attribute {name!r} is of no type that is known.")
    if kind.shape != () or dtype.kind not in "iuS":
        return None
    value = attributes[name]
    return int(value) if isinstance(value, np.integer) else value.decode(errors="replace")


def _dtype(found: h5py.Dataset | h5py.h5a.AttrID) -> np.dtype[Any] | None:
    """The type of what is stored; None where numpy has no such, as for a time."""
    try:
        dtype: np.dtype[Any] = found.dtype
    except (TypeError, ValueError):
        return None
    return dtype


def chunk_rows(row_bytes: int, n_rows: int) -> int:
    """Whole rows in a chunk of about 2 MB."""
    return max(1, min(n_rows, CHUNK_BYTES // max(1, row_bytes)))


def dataset(
    group: h5py.Group,
    name: str,
    dtype: DTypeLike,
    shape: Sequence[int | None],
    *,
    checksums: bool = False,
) -> h5py.Dataset:
    """The plain dataset ``name`` of ``group``, checked against what it must be.

    Args:
        shape: expected lengths; None for any length.
        checksums: whether it is stored in chunks of whole rows with a fletcher32 sum each.

    Raises:
        StoreFormatError: it is missing, a link, stored elsewhere, or of another dtype or shape.
    """

    def refused(why: str) -> StoreFormatError:
        return StoreFormatError(f"{_where(group, name)} {why}.")

    found = _hard_linked(group, name)
    if not isinstance(found, h5py.Dataset):
        raise refused("is missing or a link; a dataset was expected")
    plan = found.id.get_create_plist()
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    # Any other filter could load a plugin, or grow out of a few bytes.
    allowed = [h5py.h5z.FILTER_FLETCHER32] if checksums else []
    if found.external or found.is_virtual or filters != allowed:
        raise refused("is not a plain dataset of this file")
    have, stored = found.shape, _dtype(found)
    fits = (
        have is not None
        and len(have) == len(shape)
        and all(want is None or want == found for want, found in zip(shape, have, strict=True))
    )
    if not fits or stored is None or stored != np.dtype(dtype):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        kind = "of no known type" if stored is None else stored
        raise refused(f"is {kind} {have}, expected {np.dtype(dtype)} ({wanted})")
    # A few bytes can promise terabytes, or zeros that nobody wrote.
    size_bytes = math.prod(found.shape) * stored.itemsize
    if size_bytes > min(found.id.get_storage_size(), group.file.id.get_filesize()):
        raise refused(f"promises {size_bytes:,} bytes, more than the file holds")
    if checksums and not _has_whole_chunks(found):
        raise refused("is not stored in chunks of whole rows with checksums")
    return found


def _has_whole_chunks(found: h5py.Dataset) -> bool:
    """Whether all chunks have their size: behind a short one HDF5 reads the process's memory."""
    n_rows, n_chunk = len(found), found.chunks[0]
    if n_chunk > n_rows or found.chunks[1:] != found.shape[1:]:
        return False
    chunks: list[tuple[int, int]] = []
    found.id.chunk_iter(lambda chunk: chunks.append((chunk.filter_mask, chunk.size)))
    size_bytes = math.prod(found.chunks) * found.dtype.itemsize + _CHECKSUM_BYTES
    return chunks == [(0, size_bytes)] * math.ceil(n_rows / n_chunk)


def group(parent: h5py.Group, name: str) -> h5py.Group:
    """The group ``name`` of ``parent``; a link or anything else is refused."""
    found = _hard_linked(parent, name)
    if not isinstance(found, h5py.Group):
        raise StoreFormatError(f"{_where(parent, name)} is not a group.")
    return found


def _where(parent: h5py.Group, name: str) -> str:
    return f"{parent.file.filename}: {parent.name.rstrip('/')}/{name}"


def _hard_linked(parent: h5py.Group, name: str) -> Any:
    """What is called ``name`` in this very file; None where nothing is, or a link elsewhere."""
    try:
        link = parent.get(name, getlink=True)
        return parent[name] if isinstance(link, h5py.HardLink) else None
    except (KeyError, TypeError, ValueError):  # a link or a type that HDF5 or h5py cannot make out
        return None


def write_strings(parent: h5py.Group, name: str, values: Sequence[str]) -> None:
    """Store strings as one run of UTF-8 bytes and the (n + 1,) offsets between them."""
    encoded = [value.encode() for value in values]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, count=len(encoded)), out=offsets[1:])
    target = parent.create_group(name)
    target["utf8"] = np.frombuffer(b"".join(encoded), np.uint8)
    target["offsets"] = offsets


def read_strings(parent: h5py.Group, name: str, n: int | None = None) -> Strings:
    """What :func:`write_strings` stored; ``n`` strings where the number is known."""
    source = group(parent, name)
    offsets = dataset(source, "offsets", np.int64, (None if n is None else n + 1,))[:]
    utf8 = dataset(source, "utf8", np.uint8, (None,))[:]
    where = f"{parent.file.filename}: {name}"
    if (
        len(offsets) == 0
        or offsets[0] != 0
        or offsets[-1] != len(utf8)
        or (np.diff(offsets) < 0).any()
    ):
        raise StoreFormatError(f"{where}: the offsets do not fit.")
    data = utf8.tobytes()
    starts = offsets[offsets < len(utf8)]
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise StoreFormatError(f"{where} is not UTF-8.") from error
    if (utf8[starts] & 0xC0 == 0x80).any():  # a string may not begin within a character
        raise StoreFormatError(f"{where} is not UTF-8.")
    return Strings(data, offsets)


class Strings(Sequence[str]):
    """Strings that stay UTF-8 bytes until they are asked for; a million open at once."""

    def __init__(self, utf8: bytes, offsets: NDArray[np.int64]) -> None:
        self._utf8 = utf8
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, key: SupportsIndex) -> str: ...

    @overload
    def __getitem__(self, key: slice) -> list[str]: ...

    def __getitem__(self, key: SupportsIndex | slice) -> str | list[str]:
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        i = range(len(self))[key]
        return self._utf8[self._offsets[i] : self._offsets[i + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        for start, stop in pairwise(self._offsets.tolist()):
            yield self._utf8[start:stop].decode()
