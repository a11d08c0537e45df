"""Scores of predictions that are seen a block at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack

from pipeline.heads import metrics
from pipeline.heads.metrics import N_RESAMPLES, Score, confusion_matrix

Array = NDArray[Any]

_RESAMPLE_BYTES = 2**25


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
        self._tables.append(metrics._contributions(self.truth[places], probabilities))

    def scores(self, *, seed: int = 0, n_resamples: int = N_RESAMPLES) -> dict[str, Score]:
        """As :func:`pipeline.heads.metrics.evaluate` on all probabilities at once."""
        order = np.argsort(np.concatenate(self._places), kind="stable")
        table = vstack(self._tables, format="csr")[order]
        n_samples = len(self)
        values = metrics._summarise(np.ones((1, n_samples)) @ table, n_samples, self.n_classes)
        rng = np.random.default_rng(seed)
        n_block = max(1, min(50, _RESAMPLE_BYTES // (24 * n_samples)))
        resampled = []
        for start in range(0, n_resamples, n_block):
            n = min(n_block, n_resamples - start)
            drawn = rng.integers(0, n_samples, (n, n_samples))
            drawn += np.arange(n)[:, None] * n_samples
            counts = np.bincount(drawn.ravel(), minlength=n * n_samples).reshape(n, n_samples)
            sums = counts.astype(np.float64) @ table
            resampled.append(metrics._summarise(sums, n_samples, self.n_classes))
        return {
            name: _score(name, value, [block[name] for block in resampled], n_samples)
            for name, (value,) in values.items()
        }

    def confusion(self) -> NDArray[np.int64]:
        """Counts (n_classes, n_classes): true class by row, predicted class by column."""
        return confusion_matrix(self.truth, self.predicted, self.n_classes)


def _score(name: str, value: float, draws: list[Array], n_samples: int) -> Score:
    tail = metrics._TAIL
    low, high = np.quantile(np.concatenate(draws or [np.array([value])]), [tail, 1 - tail])
    if name in ("top1", "top5") and value in (0.0, 1.0):
        doubt = 1 - tail ** (1 / n_samples)
        low, high = (0.0, doubt) if value == 0 else (1 - doubt, 1.0)
    return Score(float(value), float(min(low, value)), float(max(high, value)))
