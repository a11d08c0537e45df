"""Multinomial logistic regression."""

from __future__ import annotations

from typing import Any, Self

from numpy.typing import NDArray

from pipeline.heads.base import (
    Array,
    Head,
    decision,
    fit_inputs,
    linear_logits,
    predict_inputs,
    sample_weights,
    softmax,
)
from pipeline.heads.solvers.lbfgs import fit_linear, softmax_loss


class LogisticHead(Head):
    """Softmax regression with an L2 penalty, as scikit-learn's ``LogisticRegression``.

    Args:
        C: inverse strength of the penalty on the summed loss.
        class_weight: None, "balanced" or {class: weight}.
        tol: largest gradient entry of the mean objective at which the solver stops.
        max_iter: L-BFGS iterations at most; ``converged_`` says whether they were enough.

    Attributes:
        coef_: (n_classes, n_features), or (1, n_features) for two classes.
        intercept_: (n_classes,) or (1,).
        n_iter_: iterations that were made.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        class_weight: Any = None,
        tol: float = 1e-4,
        max_iter: int = 1000,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,)."""
        self.check_params()
        X, index = fit_inputs(self, X, y)
        weights = sample_weights(X, self.classes_[index], self.class_weight, sample_weight)
        n_classes = len(self.classes_)
        solution = fit_linear(
            X,
            softmax_loss(index, n_classes, weights),
            1 if n_classes == 2 else n_classes,
            C=self.C,
            total_weight=float(weights.sum()),
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self.coef_, self.intercept_ = solution.coef, solution.intercept
        self.n_iter_, self.converged_ = solution.n_iter, solution.converged
        return self

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        if not self.C > 0:
            raise ValueError(f"C is {self.C}, expected a number above 0")

    def logits(self, X: Array) -> Array:
        """Unnormalised log-probabilities (n_samples, n_classes)."""
        return linear_logits(predict_inputs(self, X), self.coef_, self.intercept_)

    def decision_function(self, X: Array) -> Array:
        """scikit-learn's scores: (n_samples, n_classes), or (n_samples,) for two classes."""
        return decision(self.logits(X))

    def predict_proba(self, X: Array) -> NDArray[Any]:
        """Probabilities (n_samples, n_classes)."""
        return softmax(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {"coef_": ("outputs", "features"), "intercept_": ("outputs",)}
