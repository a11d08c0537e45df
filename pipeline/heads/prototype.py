"""Nearest class mean."""

from __future__ import annotations

from typing import Self

import numpy as np

from pipeline.heads.base import Array, Head, decision, fit_inputs, predict_inputs
from pipeline.heads.scaling import l2_normalise


class PrototypeHead(Head):
    """Nearest class mean after centring and L2 normalisation (SimpleShot's CL2N).

    Wang et al., "SimpleShot", 2019, section 3. It has nothing to choose, works from one sample
    a class, and does its own scaling.

    Attributes:
        mean_: (n_features,), of the training samples.
        prototypes_: (n_classes, n_features), class means of the normalised samples.
    """

    def fit(self, X: Array, y: Array) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,)."""
        X, index = fit_inputs(self, X, y)
        self.mean_ = X.mean(axis=0, dtype=np.float64).astype(X.dtype)
        normalised = l2_normalise(X - self.mean_)
        self.prototypes_ = np.stack(
            [
                normalised[index == code].mean(axis=0, dtype=np.float64)
                for code in range(len(self.classes_))
            ]
        ).astype(X.dtype)
        self.converged_ = True
        return self

    def logits(self, X: Array) -> Array:
        """Minus half the squared distance to each prototype, up to a constant of the sample."""
        normalised = l2_normalise(predict_inputs(self, X) - self.mean_)
        result: Array = (
            normalised @ self.prototypes_.T - np.square(self.prototypes_).sum(axis=1) / 2
        )
        return result

    def decision_function(self, X: Array) -> Array:
        """scikit-learn's scores: (n_samples, n_classes), or (n_samples,) for two classes."""
        return decision(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {"mean_": ("features",), "prototypes_": ("classes", "features")}
