"""Linear classifiers: every penalty, fold and class on one X, solved together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.heads.base import Array
from pipeline.heads.solvers.design import Design, make_design
from pipeline.heads.solvers.losses import HINGE_BEND, Binary, Loss, Softmax
from pipeline.heads.solvers.path import Lanes, Path, solve_path
from pipeline.heads.solvers.targets import (
    checked_folds,
    checked_penalties,
    class_indices,
    label_weights,
    signs_of,
)

Floats = NDArray[np.float64]
_FOLDS_WITH_A_CENTRE = 3
_CENTRE_TOL = 1e-2
_FEW_PROBLEMS = 2


@dataclass(frozen=True)
class Solution:
    """Linear classifiers of every fold and C.

    Attributes:
        C: (n_C,), as they were given.
        coef: (n_folds, n_C, n_outputs, n_features), dtype of X; one output for two classes.
        intercept: (n_folds, n_C, n_outputs) float64.
        objective: (n_folds, n_C) float64, ``C · Σ w_i loss_i + ½‖coef‖²``; of a one-vs-rest
            problem, summed over the classes.
        gap: (n_folds, n_C) float64, estimated (objective - optimum) / objective before the last
            Newton step. What is left after it is less, often by far; on features that differ by
            orders of magnitude it may be a few times as much.
        n_iter: (n_folds, n_C) int64, Newton steps; of one-vs-rest, the most of a class.
        converged: (n_folds, n_C) bool, whether ``gap`` is within the tolerance.
    """

    C: Floats
    coef: Array
    intercept: Floats
    objective: Floats
    gap: Floats
    n_iter: NDArray[np.int64]
    converged: NDArray[np.bool_]
    _path: Path | None = field(default=None, repr=False)


def fit_logistic(
    X: Array | Design,
    y: Array,
    C: ArrayLike,
    *,
    sample_weight: Array | None = None,
    start: Solution | None = None,
    tol: float = 5e-5,
    max_iter: int = 100,
    device: str | torch.device = "cpu",
) -> Solution:
    """Minimise ``C · Σ w_i (-log softmax(x_i · coef + intercept)[y_i]) + ½‖coef‖²`` at every C.

    That is scikit-learn's LogisticRegression: with two classes ½‖coef‖² counts the one vector of
    log-odds, intercepts have no penalty, and a class weight is a sample weight.

    Args:
        X: (n_samples, n_features), or a design to use again; float64 is solved in float64, float32
            with products in float32 (those with the Hessian in bfloat16 where the hardware has
            it) and sums in float64.
        y: (n_samples,), int class indices 0 … n_classes - 1.
        C: (n_C,), above 0, in any order.
        sample_weight: (n_samples,) or (n_folds, n_samples), ≥ 0; a fold is a row of weights, 0 for
            the samples that it leaves out.
        start: a solution on the same design, C and y without folds; folds start from it.
        tol: largest ``gap`` of a converged problem.
        max_iter: Newton steps a problem at most; what has not converged says so.
        device: where to solve.

    Raises:
        ValueError: fewer than two classes, in all or in a fold; X with NaN; values out of range.
    """
    design = _design(X, C, sample_weight, device)
    truth, n_classes = class_indices(y, design.n_samples)
    weights = checked_folds(sample_weight, design.n_samples, truth)
    n_folds = 1 if weights is None else len(weights)
    loss: Loss
    if n_classes == 2:
        signs = signs_of(truth, 2, design.values.dtype).to(design.values.device)
        loss = Binary(signs[:, None].expand(-1, n_folds, -1), hinge=False)
    else:
        loss = Softmax(torch.tensor(truth, device=design.values.device)[:, None, None], n_classes)
    lanes = Lanes(loss, _columns(weights, 1, design), n_folds)
    return _solve(design, lanes, n_folds, C, start, tol, max_iter)


def fit_svm(
    X: Array | Design,
    y: Array,
    C: ArrayLike,
    *,
    sample_weight: Array | None = None,
    start: Solution | None = None,
    tol: float = 1e-4,
    max_iter: int = 100,
    device: str | torch.device = "cpu",
) -> Solution:
    """Minimise ``C · Σ w_i max(0, 1 - s_i (x_i · coef + intercept))² + ½‖coef‖²``, one-vs-rest.

    s is +1 for samples of the class and -1 for the rest; two classes have one output. That is
    scikit-learn's LinearSVC(loss="squared_hinge") but for the intercept, which has no penalty
    here: LinearSVC adds ½ (intercept / intercept_scaling)², and comes to the same as its
    ``intercept_scaling`` grows.

    Args:
        X, y, C, sample_weight, start, tol, max_iter, device: as for :func:`fit_logistic`.

    Raises:
        ValueError: fewer than two classes, in all or in a fold; X with NaN; values out of range.
    """
    design = _design(X, C, sample_weight, device)
    truth, n_classes = class_indices(y, design.n_samples)
    weights = checked_folds(sample_weight, design.n_samples, truth)
    n_folds = 1 if weights is None else len(weights)
    signs = signs_of(truth, n_classes, design.values.dtype).to(design.values.device)
    n_outputs = signs.shape[1]
    loss = Binary(signs.repeat(1, n_folds)[:, :, None], hinge=True)
    n_lanes = n_folds * n_outputs
    lanes = Lanes(loss, _columns(weights, n_outputs, design), n_lanes, n_outputs, jump=HINGE_BEND)
    return _solve(design, lanes, n_folds, C, start, tol, max_iter)


def fit_logistic_multilabel(
    X: Array | Design,
    y: Array,
    C: ArrayLike,
    *,
    sample_weight: Array | None = None,
    tol: float = 1e-4,
    max_iter: int = 100,
    device: str | torch.device = "cpu",
) -> Solution:
    """Solve a two-class :func:`fit_logistic` of every label, all labels and C together.

    Where the known values of a label are all alike, its coefficients are zero and its intercept
    is Laplace's rule of succession: odds of 1 + (their summed weight) to 1.

    Args:
        X, C, tol, max_iter, device: as for :func:`fit_logistic`.
        y: (n_samples, n_labels) of 0 and 1; NaN where a label of a sample is not known.
        sample_weight: (n_samples,), ≥ 0.

    Returns:
        A solution of one fold, with an output a label; objectives are summed over those labels
        that have both values.

    Raises:
        ValueError: X with NaN; values out of range; a label of which nothing is known.
    """
    design = _design(X, C, None, device)
    labels = np.asarray(y, dtype=np.float64)
    weights = label_weights(labels, design.n_samples, sample_weight)
    given = checked_penalties(C, "C")
    totals = weights.sum(axis=0)
    positive = (weights * (labels == 1)).sum(axis=0)
    varied = np.flatnonzero((positive > 0) & (((labels == 0) * weights) > 0).any(axis=0))
    values = design.values
    constant = np.where(positive > 0, 1.0, -1.0) * np.log1p(totals)
    intercept = np.tile(constant, (1, len(given), 1))
    coef = values.new_zeros((*intercept.shape, len(design.mean))).cpu().numpy()
    if not len(varied):
        nothing = np.zeros((1, len(given)))
        return Solution(given, coef, intercept, nothing, nothing, nothing.astype(int), nothing == 0)
    signs = torch.tensor(2 * labels[:, varied] - 1, dtype=values.dtype, device=values.device)
    signs = signs.nan_to_num_(nan=1.0)
    lanes = Lanes(
        Binary(signs[:, :, None], hinge=False),
        torch.tensor(weights[:, varied], dtype=values.dtype, device=values.device),
        len(varied),
        len(varied),
    )
    found = _solve(design, lanes, 1, given, None, tol, max_iter)
    coef[:, :, varied], intercept[:, :, varied] = found.coef, found.intercept
    return replace(found, coef=coef, intercept=intercept, _path=None)


def _design(
    X: Array | Design, C: Any, sample_weight: Array | None, device: str | torch.device
) -> Design:
    """The design that was given, or a new one; turned where it serves many problems."""
    if isinstance(X, Design):
        return X
    n_folds = 1 if sample_weight is None else len(np.atleast_2d(sample_weight))
    return make_design(X, turn=np.size(C) * n_folds > _FEW_PROBLEMS, device=device)


def _columns(weights: Floats | None, n_outputs: int, design: Design) -> Tensor | None:
    """(n_samples, n_folds · n_outputs), a column a lane; fold by fold."""
    if weights is None:
        return None
    columns = torch.tensor(weights.T, dtype=design.values.dtype, device=design.values.device)
    return columns.repeat_interleave(n_outputs, dim=1)


def _solve(
    design: Design,
    lanes: Lanes,
    n_folds: int,
    C: Any,
    start: Solution | None,
    tol: float,
    max_iter: int,
) -> Solution:
    """Solve every lane at every distinct C, the smallest first, and put them in order."""
    given = checked_penalties(C, "C")
    distinct, where = np.unique(given, return_inverse=True)
    if start is not None and not np.array_equal(start.C, given):
        raise ValueError("start was solved for other values of C, expected the same")
    base = None if start is None else start._path
    penalties = torch.tensor(1 / distinct, device=design.values.device)
    if base is None and n_folds >= _FOLDS_WITH_A_CENTRE:
        base = solve_path(
            design,
            lanes.centre(),
            penalties,
            start=None,
            tol=max(tol, _CENTRE_TOL),
            max_iter=max_iter,
        )
    path = solve_path(design, lanes, penalties, start=base, tol=tol, max_iter=max_iter)
    coef, intercept = design.to_original(path.params)

    def ordered(values: Tensor) -> NDArray[Any]:
        """(n_folds, n_C, lanes of a fold, …), from one row a problem or (n_C, n_lanes, …)."""
        parts = values.reshape(len(distinct), n_folds, -1, *values.shape[2:])
        found = parts.transpose(0, 1).cpu().numpy()
        in_order = np.array_equal(where, np.arange(len(where)))
        return found if in_order else np.asarray(found[:, where])

    def outputs(values: Tensor) -> NDArray[Any]:
        """One-vs-rest lanes and the outputs of one lane are outputs alike."""
        return ordered(values.flatten(1, 2))

    found = path.found
    shape = (len(distinct), lanes.n_lanes)
    return Solution(
        C=given,
        coef=outputs(coef),
        intercept=outputs(intercept),
        objective=ordered(found.objective.reshape(shape)).sum(axis=2) * given,
        gap=ordered(found.gap.reshape(shape)).max(axis=2),
        n_iter=ordered(found.n_iter.reshape(shape)).max(axis=2),
        converged=np.asarray(ordered(found.converged.reshape(shape)).all(axis=2)),
        _path=path,
    )
