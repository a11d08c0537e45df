"""Ridge regression: every penalty from one eigendecomposition, with exact leave-one-out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.heads.base import Array
from pipeline.heads.solvers.design import Design, make_design
from pipeline.heads.solvers.targets import (
    checked_features,
    checked_folds,
    checked_penalties,
    class_indices,
    signs_of,
)

_BLOCK_BYTES = 2**26


@dataclass(frozen=True)
class RidgePath:
    """Ridge regressions of the same targets, one a penalty.

    Attributes:
        penalties: (n_penalties,) float64, as they were given.
        coef: (n_penalties, n_outputs, n_features) float64.
        intercept: (n_penalties, n_outputs) float64.
        loo_error: (n_penalties,) float64: weighted mean over samples, and mean over outputs, of
            the squared error on each sample by the fit without it.
        loo_accuracy: (n_penalties,) float64: weighted share of samples whose class is the largest
            of their leave-one-out predictions.
    """

    penalties: NDArray[np.float64]
    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    loo_error: NDArray[np.float64]
    loo_accuracy: NDArray[np.float64]


def fit_ridge(
    X: Array,
    y: Array,
    penalties: ArrayLike,
    *,
    sample_weight: Array | None = None,
    device: str | torch.device = "cpu",
) -> RidgePath:
    """Minimise ``Σ w_i (x_i · coef + intercept - t_i)² + penalty ‖coef‖²`` for targets t of ±1.

    That is scikit-learn's RidgeClassifier with ``alpha`` = penalty. Leave-one-out predictions
    follow from the fit on all samples: the residual without sample i is the one with it over
    1 - h_i, where h is the diagonal of the hat matrix (Allen, 1974), here with the intercept.

    Args:
        X: (n_samples, n_features), float32 or float64; solved in float64.
        y: (n_samples,), int class indices 0 … n_classes - 1; two classes have one output, +1
            for class 1.
        penalties: (n_penalties,), above 0.
        sample_weight: (n_samples,), ≥ 0.
        device: where to solve.

    Raises:
        ValueError: fewer than two classes, or values that are not finite or out of range.
    """
    problem = _solve(X, y, penalties, sample_weight, device)
    error, accuracy = _leave_one_out(problem)
    coef, intercept = problem.design.to_original(problem.params)
    return RidgePath(
        problem.penalties.cpu().numpy(),
        coef.cpu().numpy(),
        intercept.cpu().numpy(),
        error.cpu().numpy(),
        accuracy.cpu().numpy(),
    )


@dataclass(frozen=True)
class RidgeFits:
    """Ridge regressions of every fold and penalty.

    Attributes:
        coef: (n_folds, n_penalties, n_outputs, n_features) float64.
        intercept: (n_folds, n_penalties, n_outputs) float64.
        converged: (n_folds, n_penalties) bool, all True: the solution is a closed form.
    """

    coef: NDArray[np.float64]
    intercept: NDArray[np.float64]
    converged: NDArray[np.bool_]


def fit_ridge_folds(
    X: Array,
    y: Array,
    penalties: ArrayLike,
    *,
    sample_weight: Array | None = None,
    device: str | torch.device = "cpu",
) -> RidgeFits:
    """What :func:`fit_ridge` fits, without leaving one out: each fold from one eigendecomposition.

    Args:
        X, y, penalties, device: as for :func:`fit_ridge`.
        sample_weight: (n_samples,) or (n_folds, n_samples), ≥ 0; a fold is a row of weights.

    Raises:
        ValueError: fewer than two classes, in all or in a fold; values not finite or out of range.
    """
    X = checked_features(X)
    truth, n_classes = class_indices(y, len(X))
    weights = checked_folds(sample_weight, len(X), truth)
    parts: list[tuple[Tensor, Tensor]] = []
    for weight in [None] if weights is None else weights:
        rows = slice(None) if weight is None else weight > 0
        problem = _solve(
            X[rows],
            truth[rows],
            penalties,
            None if weight is None else weight[rows],
            device,
            n_classes,
        )
        parts.append(problem.design.to_original(problem.params))
    coef, intercept = (torch.stack(part).cpu().numpy() for part in zip(*parts, strict=True))
    return RidgeFits(coef, intercept, np.ones(coef.shape[:2], dtype=bool))


@dataclass(frozen=True)
class _Solved:
    """One problem at every penalty, in the basis of its design.

    Attributes:
        design: the features.
        penalties: (n_penalties,).
        weights: (n_samples,).
        truth: (n_samples,), class indices.
        targets: (n_samples, n_outputs), ±1.
        shrunk: (n_penalties, rank), inverse of eigenvalue + penalty.
        params: (n_penalties, n_outputs, rank + 1).
    """

    design: Design
    penalties: Tensor
    weights: Tensor
    truth: Tensor
    targets: Tensor
    shrunk: Tensor
    params: Tensor


def _solve(
    X: Array,
    y: Array,
    penalties: ArrayLike,
    sample_weight: Array | None,
    device: str | torch.device,
    n_classes: int | None = None,
) -> _Solved:
    """All in float64: in float32 the Gram matrix of a strong feature swallows a small penalty."""
    truth, n_found = class_indices(y, len(X), sample_weight)
    alphas = torch.tensor(checked_penalties(penalties, "penalty"), device=device)
    design = make_design(X, sample_weight=sample_weight, dtype=torch.float64, device=device)
    weights = torch.ones(len(truth), dtype=torch.float64)
    if sample_weight is not None:
        weights = torch.tensor(np.asarray(sample_weight, dtype=np.float64))
    weights = weights.to(device)
    targets = signs_of(truth, n_classes or n_found, torch.float64).to(device)
    center = weights @ targets / weights.sum()
    axes = design.values[:, :-1]
    moments = axes.T @ (weights[:, None] * (targets - center))
    shrunk = 1 / (design.eigenvalues + alphas[:, None])
    last = center[:, None].expand(len(alphas), -1, 1)
    params = torch.cat([moments.T * shrunk[:, None], last], dim=2)
    indices = torch.tensor(truth, device=device)
    return _Solved(design, alphas, weights, indices, targets, shrunk, params)


def _leave_one_out(problem: _Solved) -> tuple[Tensor, Tensor]:
    """Error and accuracy (n_penalties,) of the fits without each sample."""
    params, weights, targets = problem.params, problem.weights, problem.targets
    n_penalties, n_outputs, _ = params.shape
    flat = params.reshape(-1, params.shape[-1]).T
    error = torch.zeros(n_penalties, dtype=torch.float64, device=params.device)
    right = torch.zeros_like(error)
    n_rows = max(1, _BLOCK_BYTES // (8 * max(flat.shape)))
    for rows in torch.split(torch.arange(len(targets), device=params.device), n_rows):
        axes, weight = problem.design.values[rows], weights[rows]
        hat = (axes[:, :-1].square() @ problem.shrunk.T + 1 / weights.sum()) * weight[:, None]
        predicted = (axes @ flat).reshape(-1, n_penalties, n_outputs)
        wanted = targets[rows][:, None]
        # A sample that alone holds a direction has h = 1 - rounding: never divide by zero.
        left_out = (wanted - predicted) / (1 - hat).clamp(min=1e-12)[:, :, None]
        error += weight @ left_out.square().mean(dim=2)
        scores = wanted - left_out
        chosen = (scores[:, :, 0] > 0).long() if n_outputs == 1 else scores.argmax(dim=2)
        right += weight @ (chosen == problem.truth[rows][:, None]).double()
    return error / weights.sum(), right / weights.sum()
