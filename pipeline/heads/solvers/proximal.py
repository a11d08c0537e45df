"""Logistic regression with an L1 penalty or an elastic net, by accelerated proximal gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.heads.base import Array
from pipeline.heads.solvers.linear import Solution
from pipeline.heads.solvers.losses import Binary, Loss, Softmax
from pipeline.heads.solvers.newton import gradient_of, scores_of
from pipeline.heads.solvers.targets import (
    checked_features,
    checked_folds,
    checked_penalties,
    class_indices,
    signs_of,
)

_BATCH_BYTES = {"cpu": 2**25, "cuda": 2**31}
_C_AT_ONCE = 4
_CHECK_EVERY = 10
_POWER_STEPS = 30
_HALVINGS = 60
_GROWTH = 1.1


def fit_sparse_logistic(
    X: Array,
    y: Array,
    C: ArrayLike,
    *,
    l1_ratio: float = 1.0,
    sample_weight: Array | None = None,
    tol: float = 1e-4,
    max_iter: int = 5000,
    device: str | torch.device = "cpu",
) -> Solution:
    """Minimise ``C · Σ w_i (-log softmax(x_i · coef + intercept)[y_i]) + penalty`` at every C.

    The penalty is ``l1_ratio · ‖coef‖₁ + ½ (1 - l1_ratio) ‖coef‖²``, as in scikit-learn's
    LogisticRegression(solver="saga"); intercepts have none. The method is FISTA (Beck and
    Teboulle, 2009) with the restarts of O'Donoghue and Candès (2015); a few values of C advance
    together, with all folds, from the solution at the next smaller one.

    Args:
        X: (n_samples, n_features); float64 is solved in float64, float32 with products in float32
            and sums in float64.
        y: (n_samples,), int class indices 0 … n_classes - 1.
        C: (n_C,), above 0, in any order.
        l1_ratio: from 0 to 1.
        sample_weight: (n_samples,) or (n_folds, n_samples), ≥ 0; a fold is a row of weights.
        tol: largest ``gap`` of a converged problem: the duality gap, relative to the objective.
        max_iter: steps of a problem at most; what has not converged says so.
        device: where to solve.

    Raises:
        ValueError: fewer than two classes, in all or in a fold; X with NaN; values out of range.
    """
    if not 0 <= l1_ratio <= 1:
        raise ValueError(f"l1_ratio is {l1_ratio}, expected a number from 0 to 1")
    X = checked_features(X)
    truth, n_classes = class_indices(y, len(X))
    weights = checked_folds(sample_weight, len(X), truth)
    if weights is None:
        weights = np.ones((1, len(X)))
    values, mean, longest = _centred(X, weights.mean(axis=0), device)
    folds = torch.tensor(weights.T).to(values)
    loss: Loss
    if n_classes == 2:
        signs = signs_of(truth, 2, values.dtype).to(values.device)
        loss = Binary(signs[:, None].expand(-1, folds.shape[1], -1), hinge=False)
    else:
        loss = Softmax(torch.tensor(truth, device=values.device)[:, None, None], n_classes)
    given = checked_penalties(C, "C")
    distinct, where = np.unique(given, return_inverse=True)
    # A quarter is the most that two classes curve; each problem finds its own from there.
    path = _solve_path(values, loss, folds, distinct, l1_ratio, 0.25 * longest, tol, max_iter)
    coef = path.params[..., :-1]
    intercept = path.params[..., -1].double() * float(values[0, -1]) - coef.double() @ mean
    if n_classes > 2:  # a shift of all of them changes nothing
        intercept -= intercept.mean(dim=-1, keepdim=True)

    def ordered(part: Tensor) -> NDArray[Any]:
        return np.asarray(part.transpose(0, 1).cpu().numpy()[:, where])

    return Solution(
        C=given,
        coef=ordered(coef),
        intercept=ordered(intercept),
        objective=ordered(path.objective) * given,
        gap=ordered(path.gap),
        n_iter=ordered(path.n_iter),
        converged=ordered(path.gap) <= tol,
    )


def _centred(
    X: Array, weights: NDArray[np.float64], device: str | torch.device
) -> tuple[Tensor, Tensor, float]:
    """Features less their means, and a column of a constant for the intercept.

    The constant lets a step suit both: it makes the column as long as the features' strongest
    direction.

    Returns:
        (n_samples, n_features + 1); the means (n_features,) float64; and the square of the
        column's length, weighted as the samples are.
    """
    share = weights / weights.sum()
    mean = share @ X
    values = np.empty((len(X), X.shape[1] + 1), dtype=X.dtype)
    np.subtract(X, mean, out=values[:, :-1], casting="same_kind")
    rows, weight = torch.from_numpy(values).to(device), torch.from_numpy(weights).to(device)
    features, weight = rows[:, :-1], weight.to(rows.dtype)
    vector = torch.randn(X.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    for _ in range(_POWER_STEPS):
        vector = features.T @ (weight * (features @ (vector / vector.norm().clamp(min=1e-30))))
    largest = float(vector.norm()) or float(weights.sum())
    rows[:, -1] = (largest / weights.sum()) ** 0.5
    return rows, torch.from_numpy(mean).to(device), largest


@dataclass(frozen=True)
class _Found:
    """(n_problems, …), or of a path (n_C, n_folds, …)."""

    params: Tensor
    objective: Tensor
    gap: Tensor
    n_iter: Tensor


def _solve_path(
    values: Tensor,
    loss: Loss,
    folds: Tensor,
    C: NDArray[np.float64],
    l1_ratio: float,
    curvature: float,
    tol: float,
    max_iter: int,
) -> _Found:
    """All folds at every C, ascending; the penalty is over C, the loss has no factor."""
    n_folds, n_outputs = folds.shape[1], loss.n_outputs
    column_bytes = len(values) * values.element_size()
    room = _BATCH_BYTES.get(values.device.type, 2**25) // (column_bytes * n_folds * n_outputs)
    n_at_once = min(_C_AT_ONCE, max(1, room))
    start = values.new_zeros(n_folds, n_outputs, values.shape[1])
    parts: list[_Found] = []
    for first in range(0, len(C), n_at_once):
        penalty = torch.tensor(1 / C[first : first + n_at_once], device=values.device)
        n_C = len(penalty)
        lane = torch.arange(n_folds, device=values.device).repeat(n_C)
        problems = _Problems(
            loss.select(lane),
            folds[:, lane],
            l1_ratio * penalty.repeat_interleave(n_folds),
            (1 - l1_ratio) * penalty.repeat_interleave(n_folds),
        )
        found = _solve(values, problems, start.repeat(n_C, 1, 1), curvature, tol, max_iter)
        start = found.params[-n_folds:]
        parts.append(found)
    names = ("params", "objective", "gap", "n_iter")
    joined = (torch.cat([getattr(part, name) for part in parts]) for name in names)
    return _Found(*(whole.reshape(len(C), n_folds, *whole.shape[1:]) for whole in joined))


@dataclass(frozen=True)
class _Problems:
    """Minimise Σ w_i loss_i + l1 ‖coef‖₁ + ½ l2 ‖coef‖², n_problems times.

    Attributes:
        loss: of the scores.
        weights: (n_samples, n_problems).
        l1, l2: (n_problems,) float64, ≥ 0.
    """

    loss: Loss
    weights: Tensor
    l1: Tensor
    l2: Tensor

    def select(self, kept: Tensor) -> _Problems:
        return _Problems(
            self.loss.select(kept), self.weights[:, kept], self.l1[kept], self.l2[kept]
        )

    def value(self, scores: Tensor) -> Tensor:
        """The weighted loss alone, (n_problems,) float64."""
        return (self.loss.value(scores) * self.weights).sum(dim=0, dtype=torch.float64)

    def gradient(self, values: Tensor, scores: Tensor) -> Tensor:
        """Of the loss alone."""
        slope, _ = self.loss.slope(scores)
        return gradient_of(values, slope * self.weights[:, :, None])

    def penalty(self, params: Tensor) -> Tensor:
        coef = params[..., :-1].double()
        return self.l1 * coef.abs().sum(dim=(1, 2)) + 0.5 * self.l2 * coef.square().sum(dim=(1, 2))

    def shrink(self, params: Tensor, step: Tensor) -> Tensor:
        """The proximal map of the penalty, in place; ``step`` is (n_problems,)."""
        coef = params[..., :-1]
        threshold = (step * self.l1).to(params.dtype)[:, None, None]
        coef.sub_(coef.clamp(-threshold, threshold))
        coef.div_((1 + step * self.l2).to(params.dtype)[:, None, None])
        return params

    def gap(self, values: Tensor, scores: Tensor, params: Tensor, loss: Tensor) -> Tensor:
        """Bound on (objective - optimum) / objective.

        With g the gradient of the loss L by the coefficients w and h the penalty, the dual point
        of the scores themselves gives h(w) + w·g + h*(-g); shrunk by s until |s g| ≤ l1 it gives
        at most (1 - s) L + h(w) + s w·g, by convexity of the conjugate loss, which is 0 at 0.
        What the free intercepts miss is foretold by a quadratic model of them.
        """
        slope, bend = self.loss.slope(scores)
        slope = slope * self.weights[:, :, None]
        gradient = gradient_of(values, slope)
        by_coef, by_intercept = gradient[..., :-1].double(), gradient[..., -1].double()
        penalty = self.penalty(params)
        along = (params[..., :-1] * by_coef).sum(dim=(1, 2))
        largest = by_coef.abs().amax(dim=(1, 2))
        shrunk = (self.l1 / largest.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)
        bound = (1 - shrunk) * loss + penalty + shrunk * along
        excess = (by_coef.abs() - self.l1[:, None, None]).clamp(min=0).square().sum(dim=(1, 2))
        conjugate = torch.where(excess > 0, 0.5 * excess / self.l2, 0.0)
        bound = torch.minimum(bound, penalty + along + conjugate)
        strength = (self.loss.strength(bend) * self.weights).sum(dim=0, dtype=torch.float64)
        tiny = torch.finfo(torch.float64).tiny
        free = by_intercept.square().sum(dim=1) / values[0, -1].double().square()
        bound += 0.5 * free / strength.clamp(min=tiny)
        return bound.clamp(min=0) / (loss + penalty).clamp(min=tiny)


class _State:
    """Problems that still move: two iterates, their scores, steps and momenta."""

    def __init__(self, values: Tensor, problems: _Problems, params: Tensor, step: Tensor) -> None:
        self.problems = problems
        self.params = params
        self.scores = scores_of(values, params)
        self.loss = problems.value(self.scores)
        self.last, self.last_scores = self.params, self.scores
        self.step = step
        self.momentum = torch.ones_like(step)

    def select(self, kept: Tensor) -> None:
        self.problems = self.problems.select(kept)
        self.params, self.last = self.params[kept], self.last[kept]
        self.scores, self.last_scores = self.scores[:, kept], self.last_scores[:, kept]
        self.loss, self.step, self.momentum = self.loss[kept], self.step[kept], self.momentum[kept]

    def advance(self, values: Tensor) -> None:
        """One step of all, from a point ahead of them on the line of their last two."""
        problems, dtype = self.problems, self.params.dtype
        following = 0.5 * (1 + (1 + 4 * self.momentum.square()).sqrt())
        push = ((self.momentum - 1) / following).to(dtype)[:, None, None]
        ahead = self.params + push * (self.params - self.last)
        ahead_scores = self.scores + push.transpose(0, 1) * (self.scores - self.last_scores)
        ahead_loss = problems.value(ahead_scores)
        gradient = problems.gradient(values, ahead_scores)
        params, scores = torch.empty_like(ahead), torch.empty_like(ahead_scores)
        loss = torch.empty_like(ahead_loss)
        left = torch.arange(len(params), device=params.device)
        noise = 4 * torch.finfo(dtype).eps * ahead_loss
        for _ in range(_HALVINGS):
            step, some = self.step[left], problems.select(left)
            moved = ahead[left] - step.to(dtype)[:, None, None] * gradient[left]
            params[left] = some.shrink(moved, step)
            scores[:, left] = scores_of(values, params[left])
            loss[left] = some.value(scores[:, left])
            change = (params[left] - ahead[left]).double()
            model = ahead_loss[left] + (gradient[left] * change).sum(dim=(1, 2))
            model += 0.5 / step * change.square().sum(dim=(1, 2))
            left = left[loss[left] > model + noise[left]]
            if not len(left):
                break
            self.step[left] *= 0.5
        # Momentum that leads uphill is dropped.
        uphill = ((ahead - params) * (params - self.params)).sum(dim=(1, 2)) > 0
        self.momentum = torch.where(uphill, 1.0, following)
        self.last, self.last_scores = self.params, self.scores
        self.params, self.scores, self.loss = params, scores, loss
        self.step *= _GROWTH


def _solve(
    values: Tensor,
    problems: _Problems,
    start: Tensor,
    curvature: float,
    tol: float,
    max_iter: int,
) -> _Found:
    n_problems, device = len(start), start.device
    found = _Found(
        start.clone(),
        torch.zeros(n_problems, dtype=torch.float64, device=device),
        torch.zeros(n_problems, dtype=torch.float64, device=device),
        torch.zeros(n_problems, dtype=torch.int64, device=device),
    )
    step = 1 / (curvature + problems.l2)
    state = _State(values, problems, start.clone(), step)
    left = torch.arange(n_problems, device=device)
    for n_iter in range(max_iter + 1):
        if n_iter % _CHECK_EVERY == 0 or n_iter == max_iter:
            gap = state.problems.gap(values, state.scores, state.params, state.loss)
            found.params[left], found.gap[left] = state.params, gap
            found.objective[left] = state.loss + state.problems.penalty(state.params)
            found.n_iter[left] = n_iter
            going = (gap > tol).nonzero()[:, 0]
            if not len(going):
                break
            if len(going) < len(left):
                left = left[going]
                state.select(going)
        if n_iter < max_iter:
            state.advance(values)
    return found
