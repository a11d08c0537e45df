"""What every solver checks of features, labels, weights and penalties."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.heads.base import Array


def checked_features(X: Array) -> Array:
    """X as a matrix of float32 or float64.

    Raises:
        ValueError: no matrix with a row and a column, or a value that is not finite.
    """
    X = np.asarray(X)
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X has shape {X.shape}, expected (n_samples, n_features), both above 0")
    if X.dtype not in (np.float32, np.float64):
        X = X.astype(np.float64)
    if not np.isfinite(X).all():
        n_bad = int((~np.isfinite(X)).sum())
        raise ValueError(f"X holds NaN or infinity in {n_bad:,} places, expected finite numbers")
    return X


def class_indices(
    y: Array, n_samples: int, sample_weight: Array | None = None
) -> tuple[NDArray[np.int64], int]:
    """Labels as int64, and the number of classes.

    Raises:
        ValueError: not one class index a sample, or samples of one class only.
    """
    truth = np.asarray(y)
    if truth.shape != (n_samples,) or truth.dtype.kind not in "iu":
        raise ValueError(
            f"y holds {truth.dtype} of shape {truth.shape}, expected class indices of shape "
            f"({n_samples},)"
        )
    if n_samples and truth.min() < 0:
        raise ValueError(f"y holds {truth.min()}, expected class indices from 0")
    if sample_weight is None:
        n_found = len(np.unique(truth))
    else:
        n_found = len(np.unique(truth[np.atleast_2d(sample_weight).any(axis=0)]))
    if n_found < 2:
        raise ValueError(f"y has samples of {n_found} class, expected at least 2 classes")
    return truth.astype(np.int64), int(truth.max()) + 1


def signs_of(truth: NDArray[np.int64], n_classes: int, dtype: torch.dtype) -> Tensor:
    """(n_samples, n_outputs) of +1 and -1; one output for two classes, +1 for the second."""
    index = torch.tensor(truth)
    if n_classes == 2:
        return (2 * index[:, None] - 1).to(dtype)
    return (2 * torch.nn.functional.one_hot(index, n_classes) - 1).to(dtype)


def label_weights(
    labels: NDArray[np.float64], n_samples: int, sample_weight: Array | None
) -> NDArray[np.float64]:
    """Weight of every label of every sample (n_samples, n_labels), 0 where it is NaN.

    Raises:
        ValueError: labels other than 0, 1 and NaN, or a label of which nothing is known; weights
            that do not fit.
    """
    if labels.ndim != 2 or len(labels) != n_samples or not labels.shape[1]:
        raise ValueError(f"y has shape {labels.shape}, expected ({n_samples}, n_labels)")
    known = ~np.isnan(labels)
    odd = labels[known & (labels != 0) & (labels != 1)]
    if len(odd):
        raise ValueError(f"y holds {odd[0]:g}, expected 0, 1 or NaN for what is not known")
    weights = known.astype(np.float64)
    if sample_weight is not None:
        weights *= checked_weights(sample_weight, n_samples)[:, None]
    unknown = np.flatnonzero(weights.sum(axis=0) == 0)
    if len(unknown):
        raise ValueError(f"Label {unknown[0]} of y is known of no sample with a weight above 0")
    return weights


def checked_weights(sample_weight: Any, n_samples: int) -> NDArray[np.float64]:
    """(n_samples,) float64.

    Raises:
        ValueError: another shape; a weight below zero or not finite, or all of them zero.
    """
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n_samples,):
        raise ValueError(f"sample_weight has shape {weights.shape}, expected ({n_samples},)")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError("sample_weight must be finite, not negative, and not all zero")
    return weights


def checked_penalties(values: Any, name: str) -> NDArray[np.float64]:
    """A vector of positive finite numbers.

    Raises:
        ValueError: empty, or a value that is not above 0.
    """
    numbers = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"{name} has shape {numbers.shape}, expected one number or a vector")
    bad = numbers[~(np.isfinite(numbers) & (numbers > 0))]
    if len(bad):
        raise ValueError(f"{name} is {bad[0]}, expected a number above 0")
    return numbers


def checked_folds(
    sample_weight: Array | None, n_samples: int, truth: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """Weights of every fold, (n_folds, n_samples) float64.

    Raises:
        ValueError: another shape, a weight below zero, or a fold with fewer than two classes.
    """
    if sample_weight is None:
        return None
    weights = np.atleast_2d(np.asarray(sample_weight, dtype=np.float64))
    if weights.ndim != 2 or weights.shape[1] != n_samples:
        raise ValueError(
            f"sample_weight has shape {np.shape(sample_weight)}, expected ({n_samples},) or "
            f"(n_folds, {n_samples})"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("sample_weight holds a value below 0 or not finite")
    for i, weight in enumerate(weights):
        n_found = len(np.unique(truth[weight > 0]))
        if n_found < 2:
            raise ValueError(
                f"Fold {i} has samples of {n_found} class with a weight above 0, "
                "expected at least 2 classes"
            )
    return weights
