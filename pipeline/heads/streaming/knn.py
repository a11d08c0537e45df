"""Nearest neighbours whose samples stay in the store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import CorruptStoreError, MismatchError, StoreError
from pipeline.heads.base import Array
from pipeline.heads.features import InputBlock, StoredFeatures
from pipeline.heads.knn import KNNHead
from pipeline.heads.model import HeadModel
from pipeline.heads.scaling import Scaler
from pipeline.heads.streaming.rows import StoredRows
from pipeline.store import open_store

Indices = NDArray[np.intp]

_BLOCK_ROWS = 4096


class StoredSamples:
    """Samples of a search that are read block by block, and scaled.

    Args:
        rows: stored features.
        samples: (n,), those that may be found, in the order of their labels.
        scaler: of the features.
        mean: (n_features,), of the scaled samples.
    """

    def __init__(
        self, rows: StoredRows, samples: Indices, scaler: Scaler, mean: NDArray[np.float32]
    ) -> None:
        self.rows, self.samples, self.scaler = rows, samples, scaler
        self.mean = torch.from_numpy(mean)
        self._numbers = np.full(len(rows), -1, dtype=np.int64)
        self._numbers[samples] = np.arange(len(samples))

    @property
    def shape(self) -> tuple[int, int]:
        """(n_samples, n_features)."""
        return len(self.samples), self.rows.n_features

    def blocks(self, only: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass, see :class:`pipeline.heads.neighbours.SampleBlocks`."""
        wanted = self._numbers >= 0
        if only is not None:
            wanted[:] = False
            wanted[self.samples[only.numpy()]] = True
        for samples, raw in self.rows.blocks(wanted):
            yield torch.from_numpy(self._numbers[samples]), torch.from_numpy(self.scaler(raw))

    def places(self) -> NDArray[np.int64]:
        """(n_stores, n_samples), rows of the stores."""
        return np.stack([rows[self.samples] for rows in self.rows.features.rows]).astype(np.int64)

    def digest(self, store: int = 0) -> NDArray[np.uint8]:
        """(32,), sha256 over the images of the samples; the same in every store."""
        table, rows = self.rows.features.stores[store].table, self.rows.features.rows[store]
        digests = table.digests[table.ready[rows[self.samples]]]
        return np.frombuffer(hashlib.sha256(digests.tobytes()).digest(), np.uint8)


class StoredKNNHead(KNNHead):
    """A :class:`KNNHead` that reads its samples from the store at each search.

    Its arrays are the places of the samples, not the samples: a copy would be as large as what did
    not fit into memory.

    Attributes:
        samples_: where they are; a head that was loaded gets them from :func:`reopen`.
        rows_: (n_stores, n_samples), rows of the stores.
        mean_: (n_features,) float32, of the scaled samples.
        digest_: (32,) uint8, sha256 over the images of the samples.
    """

    samples_: StoredSamples

    @classmethod
    def over(
        cls, heads: Sequence[KNNHead], samples: StoredSamples, y: Array, variance: float
    ) -> list[StoredKNNHead]:
        """Heads on the same samples.

        Args:
            heads: whose parameters they take.
            samples: where they are.
            y: (n_samples,), their classes.
            variance: mean squared distance of the scaled samples to their mean.
        """
        classes, index = np.unique(y, return_inverse=True)
        weights, rows, digest = np.ones(len(index)), samples.places(), samples.digest()
        made = []
        for params in (head.get_params() for head in heads):
            head = cls(**params)
            head.samples_, head.rows_, head.digest_ = samples, rows, digest
            head.mean_ = samples.mean.numpy()
            head.classes_, head.index_, head.weights_ = classes, index.astype(np.int64), weights
            head.variance_ = np.float64(variance or 1.0)
            head.n_features_in_ = samples.shape[1]
            head.k_ = min(head.k, len(index))
            head.converged_ = True
            made.append(head)
        return made

    def samples(self) -> StoredSamples:
        """Where the neighbours are found."""
        return self.samples_

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {
            "rows_": ("stores", "samples"),
            "mean_": ("features",),
            "digest_": ("bytes",),
            "index_": ("samples",),
            "weights_": ("samples",),
            "variance_": (),
        }


def reopen(model: HeadModel, inputs: Sequence[InputBlock]) -> None:
    """Find the samples of a loaded model in their stores, where it is one of those that need it.

    Args:
        model: was loaded.
        inputs: the features that it takes.

    Raises:
        StoreError: a store is not there, is of another recipe, or its samples are others now.
    """
    head: Any = model.head
    if not isinstance(head, StoredKNNHead):
        return
    what = "The model is its training samples, which it reads from the store"
    again = "Put the store back where it was, or fit the head again."
    stores = []
    for block in inputs:
        try:
            stores.append(open_store(block.store))
        except StoreError as error:
            raise type(error)(f"{what} {block.store}:\n  {error}\n  {again}") from error
        if stores[-1].key != block.key:
            raise MismatchError(
                f"{what} {block.store}, but that is now of recipe {stores[-1].key[:8]}, not "
                f"{block.key[:8]}.\n  {again}"
            )
    if len(head.rows_) != len(stores) or head.rows_.dtype.kind not in "iu":
        raise CorruptStoreError(
            f"The model names rows of {len(head.rows_)} stores in {head.rows_.dtype}, expected "
            f"integers of {len(stores)}."
        )
    rows = tuple(own.astype(np.intp) for own in head.rows_)
    changed = "but samples were added or removed there since.\n  Fit the head again."
    for block, own, store in zip(inputs, rows, stores, strict=True):
        if own.min() < 0 or own.max() >= len(store):
            raise MismatchError(f"{what} {block.store}, {changed}")
    layers = tuple(block.layers for block in inputs)
    stored = StoredRows(StoredFeatures(tuple(stores), layers, rows), _BLOCK_ROWS)
    samples = StoredSamples(
        stored, np.arange(len(rows[0])), model.scaler, head.mean_.astype(np.float32)
    )
    for place, block in enumerate(inputs):
        if not np.array_equal(samples.digest(place), head.digest_):
            raise MismatchError(f"{what} {block.store}, {changed}")
    head.samples_ = samples
