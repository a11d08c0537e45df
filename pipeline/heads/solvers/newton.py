"""Many convex problems on one design, by Newton steps that advance together.

Each step solves H s = -g by conjugate gradients. A product with the Hessian of every problem is two
products with the one X, and so is a gradient; the line search needs no further one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pipeline.heads.solvers.design import Design
from pipeline.heads.solvers.losses import Loss

_FORCING = 0.1
_ENOUGH = 0.05
_CAUTION = 2  # power of the least curvature met, which is above the least there is
_MAX_CG = 200
_HALVINGS = 30


@dataclass(frozen=True)
class Anchor:
    """The Hessian of one problem, its classes averaged: Xᵀ diag(c) X, after a rotation.

    Curvature c changes little along a path, and a penalty only shifts the eigenvalues: an anchor
    preconditions all problems near the one that it was made of.

    Attributes:
        center: (rank,), the mean of the rows weighted by c; the intercept's row is eliminated.
        total: Σ c.
        eigenvalues: (rank,).
        basis: (rank, rank), or None where the design's own axes are the eigenvectors.
    """

    center: Tensor
    total: Tensor
    eigenvalues: Tensor
    basis: Tensor | None

    def solve(self, residual: Tensor, penalty: Tensor, scale: Tensor) -> Tensor:
        """(scale · Hessian + penalty)⁻¹ residual.

        Args:
            residual: (n_problems, n_outputs, rank + 1).
            penalty: (n_problems,).
            scale: (n_problems,), the problem's Σ c as a part of the anchor's.
        """
        last = residual[..., -1:]
        inner = residual[..., :-1] - last * self.center
        if self.basis is not None:
            inner = inner @ self.basis
        inner = inner / (scale[:, None] * self.eigenvalues + penalty[:, None])[:, None]
        if self.basis is not None:
            inner = inner @ self.basis.T
        shift = last / (scale[:, None, None] * self.total)
        shift -= inner @ self.center[:, None]
        return torch.cat([inner, shift], dim=2)


def plain_anchor(design: Design) -> Anchor:
    """The anchor of equal curvature 1: the eigenvalues of the design itself."""
    values = design.values
    return Anchor(
        torch.zeros_like(values[0, :-1]),
        torch.tensor(float(len(values)), dtype=values.dtype, device=values.device),
        design.eigenvalues.to(values.dtype),
        None,
    )


def make_anchor(design: Design, curvature: Tensor) -> Anchor:
    """The anchor of ``curvature`` (n_samples,), none below zero."""
    # Rows that hardly bend are left out: far along a path that is most of them.
    order = curvature.argsort(descending=True)
    reached = torch.cumsum(curvature[order].double(), 0)
    n_kept = int((reached < 0.99 * reached[-1]).sum()) + 1
    kept = order[:n_kept]
    rows, weights = design.values[kept], curvature[kept]
    gram = (rows * weights[:, None]).T @ rows
    # No curvature at all leaves the penalty alone, and a division by zero to avoid.
    tiny = torch.finfo(gram.dtype).tiny
    gram *= curvature.sum() / weights.sum().clamp(min=tiny)
    total = gram[-1, -1].clamp(min=tiny)
    center = gram[:-1, -1] / total
    inner = gram[:-1, :-1] - total * torch.outer(center, center)
    eigenvalues, basis = torch.linalg.eigh(inner.double())
    return Anchor(center, total, eigenvalues.clamp(min=0).to(rows.dtype), basis.to(rows.dtype))


class Inverse(Protocol):
    """Approximate inverses of the Hessians of some problems at one place."""

    @property
    def fresh(self) -> Tensor:
        """(n_problems,), whether what was met of curvature no longer says anything of it."""

    def solve(self, residual: Tensor) -> Tensor:
        """Times ``residual`` (n_problems, n_outputs, rank + 1)."""

    def select(self, kept: Tensor) -> Inverse:
        """Those of some of the problems."""


class Preconditioner(Protocol):
    """What brings conjugate gradients near the solution."""

    @property
    def is_exact(self) -> bool:
        """Whether it is the inverse but for rounding, which products in bfloat16 would spoil."""

    def select(self, kept: Tensor) -> Preconditioner:
        """That of some of the problems."""

    def at(self, strength: Tensor, penalty: Tensor) -> Inverse:
        """Where the problems are now.

        Args:
            strength: (n_samples, n_problems), curvatures of the samples with their weights.
            penalty: (n_problems,).
        """


@dataclass(frozen=True)
class Anchors:
    """Anchors that problems near each other share.

    Attributes:
        anchors: all of them.
        which: (n_problems,), the one that each problem takes.
    """

    anchors: Sequence[Anchor]
    which: Tensor
    is_exact: ClassVar[bool] = False

    def select(self, kept: Tensor) -> Anchors:
        """The same for some of the problems."""
        return Anchors(self.anchors, self.which[kept])

    def at(self, strength: Tensor, penalty: Tensor) -> _ScaledAnchors:
        """With each problem's own penalty, and its curvature as a part of the anchor's."""
        totals = torch.stack([anchor.total for anchor in self.anchors])
        scales = strength.sum(dim=0) / totals[self.which]
        tiny = torch.finfo(strength.dtype).tiny
        return _ScaledAnchors(self, penalty.to(strength.dtype), scales.clamp(min=tiny))


@dataclass(frozen=True)
class _ScaledAnchors:
    shared: Anchors
    penalty: Tensor
    scales: Tensor

    @property
    def fresh(self) -> Tensor:
        return torch.zeros_like(self.shared.which, dtype=torch.bool)

    def solve(self, residual: Tensor) -> Tensor:
        solved = torch.empty_like(residual)
        for i in sorted(set(self.shared.which.tolist())):
            mine = (self.shared.which == i).nonzero()[:, 0]
            anchor = self.shared.anchors[i]
            solved[mine] = anchor.solve(residual[mine], self.penalty[mine], self.scales[mine])
        return solved

    def select(self, kept: Tensor) -> _ScaledAnchors:
        return _ScaledAnchors(self.shared.select(kept), self.penalty[kept], self.scales[kept])


@dataclass(frozen=True)
class Problems:
    """Minimise Σ w_i loss_i(x_i · params) + ½ penalty ‖coefficients‖², n_problems times.

    Attributes:
        loss: of the scores.
        penalty: (n_problems,), above 0; the intercept has none.
        weights: (n_samples, n_problems), or None for ones.
        preconditioner: of their Hessians.
    """

    loss: Loss
    penalty: Tensor
    weights: Tensor | None
    preconditioner: Preconditioner

    def select(self, kept: Tensor) -> Problems:
        """Some of them; ``kept`` holds indices."""
        weights = None if self.weights is None else self.weights[:, kept]
        return Problems(
            self.loss.select(kept), self.penalty[kept], weights, self.preconditioner.select(kept)
        )

    def weighted(self, of_samples: Tensor) -> Tensor:
        """``of_samples`` (n_samples, n_problems, …) times the weights, in place."""
        if self.weights is not None:
            of_samples *= self.weights.reshape(
                *self.weights.shape, *[1] * (of_samples.ndim - self.weights.ndim)
            )
        return of_samples

    def objective(self, scores: Tensor, params: Tensor) -> Tensor:
        """(n_problems,), summed in float64."""
        losses = self.weighted(self.loss.value(scores)).sum(dim=0, dtype=torch.float64)
        squares = params[..., :-1].square().sum(dim=(1, 2), dtype=torch.float64)
        return losses + 0.5 * self.penalty * squares

    def add_penalty(self, product: Tensor, params: Tensor) -> Tensor:
        """``product`` plus penalty times the coefficients, in place."""
        penalty = self.penalty.to(product.dtype)[:, None, None]
        product[..., :-1] += penalty * params[..., :-1]
        return product


@dataclass(frozen=True)
class Found:
    """Where the solver arrived.

    Attributes:
        params: (n_problems, n_outputs, rank + 1).
        objective: (n_problems,), float64.
        gap: (n_problems,), estimated (objective - optimum) / objective before the last step, with
            what conjugate gradients may have missed.
        n_iter: (n_problems,), Newton steps.
        converged: (n_problems,), ``gap`` fell below the tolerance.
        softest: (n_problems,), least curvature met, in the metric of the preconditioner; at most 1.
        n_products: mean number of products with the Hessian that a Newton step of a problem took.
    """

    params: Tensor
    objective: Tensor
    gap: Tensor
    n_iter: Tensor
    converged: Tensor
    softest: Tensor
    n_products: float = 0.0

    @classmethod
    def of(
        cls, parts: Sequence[Found], params: Tensor, change: Callable[[list[Tensor]], Tensor]
    ) -> Found:
        """What was found of the problems of ``params``.

        Args:
            parts: what was found of others.
            params: (n_problems, n_outputs, rank + 1).
            change: makes (n_problems,) of those of the parts.
        """
        return cls(
            params,
            change([part.objective for part in parts]),
            change([part.gap for part in parts]),
            change([part.n_iter for part in parts]),
            change([part.converged for part in parts]),
            change([part.softest for part in parts]),
        )


def scores_of(values: Tensor, params: Tensor) -> Tensor:
    """X · params: (n_samples, n_problems, n_outputs), in the dtype of ``params``."""
    flat = params.reshape(-1, params.shape[-1]).to(values.dtype)
    return (values @ flat.T).to(params.dtype).reshape(len(values), *params.shape[:2])


def gradient_of(values: Tensor, slope: Tensor) -> Tensor:
    """Xᵀ · slope: (n_problems, n_outputs, rank + 1), in the dtype of ``slope``."""
    flat = slope.reshape(len(values), -1).to(values.dtype)
    return (flat.T @ values).to(slope.dtype).reshape(*slope.shape[1:], -1)


def solve(
    design: Design,
    problems: Problems,
    start: Tensor,
    *,
    tol: float,
    max_iter: int,
    softest: Tensor | None = None,
) -> Found:
    """Minimise every problem from its start.

    A problem is done when half its squared Newton decrement, the distance to the optimum that a
    quadratic model foretells, is at most ``tol`` of the objective; the step that found this out
    is still taken. Conjugate gradients see a part of the decrement, and the rest of it is counted
    from the least curvature that they met: an estimate, no bound. Where preconditioners are poor
    (features that differ by orders of magnitude) the distance may be a few times as large.

    Args:
        design: the features.
        problems: what to minimise.
        start: (n_problems, n_outputs, rank + 1).
        tol: relative to the objective.
        max_iter: Newton steps of a problem at most.
        softest: (n_problems,), what is known of the least curvature; see :class:`Found`.
    """
    params = start.clone()
    n_problems, device = len(params), params.device
    objective = torch.zeros(n_problems, dtype=torch.float64, device=device)
    gap = torch.full_like(objective, torch.inf)
    n_iter = torch.zeros(n_problems, dtype=torch.int64, device=device)
    converged = torch.zeros(n_problems, dtype=torch.bool, device=device)
    left = torch.arange(n_problems, device=device)
    least = torch.ones_like(objective) if softest is None else softest.clone()
    state = _State(design, problems, start.clone(), softest=least.clone())
    n_products = n_steps = 0
    for _ in range(max_iter):
        step = state.advance(tol)
        n_products, n_steps = n_products + step.n_products, n_steps + len(left)
        params[left], objective[left], gap[left] = state.params, state.objective, step.gap
        least[left] = state.softest
        n_iter[left] += step.moved.long()
        converged[left] = step.arrived
        going = (~(step.arrived | step.stuck)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(left):
            left = left[going]
            state = state.select(going)
    return Found(params, objective, gap, n_iter, converged, least, n_products / max(n_steps, 1))


@dataclass(frozen=True)
class _Step:
    """(n_problems,) each: the gap before the step, and what became of it; and what it took."""

    gap: Tensor
    arrived: Tensor
    stuck: Tensor
    moved: Tensor
    n_products: int


class _State:
    """Problems that still move."""

    def __init__(
        self,
        design: Design,
        problems: Problems,
        params: Tensor,
        scores: Tensor | None = None,
        objective: Tensor | None = None,
        last_gap: Tensor | None = None,
        softest: Tensor | None = None,
        precise: bool = False,
    ) -> None:
        self.design = design
        self.problems = problems
        self.params = params
        self.scores = scores_of(design.values, params) if scores is None else scores
        self.objective = problems.objective(self.scores, params) if objective is None else objective
        self.last_gap = torch.full_like(self.objective, torch.inf) if last_gap is None else last_gap
        # The least curvature that was met, in the metric of the preconditioner, and at most 1.
        self.softest = torch.ones_like(self.objective) if softest is None else softest
        self.precise = precise or problems.preconditioner.is_exact or not has_fast_half(params)

    def select(self, kept: Tensor) -> _State:
        """Some of them."""
        return _State(
            self.design,
            self.problems.select(kept),
            self.params[kept],
            self.scores[:, kept],
            self.objective[kept],
            self.last_gap[kept],
            self.softest[kept],
            self.precise,
        )

    def advance(self, tol: float) -> _Step:
        """One Newton step of all."""
        slope, bend = self.problems.loss.slope(self.scores)
        gradient = gradient_of(self.design.values, self.problems.weighted(slope))
        del slope
        self.problems.add_penalty(gradient, self.params)
        direction, decrement, rest, broken, n_products = self._direction(gradient, bend, tol)
        floor = self.objective.clamp(min=torch.finfo(torch.float64).tiny)
        foreseen = 0.5 * decrement / floor
        # No loss is below 0, so that no more than the whole objective can be missing.
        gap = (foreseen + 0.5 * rest / floor).clamp(max=1)
        was_precise = self.precise
        # Rounding in the products shows where steps no longer bring what they should.
        slow = (foreseen > 0.5 * self.last_gap) & (self.last_gap < 1e-3)
        self.precise = self.precise or bool((slow | broken).any())
        self.last_gap = foreseen
        before = self.objective.clone()
        length = self._search(direction, decrement)
        self.params += length.to(direction.dtype)[:, None, None] * direction
        # A loss that bends in steps can fall by more than its curvature foretells.
        fell = (before - self.objective) / floor
        arrived = (gap <= tol) & (fell <= 2 * tol) & ((length == 1) | (length == 0)) & ~broken
        stuck = (length == 0) | (broken & (decrement == 0) & was_precise)
        return _Step(gap, arrived, stuck, length > 0, n_products)

    def _direction(
        self, gradient: Tensor, bend: Tensor, tol: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Conjugate gradients.

        A step that leaves the problem on its way may be a rough one. Where it would be the last,
        the iterations go on until their own error is known to be small too: it is at most
        norm · share / smallest eigenvalue of the preconditioned Hessian (Meurant and Tichý, 2019).
        The least curvature that a search met stands for that, squared, for it lags behind: little
        where the preconditioner is good, much where it is not.

        Returns:
            Steps; their squared decrements -gᵀs, what these lack of the full gᵀH⁻¹g, and whether
            they came to no end or met a negative curvature, all (n_problems,); products with the
            Hessian.
        """
        n_products = 0
        problems = self.problems
        strength = problems.weighted(problems.loss.strength(bend))
        inverse = problems.preconditioner.at(strength, problems.penalty)
        self.softest[inverse.fresh] = 1
        values = self.design.values if self.precise else self.design.half()
        solution = torch.zeros_like(gradient)
        decrement, rest = torch.zeros_like(self.objective), torch.zeros_like(self.objective)
        left = torch.arange(len(gradient), device=gradient.device)
        residual = -gradient
        solved = inverse.solve(residual)
        search = solved.clone()
        norm = _dot(residual, solved)
        broken = torch.zeros_like(norm, dtype=torch.bool)
        share, within = torch.ones_like(norm), 2 * tol * self.objective
        # Below the second term a step would be more exact than was asked for.
        goal = torch.maximum(_FORCING**2 * norm, _ENOUGH * within)
        for _ in range(_MAX_CG):
            rest[left] = norm * share / self.softest[left] ** _CAUTION
            far, near = decrement[left] > within, decrement[left] + rest[left] <= within
            going = ((norm > goal) | ~(far | near)).nonzero()[:, 0]
            if not len(going):
                break
            if len(going) < len(left):
                left, norm, goal = left[going], norm[going], goal[going]
                inverse = inverse.select(going)
                residual, search, bend = residual[going], search[going], bend[:, going]
                share, within = share[going], within[going]
                problems = problems.select(going)
            n_products += len(left)
            curved = problems.loss.curve(bend, scores_of(values, search))
            product = gradient_of(values, problems.weighted(curved))
            problems.add_penalty(product, search)
            bending = _dot(search, product)
            usable = bending > 0
            broken[left] |= ~usable
            ratio = torch.where(usable, norm / bending, 0.0)
            met = torch.where(usable, bending * share / norm, torch.inf)
            self.softest[left] = torch.minimum(self.softest[left], met)
            length = ratio.to(search.dtype)[:, None, None]
            solution[left] += length * search
            decrement[left] += ratio * norm
            residual = residual - length * product
            solved = inverse.solve(residual)
            last, norm = norm, _dot(residual, solved)
            growth = norm / last
            share = share / (share + growth)
            search = solved + growth.to(search.dtype)[:, None, None] * search
            norm = torch.where(usable, norm, 0.0)
        else:
            broken[left] = True
        return solution, -_dot(gradient, solution), rest, broken, n_products

    def _search(self, direction: Tensor, decrement: Tensor) -> Tensor:
        """Step lengths 1, ½, ¼… that lower the objective enough, or 0; scores move along."""
        moved = scores_of(self.design.values, direction)
        noise = 8 * torch.finfo(direction.dtype).eps * self.objective
        length = torch.zeros_like(self.objective)
        left = torch.arange(len(length), device=length.device)
        problems, trial, t = self.problems, self.scores + moved, 1.0
        for _ in range(_HALVINGS):
            found = problems.objective(trial, self.params[left] + t * direction[left])
            enough = found <= self.objective[left] - 1e-4 * t * decrement[left] + noise[left]
            length[left[enough]] = t
            self.objective[left[enough]] = found[enough]
            missed = (~enough).nonzero()[:, 0]
            if not len(missed):
                break
            left, problems, t = left[missed], problems.select(missed), 0.5 * t
            trial = self.scores[:, left] + t * moved[:, left]
        if bool((length == 1).all()):
            self.scores += moved
        else:
            self.scores += length.to(moved.dtype)[None, :, None] * moved
        return length


def has_fast_half(like: Tensor) -> bool:
    """Whether float32 work on this device gains from products in bfloat16."""
    if like.dtype != torch.float32:
        return False
    if like.is_cuda:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of each problem, (n_problems,) float64."""
    return (a * b).sum(dim=(1, 2), dtype=torch.float64)
