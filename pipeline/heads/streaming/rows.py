"""Stored rows, block by block, in the order in which they lie in the files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.heads.features import StoredFeatures

Array = NDArray[Any]
Indices = NDArray[np.intp]


class StoredRows:
    """Features that are read a block at a time; the next block while one is worked on.

    Args:
        features: where they are.
        block_rows: rows of the files that a block spans at most. Those that nobody asked for
            count, since they are read too.

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
        self.n_passes += 1
        with ThreadPoolExecutor(1) as reader:
            pending = None
            for samples in self._stretches(wanted):
                ahead = reader.submit(self.features.__getitem__, samples)
                if pending is not None:
                    yield pending[0], pending[1].result()
                pending = samples, ahead
            if pending is not None:
                yield pending[0], pending[1].result()

    def _stretches(self, wanted: NDArray[np.bool_]) -> Iterator[Indices]:
        if not len(self):
            return
        edges = np.arange(self._positions[0], self._positions[-1] + 1, self.block_rows)
        places = np.append(np.searchsorted(self._positions, edges), len(self))
        for start, stop in pairwise(places.tolist()):
            samples = self._order[start:stop]
            samples = samples[wanted[samples]]
            if len(samples):
                yield samples
