"""Scores of predictions that are seen a block at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from pipeline.heads.metrics import (
    N_RESAMPLES,
    Score,
    confusion_matrix,
    contributions,
    scores_of,
)

Array = NDArray[Any]


class Outcomes:
    """What scores need to know of predictions: far less than the probabilities of every class.

    Args:
        rows: (n,), the samples that will be predicted, in the order that counts.
        codes: (n_samples,), class codes of all samples.
        n_classes: how many codes there are; the model may know fewer.

    Attributes:
        predicted: (n,), likeliest classes.
        confidence: (n,), their probabilities.
    """

    def __init__(self, rows: NDArray[np.intp], codes: Array, n_classes: int) -> None:
        self.truth = codes[rows]
        self.n_classes = n_classes
        self.predicted = np.zeros(len(rows), dtype=np.int32)
        self.confidence = np.zeros(len(rows))
        self._sorted = np.argsort(rows, kind="stable")
        self._rows = rows[self._sorted]
        self._tables: list[csr_array] = []
        self._places: list[NDArray[np.intp]] = []

    def __len__(self) -> int:
        return len(self.truth)

    def add(self, samples: NDArray[np.intp], probabilities: Array) -> None:
        """Take in the predictions (n, n_known_classes) of some of the rows, in any order."""
        places = self._sorted[np.searchsorted(self._rows, samples)]
        missing = self.n_classes - probabilities.shape[1]
        if missing:
            probabilities = np.pad(probabilities, ((0, 0), (0, missing)))
        self.predicted[places] = probabilities.argmax(axis=1)
        self.confidence[places] = probabilities.max(axis=1)
        self._places.append(places)
        self._tables.append(contributions(self.truth[places], probabilities))

    def scores(self, *, seed: int = 0, n_resamples: int = N_RESAMPLES) -> dict[str, Score]:
        """As :func:`pipeline.heads.metrics.evaluate` on all probabilities at once."""
        order = np.argsort(np.concatenate(self._places), kind="stable")
        table = vstack(self._tables, format="csr")[order]
        return scores_of(table, self.n_classes, seed=seed, n_resamples=n_resamples)

    def confusion(self) -> NDArray[np.int64]:
        """Counts (n_classes, n_classes): true class by row, predicted class by column."""
        return confusion_matrix(self.truth, self.predicted, self.n_classes)
