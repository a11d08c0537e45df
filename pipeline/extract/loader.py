"""Image files -> network inputs, decoded in threads beside the forward pass, in order."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from stat import S_ISREG
from typing import TYPE_CHECKING, TypeVar

import torch

from pipeline.data.decode import DecodedImage, decode_image
from pipeline.errors import ImageError, ResourceError
from pipeline.store.table import NO_DIGEST

if TYPE_CHECKING:
    from pipeline.extract.gpu_decode import GpuDecoder

Item = TypeVar("Item")

MAX_FILE_BYTES = 1_000_000_000
_TOO_LARGE = "too large for the memory that is left"
_BINARY = getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Demand:
    """What one backbone wants of an image.

    Attributes:
        is_known: whether it has the features of a file with this digest; any thread may ask.
        make: from (3, H, W) uint8 pixels and the digest of the file to (n_views, 3, height, width)
            uint8.
        least: height and width that it must have where it may be decoded at a part of its size;
            see :func:`~pipeline.data.decode.decode_image`.
    """

    is_known: Callable[[bytes], bool]
    make: Callable[[torch.Tensor, bytes], torch.Tensor]
    least: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """One file, read; and decoded unless its bytes are known already.

    Attributes:
        digest: sha256 of the bytes, 32 bytes; zeros where they could not be read.
        size_bytes: file size; -1 where it could not be read.
        mtime_ns: modification time in nanoseconds; -1 where it could not be read.
        pixels: for each demand (n_views, 3, height, width) uint8; None if known or failed.
        failure: why it cannot be used; "" if it can.
        was_decoded: whether it was.
        notes: what was done to make it usable, such as "CMYK converted to RGB".
        reading_seconds: of reading and hashing it.
        decoding_seconds: of decoding and preprocessing it.
    """

    digest: bytes = NO_DIGEST
    size_bytes: int = -1
    mtime_ns: int = -1
    pixels: tuple[torch.Tensor | None, ...] = ()
    failure: str = ""
    was_decoded: bool = False
    notes: tuple[str, ...] = ()
    reading_seconds: float = 0.0
    decoding_seconds: float = 0.0


# Makes the result of a file from its image, or decodes that itself; and from the seconds so far.
Finish = Callable[[DecodedImage | None, float], Loaded]


def load(
    file: str, demands: Sequence[Demand | None], gpu: GpuDecoder | None = None
) -> Loaded | Future[Loaded]:
    """Read and hash one image file, and decode it once for all who do not know its bytes.

    Args:
        file: path of the file.
        demands: what the backbones want; None for one that does not want this file.
        gpu: may take the decoding upon itself; the result is then still to come.
    """
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
    wanting = [None if each is None or each.is_known(digest) else each for each in demands]
    if not any(wanting):
        return one
    finish = partial(_finish, one, data, wanting)
    pending = gpu.take(data, finish) if gpu is not None else None
    return finish(None, 0.0) if pending is None else pending


def _finish(
    one: Loaded,
    data: bytes,
    demands: Sequence[Demand | None],
    image: DecodedImage | None,
    seconds: float,
) -> Loaded:
    """Decode the bytes of a file, unless its image is there, and make what the demands want."""
    started = time.perf_counter()
    try:
        leasts = {demand.least for demand in demands if demand is not None}
        images = {least: image or decode_image(data, least=least) for least in leasts}
        pixels = [
            None if demand is None else demand.make(images[demand.least].pixels, one.digest)
            for demand in demands
        ]
        notes = next(iter(images.values())).notes
        one = replace(one, pixels=tuple(pixels), was_decoded=True, notes=notes)
    except ImageError as error:
        one = replace(one, failure=str(error))
    except MemoryError:
        one = replace(one, failure=_TOO_LARGE)
    return replace(one, decoding_seconds=seconds + time.perf_counter() - started)


def load_in_order(
    items: Iterable[Item],
    load_one: Callable[[Item], Loaded | Future[Loaded]],
    n_threads: int,
    lookahead: int,
) -> Generator[Loaded]:
    """Load files in ``n_threads`` threads; results come in the order of ``items``.

    Args:
        items: what to load.
        load_one: loads one file, or has it loaded; it must not raise for a bad one.
        n_threads: decoding threads.
        lookahead: how many files may be loaded ahead; bounds the memory.
    """
    pool = decoding_threads(n_threads)
    waiting: deque[Future[Loaded | Future[Loaded]]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(load_one, item))
            if len(waiting) > max(lookahead, n_threads):
                yield _settled(waiting.popleft())
        while waiting:
            yield _settled(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _settled(pending: Future[Loaded | Future[Loaded]]) -> Loaded:
    """Wait for a file that is being loaded, perhaps in two places one after the other."""
    one = pending.result()
    return one.result() if isinstance(one, Future) else one


def decoding_threads(n_threads: int, name: str = "decode") -> ThreadPoolExecutor:
    """Threads that use one core each: their number is the parallelism, not OpenMP's."""
    n_forward_threads = torch.get_num_threads()
    ready = threading.Barrier(n_threads + 1)

    def start() -> None:
        torch.get_num_threads()  # or torch would set its own number later, when a thread first asks
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(n_threads, name, initializer=start)
    try:
        for _ in range(n_threads):
            pool.submit(int)
    except RuntimeError as error:  # those that are there would wait for the others for ever
        ready.abort()
        pool.shutdown(wait=False)
        raise ResourceError(
            f"{n_threads} threads cannot be started ({error}).\n  Use fewer --threads."
        ) from error
    ready.wait()
    torch.set_num_threads(n_forward_threads)
    return pool
