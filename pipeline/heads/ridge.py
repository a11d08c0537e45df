"""Least squares on ±1 targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from sklearn.utils.metaestimators import available_if

from pipeline.heads.base import (
    Array,
    Head,
    decision,
    fit_inputs,
    linear_logits,
    predict_inputs,
    sample_weights,
    solver_device,
)
from pipeline.heads.folds import Fold, FoldResult
from pipeline.heads.linear_path import try_linear_settings
from pipeline.heads.partial import keeps_sums, partial_inputs, partial_weights
from pipeline.heads.scaling import Scaler
from pipeline.heads.solvers.ridge import fit_ridge_folds
from pipeline.heads.streaming.moments import Moments
from pipeline.heads.streaming.ridge import solve_ridge


class RidgeHead(Head):
    """One ridge regression a class, solved in closed form in float64.

    Args:
        alpha: strength of the L2 penalty on the summed squares.
        class_weight: None, "balanced" or {class: weight}.
        device: where to solve: "cpu", "cuda", or "auto" for a GPU where there is one.

    Attributes:
        coef_: (n_classes, n_features), or (1, n_features) for two classes.
        intercept_: (n_classes,) or (1,).
    """

    _sums: Moments | None = None

    def __init__(
        self, alpha: float = 1.0, *, class_weight: Any = None, device: str = "cpu"
    ) -> None:
        self.alpha = alpha
        self.class_weight = class_weight
        self.device = device

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,)."""
        self.check_params()
        X, index = fit_inputs(self, X, y)
        weights = sample_weights(X, self.classes_[index], self.class_weight, sample_weight)
        found = fit_ridge_folds(
            X, index, [self.alpha], sample_weight=weights, device=solver_device(self.device)
        )
        self.coef_ = found.coef[0, 0].astype(X.dtype)
        self.intercept_ = found.intercept[0, 0].astype(X.dtype)
        self.converged_ = True
        self._sums = None
        return self

    @available_if(keeps_sums)  # type: ignore[untyped-decorator]
    def partial_fit(
        self,
        X: Array,
        y: Array,
        classes: Array | None = None,
        sample_weight: Array | None = None,
    ) -> Self:
        """Add a part of the samples: the fit is the one on all parts together, exactly.

        What is kept of them are sums and one matrix (n_features, n_features); each part costs the
        solution of one system of that size. A class that no part has shown yet is regressed to -1.

        Args:
            X: (n_samples, n_features).
            y: (n_samples,).
            classes: all there will be; needed with the first part.
            sample_weight: (n_samples,).

        Raises:
            ValueError: samples that do not fit.
            AttributeError: there is no such method where ``class_weight`` is "balanced", nor after
                :meth:`fit`, which keeps no sums.
            ArithmeticError: ``alpha`` is so small that it drowns in the rounding.
        """
        self.check_params()
        X, index = partial_inputs(self, X, y, classes)
        weights = partial_weights(self, index, sample_weight)
        if self._sums is None:
            self._sums = Moments.empty(X.mean(axis=0, dtype=np.float64), len(self.classes_))
        self._sums.add(X, index, weights)
        coef, intercept = _solved(self._sums, self.alpha)
        self.coef_, self.intercept_ = coef.astype(X.dtype), intercept.astype(X.dtype)
        self.converged_ = True
        return self

    @classmethod
    def try_settings(
        cls,
        settings: Sequence[Mapping[str, Any]],
        X: Array,
        y: Array,
        folds: Sequence[Fold],
        *,
        n_classes: int,
    ) -> Iterator[FoldResult]:
        """Every alpha of a fold comes from one eigendecomposition."""
        yield from try_linear_settings(
            cls,
            settings,
            X,
            y,
            folds,
            n_classes=n_classes,
            solver=lambda _: fit_ridge_folds,
            along="alpha",
        )

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}, expected a number above 0")

    def logits(self, X: Array) -> Array:
        """Regressed targets (n_samples, n_classes); no log-probabilities."""
        return linear_logits(predict_inputs(self, X), self.coef_, self.intercept_)

    def decision_function(self, X: Array) -> Array:
        """scikit-learn's scores: (n_samples, n_classes), or (n_samples,) for two classes."""
        return decision(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {"coef_": ("outputs", "features"), "intercept_": ("outputs",)}


def _solved(moments: Moments, alpha: float) -> tuple[Array, Array]:
    """Coefficients and intercepts of all classes; one nobody has seen is never predicted."""
    n_classes, n_features = moments.sums.shape[1:]
    known = np.flatnonzero(moments.counts[0])
    if not len(known):
        raise ValueError("sample_weight is 0 for all samples so far, expected one above 0")
    plain = Scaler("none", (n_features,))
    ((found, targets),) = solve_ridge(moments, [0], np.ones((1, n_classes)), plain, [alpha])
    if len(known) == 2:
        found, targets = np.concatenate([-found, found]), np.concatenate([-targets, targets])
    coef, intercept = np.zeros((n_classes, n_features)), np.full(n_classes, -1.0)
    coef[known], intercept[known] = found, targets
    return (coef[1:], intercept[1:]) if n_classes == 2 else (coef, intercept)
