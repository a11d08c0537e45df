"""Logistic regression and linear SVM on stored rows, by Newton steps that share their passes.

Each problem solves H s = -g by conjugate gradients, as :mod:`pipeline.heads.solvers.newton` does,
and asks for what it needs next: the loss and its gradient, or a product with the Hessian. One pass
over the rows answers what all problems asked, wherever each of them stands.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor

from pipeline.heads.scaling import Scaler
from pipeline.heads.solvers.losses import Binary, Loss, Softmax
from pipeline.heads.streaming.moments import Moments, Parts
from pipeline.heads.streaming.rows import StoredRows

Floats = NDArray[np.float64]

_FORCING = 0.1
_ENOUGH = 0.05
_MAX_CG = 60
_HALVINGS = 12


@dataclass(frozen=True)
class LinearProblem:
    """Minimise Σ w_i loss_i(x_i · params) + ½ penalty ‖coefficients‖².

    Attributes:
        hinge: squared hinge, one-vs-rest, instead of softmax.
        penalty: above 0; the intercepts have none.
        weights: (n_parts, n_classes), of the samples.
        classes: codes that have a weight, two or more.
        start: params to begin with, or None for zeros.
        tol: the distance to the optimum, as a part of the objective, that is close enough.
        max_iter: Newton steps at most.
    """

    hinge: bool
    penalty: float
    weights: Floats
    classes: NDArray[np.intp]
    start: Tensor | None = None
    tol: float = 1e-4
    max_iter: int = 100

    @property
    def n_lanes(self) -> int:
        """Problems in one: the classes of one-vs-rest."""
        return self.n_columns if self.hinge else 1

    @property
    def n_columns(self) -> int:
        """Scores of a sample."""
        return 1 if len(self.classes) == 2 else len(self.classes)

    def loss(self, truth: Tensor) -> Loss:
        """Of some samples, whose places among ``classes`` are ``truth`` (n,)."""
        n_classes = len(self.classes)
        if not self.hinge and n_classes > 2:
            return Softmax(truth[:, None, None], n_classes)
        if n_classes == 2:
            signs = (2 * truth - 1)[:, None]
        else:
            signs = 2 * torch.nn.functional.one_hot(truth, n_classes) - 1
        return Binary(signs[:, :, None].to(torch.float32), hinge=self.hinge)


@dataclass(frozen=True)
class LinearFit:
    """Where a problem arrived.

    Attributes:
        params: (n_lanes, n_outputs, n_features + 1), the intercepts last.
        n_iter: Newton steps.
        converged: within the tolerance, in every lane.
    """

    params: Tensor
    n_iter: int
    converged: bool


@dataclass(frozen=True)
class _Ask:
    """What a problem needs: loss and gradient at ``params``, or the Hessian times ``direction``."""

    params: Tensor
    direction: Tensor | None = None


@dataclass(frozen=True)
class _Answer:
    """Sums over the samples.

    Attributes:
        value: (n_lanes,) float64, the loss.
        product: shaped as the params, gradient of the loss or its Hessian times the direction.
        strength: (n_lanes,) float64, mean curvature of the loss over the outputs.
    """

    value: Tensor
    product: Tensor
    strength: Tensor


_Steps = Generator[_Ask, _Answer, LinearFit]


@dataclass(frozen=True)
class Basis:
    """What preconditions every problem: the covariance of the scaled features.

    Attributes:
        center: (n_features,).
        eigenvalues: (n_features,), of the covariance, or its diagonal.
        vectors: (n_features, n_features), or None for the axes as they are.
    """

    center: Tensor
    eigenvalues: Tensor
    vectors: Tensor | None

    @classmethod
    def of(cls, moments: Moments, scaler: Scaler, device: torch.device) -> Basis:
        """From sums over the rows; its Gram matrix, if there is one, is used up."""
        total = moments.counts.sum()
        mean = moments.sums.sum(axis=(0, 1)) / total
        scale, center = np.ones_like(mean), moments.shift + mean
        if scaler.mean is not None and scaler.scale is not None:
            scale, center = scaler.scale, (center - scaler.mean) / scaler.scale

        def tensor(array: Floats) -> Tensor:
            return torch.tensor(array, dtype=torch.float32, device=device)

        if not moments.grams:
            variances = moments.squares.sum(axis=0) / total - np.square(mean)
            return cls(tensor(center), tensor(np.maximum(variances, 0) / scale**2), None)
        gram = moments.grams.pop()
        for i in range(len(mean)):
            gram[:, i] /= total
            gram[:, i] -= mean[i] * mean
            gram[:, i] /= scale[i] * scale
        found, vectors = eigh(gram, lower=False, overwrite_a=True, check_finite=False)
        del gram
        return cls(tensor(center), tensor(np.maximum(found, 0)), tensor(vectors))

    def solve(self, residual: Tensor, penalty: float, strength: Tensor) -> Tensor:
        """(strength · covariance + penalty)⁻¹ residual, the intercept eliminated.

        Args:
            residual: (n_lanes, n_outputs, n_features + 1).
            penalty: of the coefficients.
            strength: (n_lanes,).
        """
        last = residual[..., -1:]
        inner = residual[..., :-1] - last * self.center
        strength = strength.to(residual.dtype)[:, None, None]
        if self.vectors is not None:
            inner = inner @ self.vectors
        inner /= strength * self.eigenvalues + penalty
        if self.vectors is not None:
            inner = inner @ self.vectors.T
        shift = last / strength - inner @ self.center[:, None]
        return torch.cat([inner, shift], dim=2)


def solve_linear(
    rows: StoredRows,
    parts: Parts,
    scaler: Scaler,
    problems: Sequence[LinearProblem],
    basis: Basis,
    device: torch.device,
) -> list[LinearFit]:
    """Minimise all problems; the tolerance means what it means in memory.

    Args:
        rows: stored features.
        parts: their classes and parts.
        scaler: of the features.
        problems: what to minimise; those that are done leave the passes.
        basis: the preconditioner.
        device: where products are taken.
    """
    fits: dict[int, LinearFit] = {}
    steps = [_minimise(problem, basis, rows.n_features) for problem in problems]
    asks = {i: next(step) for i, step in enumerate(steps)}
    while asks:
        answers = _pass(rows, parts, scaler, {i: problems[i] for i in asks}, asks, device)
        asks = {}
        for i, answer in answers.items():
            try:
                asks[i] = steps[i].send(answer)
            except StopIteration as done:
                fits[i] = done.value
    return [fits[i] for i in range(len(problems))]


def _minimise(problem: LinearProblem, basis: Basis, n_features: int) -> _Steps:
    """Newton steps of one problem."""
    params, penalty = problem.start, problem.penalty
    if params is None:
        shape = (problem.n_lanes, problem.n_columns // problem.n_lanes, n_features + 1)
        params = torch.zeros(shape, device=basis.center.device)
    here = yield _Ask(params)
    objective = _objective(here, params, penalty)
    n_iter = 0
    while n_iter < problem.max_iter:
        n_iter += 1
        direction, decrement = yield from _direction(problem, basis, params, here, objective)
        arrived = 0.5 * decrement <= problem.tol * objective
        length = torch.zeros_like(objective)
        noise = 8 * torch.finfo(params.dtype).eps * objective
        t = torch.ones_like(objective)
        for _ in range(_HALVINGS):
            trial = params + t.to(params.dtype)[:, None, None] * direction
            there = yield _Ask(trial)
            found = _objective(there, trial, penalty)
            enough = found <= objective - 1e-4 * t * decrement + noise
            if bool(enough.all()):
                length = t
                break
            t = torch.where(enough, t, 0.5 * t)
        if not bool(length.any()):
            break
        params, here, objective = trial, there, found
        if bool(arrived.all()):
            break
    return LinearFit(params, n_iter, bool(arrived.all()))


def _direction(
    problem: LinearProblem, basis: Basis, params: Tensor, here: _Answer, objective: Tensor
) -> Generator[_Ask, _Answer, tuple[Tensor, Tensor]]:
    """Conjugate gradients: the step, and its squared decrement -gᵀs (n_lanes,)."""
    penalty = problem.penalty
    gradient = _add_penalty(here.product, params, penalty)
    strength = here.strength.clamp(min=torch.finfo(torch.float32).tiny)
    residual = -gradient
    solved = basis.solve(residual, penalty, strength)
    search = solved
    norm = _dot(residual, solved)
    goal = torch.maximum(_FORCING**2 * norm, 2 * _ENOUGH * problem.tol * objective)
    solution = torch.where((norm <= goal)[:, None, None], search, 0.0)
    n_products = 0
    while bool((norm > goal).any()) and n_products < _MAX_CG:
        n_products += 1
        answer = yield _Ask(params, search)
        product = _add_penalty(answer.product, search, penalty)
        bending = _dot(search, product)
        usable = (norm > goal) & (bending > 0)
        length = torch.where(usable, norm / bending, 0.0).to(search.dtype)[:, None, None]
        solution = solution + length * search
        residual = residual - length * product
        solved = basis.solve(residual, penalty, strength)
        last, norm = norm, _dot(residual, solved)
        search = solved + (norm / last).to(search.dtype)[:, None, None] * search
        norm = torch.where(usable, norm, 0.0)
    return solution, -_dot(gradient, solution)


def _pass(
    rows: StoredRows,
    parts: Parts,
    scaler: Scaler,
    problems: dict[int, LinearProblem],
    asks: dict[int, _Ask],
    device: torch.device,
) -> dict[int, _Answer]:
    """Answer what was asked, in one pass."""
    flat = [
        tensor.reshape(-1, tensor.shape[-1])
        for ask in asks.values()
        for tensor in (ask.params, ask.direction)
        if tensor is not None
    ]
    columns = torch.cat(flat)
    totals = {
        i: _Answer(
            torch.zeros(ask.params.shape[0], dtype=torch.float64, device=device),
            torch.zeros_like(ask.params),
            torch.zeros(ask.params.shape[0], dtype=torch.float64, device=device),
        )
        for i, ask in asks.items()
    }
    scaled = np.empty((rows.block_rows, rows.n_features), np.float32)
    for samples, raw in rows.blocks(parts.numbers >= 0):
        codes, numbers = parts.codes[samples], parts.numbers[samples]
        X = torch.from_numpy(scaler(raw, out=scaled[: len(raw)])).to(device)
        scores = torch.addmm(columns[:, -1], X, columns[:, :-1].T)
        slopes, first = [], 0
        for i, ask in asks.items():
            problem, answer = problems[i], totals[i]
            weights = torch.tensor(problem.weights[numbers, codes], dtype=X.dtype, device=device)
            weights = weights[:, None]
            # A class that the problem does not know has weight 0, whatever it is taken for.
            truth = np.searchsorted(problem.classes, codes).clip(max=len(problem.classes) - 1)
            loss = problem.loss(torch.from_numpy(truth).to(device))
            shape = (len(X), *ask.params.shape[:2])
            own = scores[:, first : first + problem.n_columns].reshape(shape)
            first += problem.n_columns
            slope, bend = loss.slope(own)
            if ask.direction is None:
                strength = loss.strength(bend) * weights
                answer.value.add_((loss.value(own) * weights).sum(dim=0, dtype=torch.float64))
                answer.strength.add_(strength.sum(dim=0, dtype=torch.float64))
            else:
                moved = scores[:, first : first + problem.n_columns].reshape(shape)
                first += problem.n_columns
                slope = loss.curve(bend, moved)
            slopes.append((slope * weights[:, :, None]).reshape(len(X), -1))
        slope = torch.cat(slopes, dim=1)
        products, ends = slope.T @ X, slope.sum(dim=0)
        first = 0
        for i in asks:
            stop = first + problems[i].n_columns
            product = totals[i].product
            product[..., :-1] += products[first:stop].reshape(*product.shape[:2], -1)
            product[..., -1] += ends[first:stop].reshape(product.shape[:2])
            first = stop
    return totals


def _objective(answer: _Answer, params: Tensor, penalty: float) -> Tensor:
    squares = params[..., :-1].square().sum(dim=(1, 2), dtype=torch.float64)
    return answer.value + 0.5 * penalty * squares


def _add_penalty(product: Tensor, params: Tensor, penalty: float) -> Tensor:
    """``product`` plus penalty times the coefficients, in place."""
    product[..., :-1] += penalty * params[..., :-1]
    return product


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of each lane, (n_lanes,) float64."""
    return (a * b).sum(dim=(1, 2), dtype=torch.float64)
