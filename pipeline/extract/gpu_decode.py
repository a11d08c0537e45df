"""JPEG files decoded on the GPU, a batch at a time, beside the threads that decode on the CPU.

nvJPEG is fast and trusting: one bad file fails its whole batch, and some hardware has been seen to
report images as decoded that it never wrote. So only plain files are sent there, every output is
looked at, and whatever is odd in the least is decoded on the CPU, which has the last word.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import codecs, jpeg
from pipeline.data.decode import (
    DecodedImage,
    decode_image,
    open_image,
    orientation_of,
    plain_kind,
    prepare_pillow,
)
from pipeline.errors import ImageError, UsageError
from pipeline.extract.loader import Finish, Loaded, decoding_threads

# Encoded files to (3, H, W) uint8 pixels on the device, all of them or an error.
Decoder = Callable[[list[torch.Tensor]], list[torch.Tensor]]

BATCH_SIZE = 32
MIN_PIXELS = 64 * 64  # smaller ones are decoded before they would be there
MAX_PIXELS = 1 << 25  # of a batch, and so of an image: 100 MB of RGB, 400 MB while one is resized
MAX_ASPECT = 4  # more elongated ones are resized by Pillow
MAX_FAULTS = 8

# What an output is filled with before it is written: a colour that no JPEG can have, because no
# 8-bit YCbCr is rounded to it.
SENTINEL = (231, 24, 208)
_N_SAMPLED = 64

# Decoders round colours differently, and smooth them differently where they are stored coarsely.
_MAX_PROBE_DIFFERENCE = 3.0

_SEQUENTIAL = (0xC0, 0xC1)
_OTHER_FRAMES = {0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_START_OF_SCAN = 0xDA
_ADOBE = 0xEE
_SAMPLINGS = {(0x11,), *((luma, 0x11, 0x11) for luma in (0x11, 0x12, 0x21, 0x22))}


def check_decoder(decode: str, device: torch.device) -> None:
    """Make sure that JPEG files can be decoded where ``decode`` says, and as they should be.

    Args:
        decode: "cpu", "fast", "gpu" or "hybrid".
        device: where the network runs.

    Raises:
        UsageError: they cannot; with what would help.
    """
    if decode not in ("gpu", "hybrid"):
        return
    if device.type != "cuda":
        raise UsageError(
            f"--decode {decode} needs a CUDA device, and the network runs on {device}.\n"
            "  Use --decode cpu, or --device cuda on a machine that has one."
        )
    with GpuDecoder(device):
        pass


@dataclass(frozen=True, slots=True)
class PlainJpeg:
    """A JPEG file of the kind that hardware decodes.

    Attributes:
        data: the bytes up to the end of its first image, without EXIF.
        height: pixels, as stored.
        width: pixels, as stored.
        orientation: EXIF orientation, 1…8, to be applied to the pixels.
    """

    data: bytes
    height: int
    width: int
    orientation: int

    @property
    def n_pixels(self) -> int:
        """Pixels of the image."""
        return self.height * self.width


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """A file's JPEG if it is a plain one; None if it is for the CPU.

    Plain is: sequential, Huffman-coded, 8 bits, grey or YCbCr in a usual subsampling, in one scan
    that ends where the image does, of a usual size and shape.
    """
    end = _end_of_plain(data)
    if end is None:
        return None
    prepare_pillow()
    try:
        image = open_image(data)
    except ImageError:
        return None
    if image is None or plain_kind(image, data) != "JPEG":
        return None
    width, height = image.size
    is_usual = MIN_PIXELS <= width * height <= MAX_PIXELS
    if not is_usual or max(width, height) > MAX_ASPECT * min(width, height):
        return None
    has_exif = data.find(b"Exif", 0, end) >= 0
    stored = jpeg.without_exif(data[:end]) if has_exif else data[:end]
    return PlainJpeg(stored, height, width, orientation_of(image))


def upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Undo an EXIF orientation (1…8) of (3, H, W) pixels, on the device that they are on."""
    if orientation == 1:
        return pixels
    rows_columns = pixels.permute(1, 2, 0)
    if orientation >= 5:
        rows_columns = rows_columns.transpose(0, 1)
    flipped = {2: [1], 3: [0, 1], 4: [0], 6: [1], 7: [0, 1], 8: [0]}.get(orientation, [])
    return rows_columns.flip(flipped).contiguous().permute(2, 0, 1)


@dataclass(eq=False, slots=True)
class _Item:
    """A file that waits for the GPU; ``finish`` makes of its pixels what the others make."""

    jpeg: PlainJpeg
    finish: Finish
    future: Future[Loaded] = field(default_factory=Future)


class GpuDecoder:
    """Decodes JPEG files in a thread of its own, as many at a time as happen to wait.

    Args:
        device: that decodes; also the CPU, to try everything but nvJPEG.
        is_shared: whether only as much is taken as keeps the device busy: hybrid decoding.
        decoder: does the decoding; None for torchcodec's.
        batch_size: largest number of images that are decoded at once.

    Attributes:
        n_decoded: images decoded here.
        n_returned: images that were taken, and left to the CPU in the end.
        note: what a user should know of it; "" for nothing.

    Raises:
        UsageError: the device cannot decode JPEG files, or gives other pixels than the CPU.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        is_shared: bool = False,
        decoder: Decoder | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.n_decoded = self.n_returned = 0
        self.note = ""
        self._device = device
        self._decoder = decoder or _torchcodec(device)
        self._is_shared = is_shared
        self._batch_size = batch_size
        self._n_faults = 0
        self._off = threading.Event()  # for good: closed, or not to be trusted
        self._decodes_twice = False
        self._waiting: deque[_Item] = deque()
        self._room = threading.Semaphore(2 * batch_size)  # for one batch in hand and one waiting
        self._lock = threading.Lock()
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sentinel = torch.tensor(SENTINEL, dtype=torch.uint8, device=device).view(3, 1, 1)
        self._thread = decoding_threads(1, "decode on the GPU")
        try:
            self._thread.submit(self._probe).result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def take(self, data: bytes, finish: Finish) -> Future[Loaded] | None:
        """Decode a file, unless that is better done on the CPU.

        Waits while there is no room, or if the work is shared: leaves the file to the CPU then.

        Args:
            data: the bytes of any file.
            finish: makes the result of the image, or of None by decoding it on the CPU.

        Returns:
            The result to come; None if the caller has to see to it.
        """
        if self._off.is_set() or (plain := plain_jpeg(data)) is None:
            return None
        if not self._room.acquire(blocking=not self._is_shared):
            return None
        item = _Item(plain, finish)
        with self._lock:
            if self._off.is_set():
                self._room.release()  # for the next that waits, to find the same
                return None
            self._waiting.append(item)
            if len(self._waiting) == 1:
                self._thread.submit(self._run)
        return item.future

    def close(self) -> None:
        """Finish the batch in hand; nobody wants the others any more."""
        with self._lock:
            self._off.set()
            for item in self._waiting:
                item.future.cancel()
            self._room.release(len(self._waiting) + 1)  # whoever waits for room sees that it is off
            self._waiting.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    # What follows runs in the decoder's thread.

    def _run(self) -> None:
        """Decode what waits, as far as it fits into a batch."""
        items = self._next_items()
        if not items:
            return  # it was closed meanwhile
        try:
            for item, one in zip(items, self._load(items), strict=True):
                item.future.set_result(one)
        except BaseException as error:
            for item in items:
                if not item.future.done():
                    item.future.set_exception(error)
            raise
        finally:
            self._room.release(len(items))

    def _next_items(self) -> list[_Item]:
        """As many as wait and fit into a batch."""
        items: list[_Item] = []
        n_pixels = 0
        with self._lock:
            while self._waiting and len(items) < self._batch_size:
                n_pixels += self._waiting[0].jpeg.n_pixels
                if items and n_pixels > MAX_PIXELS:
                    break
                items.append(self._waiting.popleft())
            if self._waiting:
                self._thread.submit(self._run)
        return items

    def _load(self, items: Sequence[_Item]) -> list[Loaded]:
        """Decode files, those on the CPU that the GPU cannot, and make of them what is wanted."""
        started = time.perf_counter()
        with self._on_stream():
            decoded: list[torch.Tensor | None]
            decoded, fault = [None] * len(items), ""
            if not self._off.is_set():
                decoded, fault = self._decode([item.jpeg for item in items])
            seconds = (time.perf_counter() - started) / len(items)
            loaded = [
                self._finish(item, pixels, seconds)
                for item, pixels in zip(items, decoded, strict=True)
            ]
            if self._stream is not None:
                self._stream.synchronize()  # so any stream may use what was made
        returned = [one for one, pixels in zip(loaded, decoded, strict=True) if pixels is None]
        self.n_returned += len(returned)
        self.n_decoded += len(loaded) - len(returned)
        # A file that the CPU refuses, too, explains what happened to its batch.
        if fault and not any(one.failure for one in returned):
            self._n_faults += 1
            if self._n_faults == MAX_FAULTS:
                self._switch_off(f"it went wrong {MAX_FAULTS} times, at last because {fault}")
        return loaded

    def _finish(self, item: _Item, pixels: torch.Tensor | None, seconds: float) -> Loaded:
        if pixels is not None:
            with suppress(torch.OutOfMemoryError):
                image = DecodedImage(upright(pixels, item.jpeg.orientation))
                return item.finish(image, seconds)
            self._shrink(self._batch_size)
        return item.finish(None, seconds)

    def _decode(self, jpegs: Sequence[PlainJpeg]) -> tuple[list[torch.Tensor | None], str]:
        """Decode files on the device.

        Returns:
            (3, H, W) uint8 pixels as stored, or None for each file that is left to the CPU; and
            what went wrong, if something did.
        """
        nothing: list[torch.Tensor | None] = [None] * len(jpegs)
        has_memory, longer = True, None
        try:
            outputs = self._outputs(jpegs, [one.data for one in jpegs])
            if self._decodes_twice:
                longer = self._outputs(jpegs, [jpeg.with_longer_scans(one.data) for one in jpegs])
        except torch.OutOfMemoryError:
            has_memory = False
        except (RuntimeError, ValueError) as error:
            return nothing, (str(error).strip() or type(error).__name__).splitlines()[-1]
        if not has_memory:  # only here has the failed attempt let go of what it held
            self._shrink(len(jpegs))
            return nothing, ""
        shapes = [(3, one.height, one.width) for one in jpegs]
        if [tuple(output.shape) for output in outputs] != shapes:
            return nothing, "images had another size than their headers say"
        samples = torch.stack([_sample(output) for output in outputs]).cpu()
        unwritten = _has_sentinel(samples.numpy())
        if longer is None:
            of_each = zip(jpegs, samples, strict=True)
            may_be_cut = [jpeg.may_be_cut(one.data, sample[:, None]) for one, sample in of_each]
        else:
            may_be_cut = [not torch.equal(a, b) for a, b in zip(outputs, longer, strict=True)]
        pixels = [
            None if is_unwritten or is_cut else output
            for output, is_unwritten, is_cut in zip(outputs, unwritten, may_be_cut, strict=True)
        ]
        return pixels, "images were not written" if unwritten.any() else ""

    def _outputs(self, jpegs: Sequence[PlainJpeg], files: Sequence[bytes]) -> list[torch.Tensor]:
        """What the decoder makes of files, in memory that was filled with the sentinel before."""
        # The allocator gives the decoder the memory that was let go of last; where it does not,
        # what is missing may go unseen.
        filled = [
            torch.empty((3, one.height, one.width), dtype=torch.uint8, device=self._device).copy_(
                self._sentinel
            )
            for one in jpegs
        ]
        if self._stream is not None:
            # nvJPEG's hardware writes without regard to what its stream has yet to do.
            self._stream.synchronize()
        del filled
        # A copy, because torch warns about memory that it must not write to.
        return self._decoder(
            [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        )

    def _probe(self) -> None:
        """Decode a picture of our own, whole and cut, before anything depends on it.

        Raises:
            UsageError: it cannot be decoded, or comes out different.
        """
        whole, cut = _probe_files()
        with self._on_stream():
            (pixels,), fault = self._decode([whole])
            if pixels is None:
                raise UsageError(
                    f"JPEG files cannot be decoded on {self._device}: {fault or 'out of memory'}.\n"
                    "  Use --decode cpu, or install a torchcodec for this machine's CUDA: "
                    "https://github.com/meta-pytorch/torchcodec#installing-torchcodec"
                )
            expected = decode_image(whole.data).pixels
            difference = (pixels.cpu().float() - expected.float()).abs().mean().item()
            if difference > _MAX_PROBE_DIFFERENCE:
                raise UsageError(
                    f"JPEG files come out different on {self._device}: by {difference:.1f} of 255 "
                    f"on average; {_MAX_PROBE_DIFFERENCE:g} would be usual.\n  Use --decode cpu."
                )
            (pixels,), _ = self._decode([cut])
        self._decodes_twice = pixels is not None

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        context: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return context

    def _shrink(self, n_images: int) -> None:
        """Decode fewer at a time from now on: there was too little memory for so many."""
        self._batch_size = max(1, min(self._batch_size, n_images) // 2)
        if n_images == 1:
            self._switch_off("it has too little memory for a single image")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _switch_off(self, why: str) -> None:
        self._off.set()
        self.note = f"The rest is decoded on the CPU: decoding on {self._device} is off, as {why}."


def open_decoder(
    decode: str, device: torch.device
) -> AbstractContextManager[GpuDecoder] | AbstractContextManager[None]:
    """The decoder for "gpu" or "hybrid"; a context of None for the others."""
    if decode not in ("gpu", "hybrid"):
        return nullcontext()
    return GpuDecoder(device, is_shared=decode == "hybrid")


def _torchcodec(device: torch.device) -> Decoder:
    """The decoder of torchcodec on a device.

    Raises:
        UsageError: it is not here, or too old.
    """
    decode_jpeg = getattr(codecs._torchcodec, "decode_jpeg", None)
    if decode_jpeg is None or "device" not in inspect.signature(decode_jpeg).parameters:
        raise UsageError(
            "Decoding on a GPU needs a newer torchcodec than the one here, or one that finds its "
            "shared libraries.\n  Use --decode cpu, or:  pip install -U torchcodec"
        )
    return partial(decode_jpeg, mode="RGB", device=device)


def _end_of_plain(data: bytes) -> int | None:
    """Where the image of a plain JPEG ends, from its segments alone; None if it is not plain."""
    if not data.startswith(b"\xff\xd8"):
        return None
    frame = b""
    adobe_transform = 1
    for marker, body, end in jpeg.segments(data):
        if marker in _OTHER_FRAMES or (marker in _SEQUENTIAL and frame):
            return None
        if marker in _SEQUENTIAL:
            frame = body
        elif marker == _ADOBE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe_transform = body[11]
        elif marker == _START_OF_SCAN:
            n_components = body[0] if body else 0
            is_plain = (
                len(frame) == 6 + 3 * n_components
                and frame[5] == n_components
                and tuple(frame[7::3]) in _SAMPLINGS
                and (n_components == 1 or (frame[6::3] == b"\1\2\3" and adobe_transform == 1))
                and data[end : end + 2] == b"\xff\xd9"
            )
            return end + 2 if is_plain else None
    return None


def _sample(pixels: torch.Tensor) -> torch.Tensor:
    """(3, n) of (3, H, W) pixels, evenly spread; the last one is the last."""
    flat = pixels.flatten(1)
    step = (flat.shape[1] - 1) // (_N_SAMPLED - 1)
    return flat[:, flat.shape[1] - 1 - (_N_SAMPLED - 1) * step :: step]


def _has_sentinel(samples: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n,) which of (n, 3, m) samples have a pixel that was not written, or seems so."""
    sentinel = np.array(SENTINEL, dtype=np.uint8)[:, None]
    found: NDArray[np.bool_] = (samples == sentinel).all(axis=1).any(axis=1)
    return found


def _probe_files() -> tuple[PlainJpeg, PlainJpeg]:
    """A picture, and the same with an end marker after half of its scan."""
    y, x = np.mgrid[:128, :192]
    colours = [x * x / 160 % 100 + y, 250 - x, 40 + 20 * np.sin(x / 3) + x * y % 13]
    picture = Image.fromarray(np.stack(colours, axis=-1).clip(0, 255).astype(np.uint8))
    stream = BytesIO()
    picture.save(stream, "JPEG", quality=90)
    data = stream.getvalue()
    scan = data.index(b"\xff\xda")
    cut = data[: (scan + len(data)) // 2].rstrip(b"\xff") + b"\xff\xd9"
    return PlainJpeg(data, 128, 192, 1), PlainJpeg(cut, 128, 192, 1)
