"""Batches of images: decoded in threads beside the training, augmented by a seed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backbones.preprocess import Preprocess
from pipeline.errors import DataError
from pipeline.extract.loader import Demand, Loaded, load, load_in_order
from pipeline.finetune.augment import Augment, seed_of
from pipeline.finetune.parallel import ALONE, Team

Indices = NDArray[np.intp]
View = Callable[[torch.Tensor, int], torch.Tensor]  # (3, H, W) uint8 and a row -> network input

PLAIN_BATCH_SIZE = 64


@dataclass(frozen=True)
class Batch:
    """Some samples, on the CPU.

    Attributes:
        inputs: (n, ...), as the source keeps them.
        targets: (n,) int64, or (n, n_tasks).
        all_targets: (n_all,) or (n_all, n_tasks), of the same step in all processes; None where
            these are all.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    all_targets: torch.Tensor | None = None

    @property
    def n_all(self) -> int:
        """Samples of the step in all processes."""
        return len(self.targets if self.all_targets is None else self.all_targets)


class Batches(Protocol):
    """Where a trainer's samples come from: images, or activations that were stored."""

    @property
    def n_steps(self) -> int:
        """Batches in an epoch."""
        ...

    @property
    def targets(self) -> torch.Tensor:
        """Of its samples, in order."""
        ...

    def training(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """The batches of an epoch from ``first_step`` on; ``epoch`` alone decides what they are.

        Of several processes, each has its part of every batch.
        """
        ...

    def plain(self) -> Generator[Batch]:
        """All samples as they are, in order; of several processes, each has its part of them."""
        ...

    def to_device(self, inputs: torch.Tensor, device: torch.device) -> torch.Tensor:
        """(n, ...) float32: what the network takes."""
        ...


def epoch_order(n_samples: int, batch_size: int, seed: int, epoch: int) -> list[Indices]:
    """Rows of each batch of an epoch; no batch is smaller than another by more than one.

    Args:
        n_samples: to shuffle.
        batch_size: at most.
        seed: of the order.
        epoch: each has an order of its own.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n_samples)
    return np.array_split(order, max(1, -(-n_samples // batch_size)))


def plain_order(n_samples: int, team: Team) -> list[Indices]:
    """Rows of each batch of this process's part, in order."""
    part = team.part(np.arange(n_samples))
    return np.array_split(part, -(-len(part) // PLAIN_BATCH_SIZE)) if len(part) else []


def make_batch(inputs: torch.Tensor, targets: torch.Tensor, part: Indices, whole: Indices) -> Batch:
    """This process's part of a step's samples, with what is to be learned in the whole step.

    Args:
        inputs: (n_part, ...).
        targets: of the source's samples.
        part: (n_part,), which of them.
        whole: (n_all,), which of them in all processes.
    """
    return Batch(inputs, targets[torch.from_numpy(part)], targets[torch.from_numpy(whole)])


class Images:
    """Image files, decoded in threads and kept in memory as far as it reaches.

    Args:
        files: paths.
        n_threads: decoding threads; None for one a core.
        cache_bytes: memory for decoded images.
    """

    def __init__(
        self, files: Sequence[str], *, n_threads: int | None = None, cache_bytes: int = 0
    ) -> None:
        self.files = list(files)
        self._n_threads = n_threads or os.cpu_count() or 1
        self._free_bytes = cache_bytes
        self._kept: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def scan(
        self, on_progress: Callable[[int], None] = lambda _: None, team: Team = ALONE
    ) -> tuple[list[bytes], dict[int, str]]:
        """Read and decode every file once.

        Args:
            on_progress: is told how many more were read.
            team: processes that read a part each, and tell each other of it.

        Returns:
            sha256 of each file, 32 bytes; and why files cannot be used, by row.
        """
        rows = team.part(np.arange(len(self.files))).tolist()

        def read() -> list[tuple[bytes, str]]:
            found = []
            for one in self._load(rows, lambda pixels, _: pixels[:, :1, :1]):
                found.append((one.digest, one.failure))
                on_progress(1)
            return found

        found = [one for part in team.each(read) for one in part]
        failures = {row: failure for row, (_, failure) in enumerate(found) if failure}
        return [digest for digest, _ in found], failures

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all files but these, which become rows 0, 1, …."""
        self.files = [self.files[row] for row in rows]
        places = {row: place for place, row in enumerate(rows)}
        self._kept = {places[row]: kept for row, kept in self._kept.items() if row in places}

    def views(self, rows: Iterable[int], view: View) -> Generator[torch.Tensor]:
        """A view of each row, in order.

        Args:
            rows: of ``files``.
            view: makes it, in a thread.

        Raises:
            DataError: a file can no longer be used.
        """
        rows = list(rows)
        with closing(self._load(rows, view)) as stream:
            for row, one in zip(rows, stream, strict=True):
                if one.failure:
                    raise DataError(
                        f"{self.files[row]} could be read when training began, and now cannot: "
                        f"{one.failure}.\n  Put it back, and go on with --resume."
                    )
                (pixels,) = one.pixels
                assert pixels is not None
                yield pixels

    def _load(self, rows: Iterable[int], view: View) -> Generator[Loaded]:
        lookahead = 4 * PLAIN_BATCH_SIZE
        return load_in_order(rows, partial(self._load_one, view), self._n_threads, lookahead)

    def _load_one(self, view: View, row: int) -> Loaded:
        pixels = self._kept.get(row)
        if pixels is not None:
            return Loaded(pixels=(view(pixels, row),))

        def make(pixels: torch.Tensor, _: bytes) -> torch.Tensor:
            self._keep(row, pixels)
            return view(pixels, row)

        one = load(self.files[row], [Demand(lambda _: False, make)])
        assert isinstance(one, Loaded)
        return one

    def _keep(self, row: int, pixels: torch.Tensor) -> None:
        with self._lock:
            if pixels.nbytes > self._free_bytes or row in self._kept:
                return
            self._free_bytes -= pixels.nbytes
            self._kept[row] = pixels


@dataclass(frozen=True)
class ImageBatches:
    """Some of the images with what is to be learned of them; see `Batches`.

    Attributes:
        images: all files.
        rows: which of them.
        ids: (n_rows,); an augmented view depends on seed, epoch and id.
        targets: (n_rows,) int64.
        preprocess: makes the plain view, and normalises.
        augment: makes the views of training.
        batch_size: samples a step, in all processes.
        seed: of order and views.
        team: processes that share every batch.
    """

    images: Images
    rows: Indices
    ids: NDArray[Any]
    targets: torch.Tensor
    preprocess: Preprocess
    augment: Augment
    batch_size: int
    seed: int
    team: Team = ALONE

    @property
    def n_steps(self) -> int:
        """Batches in an epoch."""
        return max(1, -(-len(self.rows) // self.batch_size))

    def training(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """The batches of an epoch from ``first_step`` on."""
        ids = dict(zip(self.rows.tolist(), self.ids, strict=True))

        def view(pixels: torch.Tensor, row: int) -> torch.Tensor:
            return self.augment(pixels, seed_of(self.seed, epoch, ids[row]))

        order = epoch_order(len(self.rows), self.batch_size, self.seed, epoch)
        return self._batches(order[first_step:], view, self.team)

    def plain(self) -> Generator[Batch]:
        """All samples as they are, in order; of several processes, each has its part of them."""
        order = plain_order(len(self.rows), self.team)
        return self._batches(order, lambda pixels, _: self.preprocess(pixels), ALONE)

    def to_device(self, inputs: torch.Tensor, device: torch.device) -> torch.Tensor:
        """(n, 3, height, width) float32, normalised on the device."""
        return self.preprocess.normalise(inputs.to(device, non_blocking=True))

    def take(self, n: int) -> ImageBatches:
        """At most ``n`` of its samples, spread over all of them."""
        if n >= len(self.rows):
            return self
        some = np.linspace(0, len(self.rows) - 1, n).astype(np.intp)
        return replace(
            self, rows=self.rows[some], ids=self.ids[some], targets=self.targets[some.tolist()]
        )

    def _batches(self, order: Sequence[Indices], view: View, team: Team) -> Generator[Batch]:
        parts = [team.part(whole) for whole in order]
        rows = [row for part in parts for row in self.rows[part].tolist()]
        with closing(self.images.views(rows, view)) as stream:
            for part, whole in zip(parts, order, strict=True):
                views = torch.stack([next(stream).permute(1, 2, 0) for _ in part])
                # Channels lie side by side in memory, as the decoders give them.
                yield make_batch(views.permute(0, 3, 1, 2), self.targets, part, whole)
