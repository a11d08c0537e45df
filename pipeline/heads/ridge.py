"""Least squares on ±1 targets."""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from scipy.linalg import LinAlgWarning
from sklearn.linear_model import RidgeClassifier

from pipeline.heads.base import (
    Array,
    Head,
    decision,
    fit_inputs,
    linear_logits,
    predict_inputs,
)


class RidgeHead(Head):
    """One ridge regression a class, solved in closed form in float64.

    Args:
        alpha: strength of the L2 penalty on the summed squares.
        class_weight: None, "balanced" or {class: weight}.

    Attributes:
        coef_: (n_classes, n_features), or (1, n_features) for two classes.
        intercept_: (n_classes,) or (1,).
    """

    def __init__(self, alpha: float = 1.0, *, class_weight: Any = None) -> None:
        self.alpha = alpha
        self.class_weight = class_weight

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,)."""
        X, index = fit_inputs(self, X, y)
        solver = RidgeClassifier(alpha=self.alpha, class_weight=self.class_weight)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LinAlgWarning)
            # In float32 the Gram matrix of a strong feature swallows a small alpha.
            solver.fit(X.astype(np.float64), self.classes_[index], sample_weight=sample_weight)
        self.coef_ = np.atleast_2d(solver.coef_).astype(X.dtype)
        self.intercept_ = np.atleast_1d(solver.intercept_).astype(X.dtype)
        self.converged_ = not caught
        return self

    def logits(self, X: Array) -> Array:
        """Regressed targets (n_samples, n_classes); no log-probabilities."""
        return linear_logits(predict_inputs(self, X), self.coef_, self.intercept_)

    def decision_function(self, X: Array) -> Array:
        """scikit-learn's scores: (n_samples, n_classes), or (n_samples,) for two classes."""
        return decision(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {"coef_": ("outputs", "features"), "intercept_": ("outputs",)}
