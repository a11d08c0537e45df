"""Stored rows, block by block, in the order in which they lie in the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.heads.features import StoredFeatures

Array = NDArray[Any]
Indices = NDArray[np.intp]
T = TypeVar("T")

_READ_BYTES = 8  # a value of a block: those that are read at once, and as many ahead
_STRETCHES = 256  # in a shuffled block, where they are long enough to be worth reading
_STRETCH_ROWS = (32, 512)


class StoredRows:
    """Features that are read a block at a time; the next block while one is worked on.

    Args:
        features: where they are.
        block_rows: rows of a block at most. The files are read some blocks at a time, and rows
            that nobody asked for are read with the others.

    Attributes:
        n_passes: how often all rows, or some of them, were gone through.
    """

    def __init__(self, features: StoredFeatures, block_rows: int) -> None:
        self.features = features
        self.block_rows = block_rows
        self.n_passes = 0
        positions = features.file_positions()
        self._order = np.argsort(positions, kind="stable")
        self._positions = positions[self._order]

    def __len__(self) -> int:
        return len(self._order)

    @property
    def n_features(self) -> int:
        """Columns."""
        return self.features.shape[1]

    def blocks(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[Indices, Array]]:
        """One pass.

        Args:
            wanted: (n_samples,), the samples to go through.

        Yields:
            Samples (n,), and their features (n, n_features) as they are stored.
        """
        read = self._read_ahead(self._stretches(wanted), self.features.__getitem__)
        for samples, features in read:
            for start in range(0, len(samples), self.block_rows):
                own = slice(start, start + self.block_rows)
                yield samples[own], features[own]

    def gathered(self, wanted: NDArray[np.bool_], n_rows: int) -> Iterator[tuple[Indices, Array]]:
        """One pass in blocks that are joined until they hold ``n_rows`` of the wanted samples.

        Yields:
            As :meth:`blocks`; more rows than asked for by a block at most.
        """
        held: list[tuple[Indices, Array]] = []
        for block in self.blocks(wanted):
            held.append(block)
            if sum(len(samples) for samples, _ in held) >= n_rows:
                joined, held = _joined(held), []
                yield joined
        if held:
            yield _joined(held)

    def shuffled(
        self, wanted: NDArray[np.bool_], n_rows: int, rng: np.random.Generator
    ) -> Iterator[tuple[Indices, Array]]:
        """One pass in blocks of rows from everywhere: stretches of the files, drawn at random.

        Files are sorted by class as often as not, so that neighbouring rows make no mixture. A
        block holds some hundred stretches of at most 512 rows; who goes through its rows in random
        order is near a random order of all.

        Args:
            wanted: (n_samples,), the samples to go through.
            n_rows: of a block; the last one may have fewer.
            rng: draws the stretches.

        Yields:
            Samples (n,), sorted, and their features (n, n_features) as they are stored.
        """
        samples = self._order[wanted[self._order]]
        shortest, longest = _STRETCH_ROWS
        length = min(max(n_rows // _STRETCHES, shortest), longest)
        stretches = np.split(np.arange(len(samples)), range(length, len(samples), length))
        order = rng.permutation(len(stretches))
        places = np.concatenate([stretches[i] for i in order])
        blocks = (
            np.split(own, np.flatnonzero(np.diff(own) != 1) + 1)
            for own in np.split(places, range(n_rows, len(places), n_rows))
        )
        stretched = ([samples[stretch] for stretch in block] for block in blocks)
        for block, features in self._read_ahead(stretched, self._read_stretches):
            yield np.sort(np.concatenate(block)), features

    def _read_stretches(self, stretches: list[Indices]) -> Array:
        """Features in the order of the samples, read stretch by stretch."""
        ends = np.cumsum([0, *map(len, stretches)])
        place = np.empty(ends[-1], dtype=np.intp)
        place[np.argsort(np.concatenate(stretches))] = np.arange(ends[-1])
        features: Array | None = None
        for stretch, (start, stop) in zip(stretches, pairwise(ends.tolist()), strict=True):
            found = self.features[stretch]
            if features is None:
                features = np.empty((ends[-1], found.shape[1]), found.dtype)
            features[place[start:stop]] = found
        assert features is not None
        return features

    def _read_ahead(
        self, parts: Iterator[T], read: Callable[[T], Array]
    ) -> Iterator[tuple[T, Array]]:
        """One pass: each part and its features, the next ones being read meanwhile."""
        self.n_passes += 1
        with ThreadPoolExecutor(1) as reader:
            pending = None
            for part in parts:
                ahead = reader.submit(read, part)
                if pending is not None:
                    yield pending[0], pending[1].result()
                pending = part, ahead
            if pending is not None:
                yield pending[0], pending[1].result()

    def _stretches(self, wanted: NDArray[np.bool_]) -> Iterator[Indices]:
        if not len(self):
            return
        # To open a file takes as long as to read some hundred rows of it.
        n_rows = self.block_rows * max(1, _READ_BYTES // self.features.dtype.itemsize)
        edges = np.arange(self._positions[0], self._positions[-1] + 1, n_rows)
        places = np.append(np.searchsorted(self._positions, edges), len(self))
        for start, stop in pairwise(places.tolist()):
            samples = self._order[start:stop]
            samples = samples[wanted[samples]]
            if len(samples):
                yield samples


def _joined(blocks: list[tuple[Indices, Array]]) -> tuple[Indices, Array]:
    if len(blocks) == 1:
        return blocks[0]
    return np.concatenate([own for own, _ in blocks]), np.concatenate([X for _, X in blocks])
