"""Scores of predicted probabilities, each with its 95 % bootstrap interval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Array = NDArray[Any]

ECE_BINS = 15
MIN_CLASSES_FOR_TOP5 = 10
N_RESAMPLES = 1000
PROBABILITY_FLOOR = float(np.finfo(np.float32).eps)
"""A probability of zero for the true class costs -log of this, 15.9 nats, not infinity."""

_RESAMPLES_A_BLOCK = 50
_RESAMPLE_BYTES = 2**25
_TAIL = 0.025


@dataclass(frozen=True)
class Score:
    """A figure and its 95 % interval.

    Attributes:
        value: on the samples as they are.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float]:
        """value, low and high, for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def evaluate(
    labels: Array, probabilities: Array, *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> dict[str, Score]:
    """Score predictions: top1, top5 (10 classes or more), macro_f1, ... with intervals.

    ``macro_f1`` averages over the classes that occur as truth or prediction,
    ``mean_per_class_accuracy`` over those that occur as truth; ``nll`` is in nats; ``ece`` has 15
    bins of equal width over the largest probability (Guo et al., 2017). Intervals are percentile
    bootstrap; one that misses its own estimate, as for the biased ECE, is widened to hold it. Where
    every sample is right (or wrong), resampling knows no doubt, and the exact binomial bound
    stands in for top1 and top5.

    Args:
        labels: (n_samples,), int class indices.
        probabilities: (n_samples, n_classes), rows that sum to 1.
        seed: of the resampling.
        n_resamples: bootstrap resamples.

    Raises:
        ValueError: no samples, or probabilities that are not finite.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    n_samples, n_classes = probabilities.shape
    if n_samples == 0 or not np.isfinite(probabilities).all():
        raise ValueError(f"{n_samples} samples to score, expected 1 or more, all finite")
    table = contributions(labels, probabilities)
    return scores_of(table, n_classes, seed=seed, n_resamples=n_resamples)


def scores_of(
    table: csr_array, n_classes: int, *, seed: int = 0, n_resamples: int = N_RESAMPLES
) -> dict[str, Score]:
    """Scores and intervals from what each sample adds to them; see :func:`evaluate`.

    Args:
        table: (n_samples, n_sums), of :func:`contributions`.
        n_classes: that it was made with.
        seed: of the resampling.
        n_resamples: bootstrap resamples.
    """
    n_samples = table.shape[0]
    values = _summarise(np.ones((1, n_samples)) @ table, n_samples, n_classes)
    resampled = [
        _summarise(counts @ table, n_samples, n_classes)
        for counts in _resample_counts(n_samples, n_resamples, seed)
    ]
    scores = {}
    for name, (value,) in values.items():
        draws = np.concatenate([block[name] for block in resampled] or [np.array([value])])
        low, high = np.quantile(draws, [_TAIL, 1 - _TAIL])
        if name in ("top1", "top5") and value in (0.0, 1.0):
            doubt = 1 - _TAIL ** (1 / n_samples)
            low, high = (0.0, doubt) if value == 0 else (1 - doubt, 1.0)
        scores[name] = Score(float(value), float(min(low, value)), float(max(high, value)))
    return scores


def confusion_matrix(labels: Array, predicted: Array, n_classes: int) -> NDArray[np.int64]:
    """Counts (n_classes, n_classes): true class by row, predicted class by column."""
    flat = np.bincount(labels * n_classes + predicted, minlength=n_classes**2)
    return flat.reshape(n_classes, n_classes).astype(np.int64)


def rank_of_truth(labels: Array, probabilities: Array) -> NDArray[np.intp]:
    """How many classes stand before the true one (n_samples,); of equals, the earlier column."""
    true = probabilities[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(probabilities.shape[1]) < labels[:, None]
    before = (probabilities > true) | ((probabilities == true) & earlier)
    rank: NDArray[np.intp] = before.sum(axis=1)
    return rank


def contributions(labels: Array, probabilities: Array) -> csr_array:
    """What one sample adds to each sum that the scores are made of, (n_samples, n_sums), sparse.

    Columns: right, right within five, negative log-likelihood; then for each class right, true,
    predicted; then for each ECE bin confidence minus right.
    """
    n_samples, n_classes = probabilities.shape
    rows = np.arange(n_samples)
    predicted = probabilities.argmax(axis=1)
    rank = rank_of_truth(labels, probabilities)
    right = (rank == 0).astype(np.float64)
    confidence = probabilities[rows, predicted]
    nll = -np.log(np.maximum(probabilities[rows, labels], PROBABILITY_FLOOR))
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    ones = np.ones(n_samples)
    entries: list[tuple[Any, Array]] = [
        (0, right),
        (1, (rank < 5).astype(np.float64)),
        (2, nll),
        (3 + labels, right),
        (3 + n_classes + labels, ones),
        (3 + 2 * n_classes + predicted, ones),
        (3 + 3 * n_classes + bins, confidence - right),
    ]
    columns = np.stack([np.broadcast_to(column, n_samples) for column, _ in entries], axis=1)
    values = np.stack([value for _, value in entries], axis=1)
    return csr_array(
        (values.ravel(), (np.repeat(rows, len(entries)), columns.ravel())),
        shape=(n_samples, 3 + 3 * n_classes + ECE_BINS),
    )


def _summarise(sums: Array, n_samples: int, n_classes: int) -> dict[str, NDArray[np.float64]]:
    """Scores of each resample from its sums (n_resamples, n_sums)."""
    right, true, predicted = (
        sums[:, 3 + i * n_classes : 3 + (i + 1) * n_classes] for i in range(3)
    )
    gaps = sums[:, 3 + 3 * n_classes :]
    scores = {"top1": sums[:, 0] / n_samples}
    if n_classes >= MIN_CLASSES_FOR_TOP5:
        scores["top5"] = sums[:, 1] / n_samples
    scores["macro_f1"] = _mean_where(2 * right, true + predicted)
    scores["mean_per_class_accuracy"] = _mean_where(right, true)
    scores["nll"] = sums[:, 2] / n_samples
    scores["ece"] = np.abs(gaps).sum(axis=1) / n_samples
    return scores


def _mean_where(numerator: Array, denominator: Array) -> NDArray[np.float64]:
    """Mean over the columns of numerator / denominator, where the denominator is not zero."""
    known = denominator > 0
    ratio = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=known)
    result: NDArray[np.float64] = ratio.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return result


def _resample_counts(n_samples: int, n_resamples: int, seed: int) -> Iterator[Array]:
    """How often each resample draws each sample: blocks of (n_block, n_samples) float64."""
    rng = np.random.default_rng(seed)
    n_at_once = max(1, min(_RESAMPLES_A_BLOCK, _RESAMPLE_BYTES // (24 * n_samples)))
    for start in range(0, n_resamples, n_at_once):
        n_block = min(n_at_once, n_resamples - start)
        drawn = rng.integers(0, n_samples, (n_block, n_samples))
        drawn += np.arange(n_block)[:, None] * n_samples
        counts = np.bincount(drawn.ravel(), minlength=n_block * n_samples)
        yield counts.reshape(n_block, n_samples).astype(np.float64)
