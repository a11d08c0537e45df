"""Support vector machines."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.svm import SVC

from pipeline.errors import CorruptStoreError
from pipeline.heads.base import (
    Array,
    Head,
    decision,
    fit_inputs,
    linear_logits,
    predict_inputs,
    sample_weights,
)
from pipeline.heads.solvers.lbfgs import fit_linear, squared_hinge_loss

KERNELS = ("linear", "rbf")
_BLOCK_ROWS = 1024


class SVMHead(Head):
    """Linear (one-vs-rest, squared hinge) or RBF (one-vs-one, libsvm) support vectors.

    Args:
        kernel: "linear" or "rbf".
        C: inverse strength of the penalty on the summed loss.
        gamma: width of the RBF kernel exp(-gamma ‖x - s‖²), or "scale" for
            1 / (n_features · variance of X).
        class_weight: None, "balanced" or {class: weight}.
        tol: the solver's tolerance.
        max_iter: iterations of the linear solver at most.

    Attributes:
        coef_, intercept_: the linear map; for RBF, ``intercept_`` is one a pair of classes.
        support_vectors_: (n_vectors, n_features), grouped by class; RBF only.
        dual_coef_: (n_classes - 1, n_vectors), as libsvm orders them; RBF only.
        n_support_: (n_classes,), vectors of each class; RBF only.
        gamma_: the kernel's width; RBF only.
    """

    def __init__(
        self,
        kernel: str = "rbf",
        C: float = 1.0,
        *,
        gamma: float | str = "scale",
        class_weight: Any = None,
        tol: float = 1e-3,
        max_iter: int = 1000,
    ) -> None:
        self.kernel = kernel
        self.C = C
        self.gamma = gamma
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,)."""
        self.check_params()
        X, index = fit_inputs(self, X, y)
        if self.kernel == "linear":
            return self._fit_linear(X, index, sample_weight)
        return self._fit_rbf(X, index, sample_weight)

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is {self.kernel!r}, expected one of {', '.join(KERNELS)}")
        if not self.C > 0:
            raise ValueError(f"C is {self.C}, expected a number above 0")
        if self.gamma != "scale" and not float(self.gamma) > 0:
            raise ValueError(f"gamma is {self.gamma}, expected 'scale' or a number above 0")

    def _fit_linear(self, X: Array, index: Array, sample_weight: Array | None) -> Self:
        weights = sample_weights(X, self.classes_[index], self.class_weight, sample_weight)
        n_classes = len(self.classes_)
        solution = fit_linear(
            X,
            squared_hinge_loss(index, n_classes, weights),
            1 if n_classes == 2 else n_classes,
            C=self.C,
            total_weight=float(weights.sum()),
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self.coef_, self.intercept_ = solution.coef, solution.intercept
        self.n_iter_, self.converged_ = solution.n_iter, solution.converged
        return self

    def _fit_rbf(self, X: Array, index: Array, sample_weight: Array | None) -> Self:
        weights = sample_weights(X, self.classes_[index], None, sample_weight)
        self.gamma_ = np.float64(_gamma(X, weights) if self.gamma == "scale" else self.gamma)
        solver = SVC(
            C=self.C,
            gamma=float(self.gamma_),
            class_weight=self.class_weight,
            tol=self.tol,
            cache_size=500,
        )
        solver.fit(X.astype(np.float64), self.classes_[index], sample_weight=weights)
        self.support_vectors_ = solver.support_vectors_.astype(X.dtype)
        self.dual_coef_ = np.asarray(solver.dual_coef_)
        self.intercept_ = np.asarray(solver.intercept_)
        self.n_support_ = np.asarray(solver.n_support_, dtype=np.int64)
        self.n_iter_, self.converged_ = int(np.max(solver.n_iter_)), solver.fit_status_ == 0
        return self

    def logits(self, X: Array) -> Array:
        """Decision values (n_samples, n_classes); no log-probabilities."""
        X = predict_inputs(self, X)
        if self.kernel == "linear":
            return linear_logits(X, self.coef_, self.intercept_)
        blocks = [
            self._rbf_decision(X[start : start + _BLOCK_ROWS])
            for start in range(0, len(X), _BLOCK_ROWS)
        ]
        return np.concatenate(blocks)

    def _rbf_decision(self, X: Array) -> Array:
        """Pairwise decisions from the kernel, then votes (scikit-learn's "ovr" shape)."""
        X, vectors = X.astype(np.float64), self.support_vectors_.astype(np.float64)
        squares = (
            np.square(X).sum(axis=1)[:, None] + np.square(vectors).sum(axis=1) - 2 * X @ vectors.T
        )
        kernel = np.exp(-self.gamma_ * np.maximum(squares, 0))
        if len(self.classes_) == 2:
            one = kernel @ self.dual_coef_[0] + self.intercept_[0]
            return np.stack([np.zeros_like(one), one], axis=1)
        return _votes(_pairwise(kernel, self.dual_coef_, self.intercept_, self.n_support_))

    def decision_function(self, X: Array) -> Array:
        """scikit-learn's scores: (n_samples, n_classes), or (n_samples,) for two classes."""
        return decision(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        if self.kernel == "linear":
            return {"coef_": ("outputs", "features"), "intercept_": ("outputs",)}
        return {
            "support_vectors_": ("vectors", "features"),
            "dual_coef_": ("classes - 1", "vectors"),
            "intercept_": ("pairs",),
            "n_support_": ("classes",),
            "gamma_": (),
        }

    @classmethod
    def from_arrays(cls, params: Any, arrays: Any) -> Self:
        """Rebuild a fitted head; also checks that libsvm's arrays fit each other."""
        head = super().from_arrays(params, arrays)
        if head.kernel == "rbf":
            n_classes = len(head.classes_)
            if (
                len(head.dual_coef_) != n_classes - 1
                or len(head.intercept_) != n_classes * (n_classes - 1) // 2
                or head.n_support_.dtype.kind not in "iu"
                or (head.n_support_ < 0).any()
                or int(head.n_support_.sum()) != len(head.support_vectors_)
                or not head.gamma_ > 0
            ):
                raise CorruptStoreError(
                    f"The support vectors of the model do not fit its {n_classes} classes."
                )
        return head


def _gamma(X: Array, weights: Array) -> float:
    """1 / (n_features · variance over all entries), a sample counting as its weight says."""
    share = weights / weights.sum()
    mean = float((share @ X).mean())
    variance = float((share @ np.square(X, dtype=np.float64)).mean()) - mean**2
    return 1.0 / (X.shape[1] * variance) if variance > 0 else 1.0


def _pairwise(kernel: Array, dual: Array, intercept: Array, n_support: Array) -> Array:
    """One-vs-one decisions of libsvm (n_samples, n_pairs); positive votes for the first class.

    A vector of class i has its coefficient against class j in row j - 1 if j > i, else row j.
    """
    ends = np.cumsum(n_support)
    starts = ends - n_support
    n_classes = len(n_support)
    columns: list[Array] = []
    for i in range(n_classes):
        for j in range(i + 1, n_classes):
            of_i, of_j = slice(starts[i], ends[i]), slice(starts[j], ends[j])
            columns.append(
                kernel[:, of_i] @ dual[j - 1, of_i]
                + kernel[:, of_j] @ dual[i, of_j]
                + intercept[len(columns)]
            )
    return np.stack(columns, axis=1)


def _votes(pairs: Array) -> Array:
    """Votes of the pairs, and within equal votes their confidence, squeezed below a vote."""
    n_classes = round((1 + np.sqrt(1 + 8 * pairs.shape[1])) / 2)
    votes = np.zeros((len(pairs), n_classes))
    confidence = np.zeros((len(pairs), n_classes))
    first, second = np.triu_indices(n_classes, k=1)
    for column, (i, j) in enumerate(zip(first, second, strict=True)):
        value = pairs[:, column]
        confidence[:, i] += value
        confidence[:, j] -= value
        votes[:, i] += value >= 0
        votes[:, j] += value < 0
    result: Array = votes + confidence / (3 * (np.abs(confidence) + 1))
    return result
