"""Whether one classifier is better than another on the same samples, or only luckier."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from pipeline.heads.metrics import N_RESAMPLES, Score

_TAIL = 0.025


def mcnemar(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> float:
    """Two-sided exact p-value that both are right equally often (McNemar, 1947).

    Only samples that one of them has right and the other wrong say anything: of those, each side
    would have half.

    Args:
        right_a: (n_samples,), whether the first classifier is right.
        right_b: (n_samples,), the same of the second.

    Returns:
        Between 0 and 1; 1 where they never differ.
    """
    n_a, n_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return float(binomtest(n_a, n_a + n_b).pvalue) if n_a + n_b else 1.0


def accuracy_difference(
    right_a: NDArray[np.bool_], right_b: NDArray[np.bool_], *, seed: int = 0
) -> Score:
    """Accuracy of the first less that of the second, with its paired 95 % bootstrap interval.

    Args:
        right_a: (n_samples,), whether the first classifier is right.
        right_b: (n_samples,), the same of the second.
        seed: of the resampling.
    """
    n_samples = len(right_a)
    n_plus, n_minus = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    # A resample of the samples draws each of three outcomes as often as a multinomial does.
    shares = np.array([n_plus, n_minus, n_samples - n_plus - n_minus]) / n_samples
    drawn = np.random.default_rng(seed).multinomial(n_samples, shares, size=N_RESAMPLES)
    differences = (drawn[:, 0] - drawn[:, 1]) / n_samples
    low, high = np.quantile(differences, [_TAIL, 1 - _TAIL])
    return Score((n_plus - n_minus) / n_samples, float(low), float(high))
