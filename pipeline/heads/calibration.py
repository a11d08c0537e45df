"""One temperature that turns decision values into probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from pipeline.heads.base import softmax

Array = NDArray[Any]

_LOWEST, _HIGHEST = 1e-3, 1e3


def fit_temperature(logits: Array, labels: Array) -> float:
    """Temperature T for which softmax(logits / T) has the lowest negative log-likelihood.

    Guo et al., "On calibration of modern neural networks", 2017, section 4.2; targets are
    smoothed by one sample's worth of ignorance (Platt, 1999), so that T stays above zero when
    every sample is right. The likeliest class never changes.

    Args:
        logits: (n_samples, n_classes); -inf for a class that was not known to the head.
        labels: (n_samples,), int class indices.

    Returns:
        T, between 0.001 and 1000; 1.0 where no sample's class is known to the head.
    """
    rows = np.arange(len(labels))
    usable = np.isfinite(logits[rows, labels]) if len(labels) else np.zeros(0, dtype=bool)
    logits, labels = np.asarray(logits[usable], dtype=np.float64), labels[usable]
    if not len(labels):
        return 1.0
    rows = rows[: len(labels)]
    known = np.isfinite(logits)
    smoothing = 1 / (len(labels) + 1)

    def loss(log_temperature: float) -> float:
        probabilities = softmax(logits / np.exp(log_temperature))
        log_probabilities = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
        everyone = np.where(known, log_probabilities, 0).sum(axis=1) / known.sum(axis=1)
        true = log_probabilities[rows, labels]
        return -float(((1 - smoothing) * true + smoothing * everyone).mean())

    found = minimize_scalar(loss, bounds=(np.log(_LOWEST), np.log(_HIGHEST)), method="bounded")
    return float(np.exp(found.x))
