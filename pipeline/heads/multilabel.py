"""Logistic regression of many labels at once, where a sample has any number of them."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.utils.validation import validate_data

from pipeline.heads.base import Array, Head, predict_inputs, sample_weights, solver_device
from pipeline.heads.solvers.linear import fit_logistic_multilabel


class MultiLabelLogisticHead(Head):
    """A logistic regression a label, all solved together.

    Args:
        C: inverse strength of the L2 penalty on the summed loss of a label.
        tol: the solver stops within this part of the objective from its optimum.
        max_iter: Newton steps at most; ``converged_`` says whether they were enough.
        device: where to solve: "cpu", "cuda", or "auto" for a GPU where there is one.

    Attributes:
        classes_: (n_labels,), their places 0 … n_labels - 1.
        coef_: (n_labels, n_features), zero for a label without two values.
        intercept_: (n_labels,).
        n_iter_: steps of the label that took most.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        tol: float = 1e-4,
        max_iter: int = 100,
        device: str = "cpu",
    ) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter
        self.device = device

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples, n_labels) of 0 and 1; NaN is unknown.

        Raises:
            ValueError: what scikit-learn refuses; fewer than two labels; other values than these;
                a label of which nothing is known.
        """
        self.check_params()
        X, labels = validate_data(
            self,
            X,
            y,
            validate_separately=(
                {"dtype": [np.float32, np.float64]},
                {"dtype": np.float64, "ensure_all_finite": "allow-nan"},
            ),
        )
        if labels.shape[1] < 2:
            raise ValueError("y has 1 label, expected 2 or more; LogisticHead fits a single one")
        self.classes_ = np.arange(labels.shape[1])
        found = fit_logistic_multilabel(
            X,
            labels,
            [self.C],
            sample_weight=sample_weights(X, labels, None, sample_weight),
            tol=self.tol,
            max_iter=self.max_iter,
            device=solver_device(self.device),
        )
        self.coef_ = np.ascontiguousarray(found.coef[0, 0])
        self.intercept_ = found.intercept[0, 0].astype(X.dtype)
        self.n_iter_, self.converged_ = int(found.n_iter[0, 0]), bool(found.converged[0, 0])
        return self

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        if not self.C > 0:
            raise ValueError(f"C is {self.C}, expected a number above 0")

    def logits(self, X: Array) -> Array:
        """Log-odds of every label (n_samples, n_labels)."""
        scores: Array = predict_inputs(self, X) @ self.coef_.T + self.intercept_
        return scores

    def predict(self, X: Array) -> NDArray[np.int64]:
        """1 where a label is likelier than not: (n_samples, n_labels)."""
        return (self.logits(X) > 0).astype(np.int64)

    def predict_proba(self, X: Array) -> NDArray[Any]:
        """Probability of each label (n_samples, n_labels); rows do not sum to 1."""
        probabilities: NDArray[Any] = expit(self.logits(X).astype(np.float64))
        return probabilities

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {"coef_": ("classes", "features"), "intercept_": ("classes",)}
