"""Image files -> features of one or more backbones, in order, every image decoded once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.extract.gpu_decode import open_decoder
from pipeline.extract.loader import Demand, Loaded, load, load_in_order
from pipeline.extract.timings import Timings

if TYPE_CHECKING:
    from pipeline.extract.embedder import Embedder

Features = Mapping[str, NDArray[np.floating]]

# Known images fill no batch: past this many samples of any kind, what there is gets written.
GATHERED_SAMPLES = 1024


class Pending(Protocol):
    """A batch on its way through the network."""

    def result(self) -> tuple[dict[str, NDArray[np.floating]], dict[int, str]]:
        """(n, ...) features by layer; and by index why an image has none."""


@dataclass
class Job:
    """What one backbone has to do in a pass over the files.

    Attributes:
        embedder: the backbone.
        wants: (n_files,) which of the files it embeds.
        is_known: whether it has the features of these bytes; any thread may ask.
        begin: is given the first batch, before anything is embedded.
    """

    embedder: Embedder
    wants: NDArray[np.bool_]
    is_known: Callable[[bytes], bool]
    begin: Callable[[list[torch.Tensor]], None] = lambda _: None


@dataclass(frozen=True)
class Unit:
    """What became of the next files of a job.

    Attributes:
        job: index of the job.
        files: indices of the files, in order.
        loaded: what was read of each, without its pixels.
        digests: of the images that were embedded.
        features: (n_embedded, n_views, ...) by layer, in the order of ``digests``.
        refused: why an image's features cannot be stored, by index.
    """

    job: int
    files: list[int]
    loaded: list[Loaded]
    digests: list[bytes]
    features: Features
    refused: dict[int, str]


@dataclass
class _Batch:
    """What gathers until it fills a batch."""

    files: list[int] = field(default_factory=list)
    loaded: list[Loaded] = field(default_factory=list)
    images: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def add(self, file: int, one: Loaded, pixels: torch.Tensor | None) -> None:
        self.files.append(file)
        self.loaded.append(one)
        if pixels is not None:
            self.images.setdefault(one.digest, pixels)

    def is_full(self, batch_size: int) -> bool:
        return len(self.images) == batch_size or len(self.files) == GATHERED_SAMPLES


def embed(
    files: Sequence[str],
    jobs: Sequence[Job],
    timings: Timings,
    should_stop: Callable[[], bool],
    *,
    decode: str = "cpu",
    device: torch.device | None = None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Iterator[Unit]:
    """Read, decode and embed files; in the order of ``files`` for each job.

    Args:
        files: image files.
        jobs: who wants which of them.
        timings: told where the time goes.
        should_stop: asked after each batch; what is on its way is finished.
        decode: "gpu" to decode plain JPEG files on a GPU, "hybrid" for as many of them as it takes.
        device: that GPU; None for the one of the first job.
        on_note: is told, at the end, what is worth knowing of decoding there.
    """
    demands = [
        Demand(job.is_known, job.embedder.make_input, job.embedder.least_size) for job in jobs
    ]
    indices = np.flatnonzero(np.logical_or.reduce([job.wants for job in jobs])).tolist()

    def load_one(i: int) -> Loaded | Future[Loaded]:
        each = zip(demands, jobs, strict=True)
        return load(files[i], [demand if job.wants[i] else None for demand, job in each], gpu)

    timings.n_threads = max(job.embedder.n_threads for job in jobs)
    lookahead = 2 * max(job.embedder.batch_size for job in jobs)
    batches = [_Batch() for _ in jobs]
    network = _Network(jobs, timings)
    with (
        open_decoder(decode, device or jobs[0].embedder.device) as gpu,
        closing(load_in_order(indices, load_one, timings.n_threads, lookahead)) as stream,
    ):
        for i, one in zip(indices, timings.waiting_for(stream), strict=True):
            timings.reading += one.reading_seconds
            timings.decoding += one.decoding_seconds
            bare = replace(one, pixels=())  # copies need no pixels of their own
            ended = False
            for k, job in enumerate(jobs):
                if not job.wants[i]:
                    continue
                batches[k].add(i, bare, one.pixels[k] if one.pixels else None)
                if batches[k].is_full(job.embedder.batch_size):
                    yield from network.run(k, batches[k])
                    batches[k] = _Batch()
                    ended = True
            if ended and should_stop():
                break
        else:
            for k, batch in enumerate(batches):
                if batch.files:
                    yield from network.run(k, batch)
    if gpu is not None and gpu.note:
        on_note(gpu.note)
    yield from network.finish()


class _Network:
    """The jobs' networks, and the batches that are on their way through them."""

    def __init__(self, jobs: Sequence[Job], timings: Timings) -> None:
        self._jobs = jobs
        self._timings = timings
        self._on_the_way: deque[tuple[int, _Batch, Sequence[Pending]]] = deque()
        self._begun: set[int] = set()

    def run(self, k: int, batch: _Batch) -> Iterator[Unit]:
        """Send a batch on its way; gives those that have come through."""
        images, job = list(batch.images.values()), self._jobs[k]
        if images and k not in self._begun:
            with self._timings.spent("choosing"):
                job.begin([views[0] for views in images])
            self._begun.add(k)
        with self._in_network(job):
            # One forward pass for each view, so that its shape is the same for any number of them.
            n_views = len(images[0]) if images else 0
            pending = [job.embedder.submit([views[v] for views in images]) for v in range(n_views)]
        self._on_the_way.append((k, batch, pending))
        while len(self._on_the_way) > job.embedder.n_on_the_way:
            yield self._next()

    @contextmanager
    def _in_network(self, job: Job) -> Iterator[None]:
        """Count the seconds of the block for the network, but for those of copying."""
        copied = job.embedder.copying_seconds
        with self._timings.spent("network"):
            yield
        copied = job.embedder.copying_seconds - copied
        self._timings.copying += copied
        self._timings.network -= copied

    def finish(self) -> Iterator[Unit]:
        """What is still on its way."""
        while self._on_the_way:
            yield self._next()

    def _next(self) -> Unit:
        k, batch, pending = self._on_the_way.popleft()
        with self._in_network(self._jobs[k]):
            results = [each.result() for each in pending]
        refused: dict[int, str] = {}
        for _, why in reversed(results):
            refused |= why
        features = (
            {
                name: np.stack([views[name] for views, _ in results], axis=1)
                for name in results[0][0]
            }
            if results
            else {}
        )
        return Unit(k, batch.files, batch.loaded, list(batch.images), features, refused)
