"""Multinomial logistic regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
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
    solver_device,
)
from pipeline.heads.folds import Fold, FoldResult
from pipeline.heads.linear_path import try_linear_settings
from pipeline.heads.solvers.linear import Solution, fit_logistic
from pipeline.heads.solvers.proximal import fit_sparse_logistic

PENALTIES = ("l2", "l1", "elasticnet")


class LogisticHead(Head):
    """Softmax regression, at the optimum of scikit-learn's ``LogisticRegression``.

    Args:
        C: inverse strength of the penalty on the summed loss.
        penalty: "l2", "l1" or "elasticnet"; the intercept has none.
        l1_ratio: of an elastic net, the share of |coef| against ½ coef², between 0 and 1.
        class_weight: None, "balanced" or {class: weight}.
        tol: the solver stops within this part of the objective from its optimum.
        max_iter: steps at most, Newton's or, with an L1 penalty, those of proximal gradients;
            ``converged_`` says whether they were enough.
        device: where to solve: "cpu", "cuda", or "auto" for a GPU where there is one.

    Attributes:
        coef_: (n_classes, n_features), or (1, n_features) for two classes.
        intercept_: (n_classes,) or (1,).
        n_iter_: steps that were made.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        penalty: str = "l2",
        l1_ratio: float = 0.5,
        class_weight: Any = None,
        tol: float = 5e-5,
        max_iter: int = 5000,
        device: str = "cpu",
    ) -> None:
        self.C = C
        self.penalty = penalty
        self.l1_ratio = l1_ratio
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.device = device

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,)."""
        self.check_params()
        X, index = fit_inputs(self, X, y)
        weights = sample_weights(X, self.classes_[index], self.class_weight, sample_weight)
        found = self._solver()(
            X,
            index,
            [self.C],
            sample_weight=None if (weights == 1).all() else weights,
            tol=self.tol,
            max_iter=self.max_iter,
            device=solver_device(self.device),
        )
        self.coef_ = np.ascontiguousarray(found.coef[0, 0])
        self.intercept_ = found.intercept[0, 0].astype(X.dtype)
        self.n_iter_, self.converged_ = int(found.n_iter[0, 0]), bool(found.converged[0, 0])
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
        """Settings that differ in C only are solved together, and their folds too."""
        yield from try_linear_settings(
            cls, settings, X, y, folds, n_classes=n_classes, solver=cls._solver
        )

    def _solver(self) -> Callable[..., Solution]:
        """The solver of this penalty."""
        if self.penalty == "l2":
            return fit_logistic
        return partial(fit_sparse_logistic, l1_ratio=1.0 if self.penalty == "l1" else self.l1_ratio)

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        if not self.C > 0:
            raise ValueError(f"C is {self.C}, expected a number above 0")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty is {self.penalty!r}, expected one of {', '.join(PENALTIES)}")
        if not 0 <= self.l1_ratio <= 1:
            raise ValueError(f"l1_ratio is {self.l1_ratio}, expected a number from 0 to 1")
        if not self.tol > 0:
            raise ValueError(f"tol is {self.tol}, expected a number above 0")
        if not self.max_iter >= 1:
            raise ValueError(f"max_iter is {self.max_iter}, expected 1 or more")

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
