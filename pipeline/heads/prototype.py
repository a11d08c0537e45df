"""Nearest class mean."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.metaestimators import available_if

from pipeline.heads.base import Array, Head, decision, fit_inputs, predict_inputs, sample_weights
from pipeline.heads.partial import keeps_sums, partial_inputs, partial_weights
from pipeline.heads.scaling import l2_normalise
from pipeline.heads.streaming.moments import class_sums

NORMALISATIONS = ("cl2n", "l2n", "none")


def _takes_parts(head: Any) -> bool:
    """Whether samples can be taken in parts; of a ``partial_fit`` that is not there, why not."""
    if head.normalise == "cl2n":
        raise AttributeError(
            "normalise is 'cl2n', which takes the mean of all samples off each of them: "
            "partial_fit, which sees them in parts, needs 'l2n' or 'none'"
        )
    return keeps_sums(head)


class PrototypeHead(Head):
    """Nearest class mean (Wang et al., "SimpleShot", 2019, section 3).

    It works from one sample a class, and does its own scaling. Weights of classes would cancel:
    a class's mean does not depend on how often it was seen.

    Args:
        normalise: "cl2n": centre, then scale each sample to length one; "l2n": scale only;
            "none": take the features as they are.

    Attributes:
        mean_: (n_features,), of the training samples; zeros where they are not centred.
        prototypes_: (n_classes, n_features), class means of the normalised samples.
    """

    _sums: tuple[Array, Array] | None = None

    def __init__(self, *, normalise: str = "cl2n") -> None:
        self.normalise = normalise

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        if self.normalise not in NORMALISATIONS:
            raise ValueError(
                f"normalise is {self.normalise!r}, expected one of {', '.join(NORMALISATIONS)}"
            )

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,), weighted by (n_samples,)."""
        self.check_params()
        X, index = fit_inputs(self, X, y)
        weights = sample_weights(X, index, None, sample_weight)
        totals = np.bincount(index, weights, minlength=len(self.classes_))
        if (weights < 0).any() or not totals.all():
            raise ValueError(
                "sample_weight is negative somewhere, or 0 for all samples of class "
                f"{self.classes_[totals.argmin()]!r}"
            )
        self.mean_ = np.zeros(X.shape[1], dtype=X.dtype)
        if self.normalise == "cl2n":
            centre = totals / totals.sum() @ _class_means(X, index, weights)
            self.mean_ = centre.astype(X.dtype)
        self.prototypes_ = _class_means(self._normalised(X), index, weights).astype(X.dtype)
        self.converged_ = True
        self._sums = None
        return self

    @available_if(_takes_parts)  # type: ignore[untyped-decorator]
    def partial_fit(
        self,
        X: Array,
        y: Array,
        classes: Array | None = None,
        sample_weight: Array | None = None,
    ) -> Self:
        """Add a part of the samples: the class means are those of all parts, exactly.

        A class that no part has shown yet is never predicted; its prototype is NaN.

        Args:
            X: (n_samples, n_features).
            y: (n_samples,).
            classes: all there will be; needed with the first part.
            sample_weight: (n_samples,).

        Raises:
            ValueError: samples that do not fit.
            AttributeError: there is no such method where ``normalise`` is "cl2n", nor after
                :meth:`fit`, which keeps no sums.
        """
        self.check_params()
        X, index = partial_inputs(self, X, y, classes)
        weights = partial_weights(self, index, sample_weight)
        n_classes = len(self.classes_)
        sums, totals = self._sums or (np.zeros((n_classes, X.shape[1])), np.zeros(n_classes))
        self.mean_ = np.zeros(X.shape[1], dtype=X.dtype)
        rows = self._normalised(X) * weights[:, None]
        sums = sums + class_sums(rows, index.astype(np.int64), n_classes)
        totals = totals + np.bincount(index, weights, minlength=n_classes)
        self._sums = sums, totals
        means = np.full_like(sums, np.nan)
        np.divide(sums, totals[:, None], out=means, where=totals[:, None] > 0)
        self.prototypes_ = means.astype(X.dtype)
        self.converged_ = True
        return self

    def _normalised(self, X: Array) -> Array:
        return X if self.normalise == "none" else l2_normalise(X - self.mean_)

    def logits(self, X: Array) -> Array:
        """Minus half the squared distance to each prototype, up to a constant of the sample."""
        normalised = self._normalised(predict_inputs(self, X))
        result: Array = (
            normalised @ self.prototypes_.T - np.square(self.prototypes_).sum(axis=1) / 2
        )
        result[:, np.isnan(self.prototypes_[:, 0])] = -np.inf
        return result

    def decision_function(self, X: Array) -> Array:
        """scikit-learn's scores: (n_samples, n_classes), or (n_samples,) for two classes."""
        return decision(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {"mean_": ("features",), "prototypes_": ("classes", "features")}


def _class_means(X: Array, index: NDArray[np.intp], weights: Array) -> NDArray[np.float64]:
    """Weighted means (n_classes, n_features) of samples X (n_samples, n_features)."""
    means = []
    for code in range(index.max() + 1):
        of_class = index == code
        means.append(weights[of_class] / weights[of_class].sum() @ X[of_class])
    return np.stack(means)
