"""Linear heads by L-BFGS, with every product in the dtype of the features.

scikit-learn hands float64 coefficients to ``X @ w`` and so converts a float32 X at every step;
here the coefficients are cast instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from pipeline.heads.base import Array

Loss = Callable[[Array], tuple[float, Array]]


@dataclass(frozen=True)
class LinearSolution:
    """A fitted linear map.

    Attributes:
        coef: (n_outputs, n_features), dtype of the features.
        intercept: (n_outputs,).
        n_iter: L-BFGS iterations.
        converged: the largest gradient entry fell below the tolerance.
    """

    coef: Array
    intercept: Array
    n_iter: int
    converged: bool


def softmax_loss(index: NDArray[np.intp], n_classes: int, weights: NDArray[np.float64]) -> Loss:
    """Cross-entropy, summed over samples, and its gradient by the scores.

    Two classes have one score column, the log-odds of the second.
    """
    rows = np.arange(len(index))

    def loss(scores: Array) -> tuple[float, Array]:
        if n_classes == 2:
            scores = np.hstack([np.zeros_like(scores), scores])
        scores = scores - scores.max(axis=1, keepdims=True)
        true_score = scores[rows, index].astype(np.float64)
        np.exp(scores, out=scores)
        total = scores.sum(axis=1, keepdims=True)
        value = float(weights @ (np.log(total[:, 0].astype(np.float64)) - true_score))
        gradient = scores / total
        gradient[rows, index] -= 1
        gradient *= weights[:, None].astype(gradient.dtype)
        return value, gradient[:, 1:] if n_classes == 2 else gradient

    return loss


def squared_hinge_loss(
    index: NDArray[np.intp], n_classes: int, weights: NDArray[np.float64]
) -> Loss:
    """One-vs-rest squared hinge, summed over samples and classes, and its gradient."""
    signs = -np.ones((len(index), n_classes))
    signs[np.arange(len(index)), index] = 1
    if n_classes == 2:
        signs = signs[:, 1:]

    def loss(scores: Array) -> tuple[float, Array]:
        margin = np.maximum(0, 1 - signs.astype(scores.dtype) * scores)
        value = float(weights @ np.square(margin, dtype=np.float64).sum(axis=1))
        return value, (-2 * weights[:, None] * signs).astype(scores.dtype) * margin

    return loss


def fit_linear(
    X: Array,
    loss: Loss,
    n_outputs: int,
    *,
    C: float,
    total_weight: float,
    tol: float,
    max_iter: int,
) -> LinearSolution:
    """Minimise ``C · loss(X w + b) + ½‖w‖²``, divided by ``C · total_weight``.

    Args:
        X: (n_samples, n_features), float32 or float64.
        loss: value and gradient by the scores (n_samples, n_outputs).
        n_outputs: columns of the scores.
        C: inverse strength of the penalty; the intercept has none.
        total_weight: sum of the sample weights; the tolerance is then that of a mean.
        tol: the solver stops when no gradient entry is larger.
        max_iter: the solver stops here all the same, and says so.
    """
    n_features = X.shape[1]

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        params = flat.reshape(n_outputs, n_features + 1)
        coef, intercept = params[:, :-1], params[:, -1]
        scores = X @ coef.T.astype(X.dtype) + intercept.astype(X.dtype)
        value, by_score = loss(scores)
        gradient = np.empty_like(params)
        gradient[:, :-1] = by_score.T @ X
        gradient[:, :-1] += coef / C
        gradient[:, -1] = by_score.sum(axis=0, dtype=np.float64)
        value += 0.5 / C * float(np.vdot(coef, coef))
        return value / total_weight, gradient.ravel() / total_weight

    # numpy and scipy bring a thread pool each, and these wait for work by spinning: taking turns,
    # as they do here, each holds up the other. On two cores one thread was up to 8 × faster.
    with threadpool_limits(1, user_api="blas"):
        found = minimize(
            objective,
            np.zeros(n_outputs * (n_features + 1)),
            jac=True,
            method="L-BFGS-B",
            # ftol near float64's noise: a slow stretch is not taken for the end.
            options={"maxiter": max_iter, "maxfun": 4 * max_iter, "gtol": tol, "ftol": 1e-14},
        )
    params = found.x.reshape(n_outputs, n_features + 1).astype(X.dtype)
    largest = float(np.abs(found.jac).max())
    # A line search that finds nothing below float32's noise (status 2) may have arrived too.
    arrived = found.status == 0 or (found.status == 2 and largest <= 10 * tol)
    return LinearSolution(
        coef=np.ascontiguousarray(params[:, :-1]),
        intercept=np.ascontiguousarray(params[:, -1]),
        n_iter=int(found.nit),
        converged=bool(arrived),
    )
