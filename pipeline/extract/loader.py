"""Image files -> network inputs, decoded in threads beside the forward pass, in order."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from stat import S_ISREG

import torch

from pipeline.backbones.preprocess import Preprocess
from pipeline.data.decode import decode_image
from pipeline.errors import ImageError
from pipeline.store.table import NO_DIGEST

MAX_FILE_BYTES = 1_000_000_000
_TOO_LARGE = "too large for the memory that is left"
_BINARY = getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One file, read; and decoded unless its bytes are known already.

    Attributes:
        digest: sha256 of the bytes, 32 bytes; zeros where they could not be read.
        size_bytes: file size; -1 where it could not be read.
        mtime_ns: modification time in nanoseconds; -1 where it could not be read.
        pixels: (3, height, width) uint8 as the network wants it; None if known or failed.
        failure: why it cannot be used; "" if it can.
        notes: what was done to make it usable, such as "CMYK converted to RGB".
        reading_seconds: of reading and hashing it.
        decoding_seconds: of decoding and preprocessing it.
    """

    digest: bytes = NO_DIGEST
    size_bytes: int = -1
    mtime_ns: int = -1
    pixels: torch.Tensor | None = None
    failure: str = ""
    notes: tuple[str, ...] = ()
    reading_seconds: float = 0.0
    decoding_seconds: float = 0.0


def load(file: str, preprocess: Preprocess, is_known: Callable[[bytes], bool]) -> Loaded:
    """Read, hash and, unless the bytes are known, decode and preprocess one image file."""
    started = time.perf_counter()
    try:
        # Opening a pipe would wait for its other end, for ever.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
        stat = os.fstat(descriptor)
        if not S_ISREG(stat.st_mode):
            os.close(descriptor)
            return Loaded(failure="not a file")
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            if stat.st_size > MAX_FILE_BYTES:
                return Loaded(failure=f"larger than {MAX_FILE_BYTES:,} bytes ({stat.st_size:,})")
            data = stream.read(-1)
    except OSError as error:
        return Loaded(failure=f"cannot be read ({error.strerror})")
    except MemoryError:
        return Loaded(failure=_TOO_LARGE)
    if len(data) != stat.st_size:
        return Loaded(failure=f"changed while being read ({stat.st_size} → {len(data)} bytes)")
    digest = hashlib.sha256(data).digest()
    read = time.perf_counter()
    one = Loaded(digest, len(data), stat.st_mtime_ns, reading_seconds=read - started)
    if is_known(digest):
        return one
    try:
        image = decode_image(data)
        one = replace(one, pixels=preprocess(image.pixels), notes=image.notes)
    except ImageError as error:
        one = replace(one, failure=str(error))
    except MemoryError:
        one = replace(one, failure=_TOO_LARGE)
    return replace(one, decoding_seconds=time.perf_counter() - read)


def load_in_order(
    files: Iterable[str], load_one: Callable[[str], Loaded], n_threads: int, lookahead: int
) -> Iterator[Loaded]:
    """Load files in ``n_threads`` threads; results come in the order of ``files``.

    Args:
        files: what to load.
        load_one: loads one file; it must not raise for a bad one.
        n_threads: decoding threads.
        lookahead: how many files may be loaded ahead; bounds the memory.
    """
    # Decoding threads each use one core: their number is the parallelism, not OpenMP's.
    n_forward_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_threads, "decode", initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Loaded]] = deque()
    try:
        for file in files:
            waiting.append(pool.submit(load_one, file))
            if len(waiting) == n_threads:
                torch.set_num_threads(n_forward_threads)
            if len(waiting) > lookahead:
                yield waiting.popleft().result()
        torch.set_num_threads(n_forward_threads)
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
