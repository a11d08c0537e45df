"""IDX files, the format of MNIST: a magic number, big-endian sizes, then the bytes."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

UINT8 = 0x08
GZIP_MAGIC = b"\x1f\x8b"


def read_idx(file: Path, n_dims: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, plain or gzipped.

    The format is described at http://yann.lecun.com/exdb/mnist/.

    Args:
        file: what to read.
        n_dims: 3 for images, 1 for labels.

    Returns:
        An array of as many dimensions.

    Raises:
        DataError: no such file, another format, or not the length that its header promises.
    """
    try:
        with file.open("rb") as plain:
            is_gzip = plain.read(2) == GZIP_MAGIC
        with gzip.open(file) if is_gzip else file.open("rb") as stream:
            return _parse(file, stream, n_dims)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _bad(file, f"its compression is damaged ({error})") from error
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror}.") from error


def _parse(file: Path, stream: io.BufferedIOBase, n_dims: int) -> NDArray[np.uint8]:
    magic = bytes((0, 0, UINT8, n_dims))
    start = stream.read(4)
    if start != magic:
        raise _bad(file, f"it starts with {start.hex(' ') or 'nothing'}, not with {magic.hex(' ')}")
    header = stream.read(4 * n_dims)
    if len(header) < 4 * n_dims:
        raise _bad(file, "it ends inside its header")
    shape = tuple(np.frombuffer(header, dtype=">u4").tolist())
    n_bytes = math.prod(shape)
    sizes = " x ".join(map(str, shape))
    content = _read_at_most(stream, n_bytes + 1)
    if len(content) != n_bytes:
        found = "more" if len(content) > n_bytes else f"{len(content):,}"
        raise _bad(file, f"its header says {sizes} = {n_bytes:,} bytes, and {found} follow")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _read_at_most(stream: io.BufferedIOBase, n_bytes: int) -> bytes:
    """Like ``stream.read``, but a header that claims too much allocates nothing."""
    chunks = []
    while n_bytes > 0 and (chunk := stream.read(min(n_bytes, 1 << 24))):
        chunks.append(chunk)
        n_bytes -= len(chunk)
    return b"".join(chunks)


def _bad(file: Path, reason: str) -> DataError:
    return DataError(
        f"{file} is not a whole IDX file of unsigned bytes: {reason}.\n"
        "  Fetch the file again; it may have been cut off on its way."
    )
