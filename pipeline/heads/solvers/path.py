"""A grid of penalties, times folds and targets, solved from few of its points to all.

Solutions are smooth in log C. A coarse part of the grid is solved first, in the order of C; the
rest starts between its neighbours, at the cubic through them, and needs a Newton step or two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.heads.solvers.active import ActiveSets
from pipeline.heads.solvers.design import Design
from pipeline.heads.solvers.losses import Loss
from pipeline.heads.solvers.newton import (
    Anchor,
    Anchors,
    Found,
    Problems,
    make_anchor,
    plain_anchor,
    scores_of,
    solve,
)

_COARSE = math.log(12)
_ROUGH = 1e-2
_MANY_PRODUCTS = 8
_INHERITED = 0.6
_EIGH = 15  # cubes of the width that an eigendecomposition costs
_BATCH_BYTES = {"cpu": 2**25, "cuda": 2**31}
_FACTOR_BYTES = {"cpu": 2**30, "cuda": 2**33}


@dataclass(frozen=True)
class Lanes:
    """What is solved along one grid of penalties.

    Attributes:
        loss: of the problems of one penalty, a lane each.
        weights: (n_samples, n_lanes), or None for ones.
        n_lanes: folds times targets, fold by fold.
        n_targets: lanes of a fold; each target has preconditioners of its own.
        jump: the curvature of a sample where it is not 0, for a loss that bends in steps; None for
            a smooth one.
    """

    loss: Loss
    weights: Tensor | None
    n_lanes: int
    n_targets: int = 1
    jump: float | None = None

    def select(self, lanes: Tensor) -> Lanes:
        """Some of them, each a target of its own."""
        weights = None if self.weights is None else self.weights[:, lanes]
        return Lanes(self.loss.select(lanes), weights, len(lanes), len(lanes), self.jump)

    def centre(self) -> Lanes:
        """One fold instead of all, with their mean weights: near each of them."""
        n_targets = self.n_targets
        weights = self.weights
        if weights is not None:
            weights = weights.reshape(len(weights), -1, n_targets).mean(dim=1)
        lanes = torch.arange(n_targets)
        return Lanes(self.loss.select(lanes), weights, n_targets, n_targets, self.jump)


@dataclass(frozen=True)
class Path:
    """The solved grid.

    Attributes:
        penalties: (n_penalties,) float64, descending.
        params: (n_penalties, n_lanes, n_outputs, rank + 1).
        found: objective, gap, n_iter, converged, softest of all problems, penalty by penalty.
        anchors: preconditioners, one a target for every solved coarse point.
        anchor_at: log of the penalties of these points.
    """

    penalties: Tensor
    params: Tensor
    found: Found
    anchors: list[Anchor]
    anchor_at: list[float]

    def of_lanes(self, lanes: Tensor) -> Path:
        """A start for some lanes of all folds, each a target of its own."""
        targets = lanes % self.params.shape[1]
        return _regrouped([self], self.params[:, targets], lambda values: values[0][:, targets])


def solve_path(
    design: Design,
    lanes: Lanes,
    penalties: Tensor,
    *,
    start: Path | None,
    tol: float,
    max_iter: int,
) -> Path:
    """Solve every lane at every penalty.

    Args:
        design: the features.
        lanes: what is solved.
        penalties: (n_penalties,) float64, descending and distinct.
        start: a solved path of the same penalties, of the lanes of one fold; each fold starts from
            it, and takes its preconditioners.
        tol: see :func:`~pipeline.heads.solvers.newton.solve`.
        max_iter: Newton steps of a problem at most.
    """
    if lanes.jump is None:
        return _PathSolver(design, lanes, penalties, start, tol, max_iter).run()
    # Each lane has a Hessian of its own: as many advance together as there is room for.
    values = design.values
    factor_bytes = 2 * values.element_size() * values.shape[1] ** 2
    room = _FACTOR_BYTES.get(values.device.type, 2**30) // factor_bytes
    parts = torch.split(torch.arange(lanes.n_lanes, device=values.device), max(1, room))
    paths = [
        _PathSolver(
            design, lanes.select(part), penalties, start and start.of_lanes(part), tol, max_iter
        ).run()
        for part in parts
    ]
    params = torch.cat([path.params for path in paths], dim=1)
    return _regrouped(paths, params, lambda values: torch.cat(values, dim=1))


def _regrouped(
    paths: Sequence[Path], params: Tensor, change: Callable[[list[Tensor]], Tensor]
) -> Path:
    """The path of other lanes; ``change`` makes (n_penalties, n_lanes) of those of ``paths``."""
    n_points = len(params)

    def of_problems(values: list[Tensor]) -> Tensor:
        return change([value.reshape(n_points, -1) for value in values]).reshape(-1)

    found = Found.of([path.found for path in paths], params.flatten(0, 1), of_problems)
    return Path(paths[0].penalties, params, found, [], [])


class _PathSolver:
    def __init__(
        self,
        design: Design,
        lanes: Lanes,
        penalties: Tensor,
        start: Path | None,
        tol: float,
        max_iter: int,
    ) -> None:
        self.design, self.lanes, self.penalties = design, lanes, penalties
        self.tol, self.max_iter = tol, max_iter
        self.at = penalties.log().tolist()
        self.base = None if start is None else start.params
        shape = (len(self.at), lanes.n_lanes, lanes.loss.n_outputs, design.rank + 1)
        self.params = torch.zeros(shape, dtype=design.values.dtype, device=design.values.device)
        n_problems, device = shape[0] * shape[1], design.values.device
        self.found = Found(
            self.params.reshape(n_problems, *shape[2:]),
            torch.zeros(n_problems, dtype=torch.float64, device=device),
            torch.zeros(n_problems, dtype=torch.float64, device=device),
            torch.zeros(n_problems, dtype=torch.int64, device=device),
            torch.zeros(n_problems, dtype=torch.bool, device=device),
            torch.ones(n_problems, dtype=torch.float64, device=device),
        )
        if start is not None:
            softest = start.found.softest.reshape(len(self.at), 1, -1)
            n_folds = n_problems // softest.numel()
            self.found.softest.copy_(softest.expand(-1, n_folds, -1).reshape(-1))
        self.anchors = [] if start is None else start.anchors
        self.anchor_at = [] if start is None else start.anchor_at
        self.active: ActiveSets | None = None
        if lanes.jump is not None:
            self.active = ActiveSets.of(design.values, lanes.n_lanes, lanes.jump)
        # Active sets are followed from one penalty to the next, so that few samples change sides.
        self.stride = _stride(self.at) if self.active is None else 1

    def run(self) -> Path:
        """Solve all."""
        self.coarse()
        self.fine()
        return Path(self.penalties, self.params, self.found, self.anchors, self.anchor_at)

    def coarse(self) -> None:
        """Solve every stride-th penalty, the strongest first."""
        points = sorted({*range(0, len(self.at), self.stride), len(self.at) - 1})
        if self.base is not None:
            known: list[int] = []
            for i in points:
                self.solve_points([i], [self.between(known, i)])
                known.append(i)
            return
        solved: list[int] = []
        n_targets = self.lanes.n_targets
        self.anchors, self.anchor_at = [plain_anchor(self.design)] * n_targets, [self.at[0]]
        for i in points:
            start = self.ahead(solved, i)
            if self.active is None:
                start = self.with_anchors_near(i, start)
            self.solve_points([i], [start])
            solved.append(i)

    def with_anchors_near(self, i: int, start: Tensor) -> Tensor:
        """Solve a penalty roughly, and make its anchors if those at hand take long."""
        n_products = self.solve_points([i], [start], tol=max(self.tol, _ROUGH))
        if n_products > self.many_products():
            # Strong penalties make do with the design's own axes.
            self.anchors = [*self.anchors, *self.anchors_of(i)]
            self.anchor_at = [*self.anchor_at, self.at[i]]
            # These leave less soft than the last anchor did, and how much is yet to be met.
            self.found.softest.reshape(len(self.at), -1)[i] **= _INHERITED
        return self.params[i]

    def many_products(self) -> float:
        """Products with the Hessian in a step that a new anchor is worth."""
        if self.design.basis is not None:
            return _MANY_PRODUCTS
        # Few problems on features as they came: count what the anchor costs, in products.
        n, d = self.design.n_samples, self.design.rank
        columns = self.lanes.n_lanes * self.lanes.loss.n_outputs
        return max(_MANY_PRODUCTS, (d + _EIGH * d * d / n) / (4 * columns))

    def fine(self) -> None:
        """Halve the stride until all is solved."""
        known = sorted({*range(0, len(self.at), self.stride), len(self.at) - 1})
        stride = self.stride
        while len(known) < len(self.at):
            stride = max(1, stride // 2)
            points = [i for i in range(0, len(self.at), stride) if i not in set(known)]
            self.solve_points(points, [self.between(known, i) for i in points])
            known = sorted({*known, *points})

    def base_of(self, i: int) -> Tensor:
        """The start that was given, for every lane."""
        assert self.base is not None
        n_folds = self.lanes.n_lanes // self.base.shape[1]
        return self.base[i].repeat(n_folds, 1, 1).to(self.params.dtype)

    def ahead(self, solved: Sequence[int], i: int) -> Tensor:
        """The line through the last two solutions, or the last one: whichever is lower."""
        if not solved:
            return self.params[i]
        last = self.params[solved[-1]]
        if len(solved) < 2:
            return last
        line = self.curve_through(solved[-2:], i)
        problems = self.problems([i])
        better = self.objective(problems, line) < self.objective(problems, last)
        return torch.where(better[:, None, None], line, last)

    def between(self, known: Sequence[int], i: int) -> Tensor:
        """The cubic through two solutions on either side, or as many as there are.

        With a start that was given it goes through what they differ from it.
        """
        below = [j for j in known if j < i][-2:]
        above = [j for j in known if j > i][:2]
        nodes = [*below, *above]
        if self.base is None:
            return self.curve_through(nodes, i)
        if not nodes:
            return self.base_of(i)
        rest = [self.params[j] - self.base_of(j) for j in nodes]
        return self.base_of(i) + _lagrange(self.at, nodes, rest, i)

    def curve_through(self, nodes: Sequence[int], i: int) -> Tensor:
        """The polynomial in log C through solved points, at another."""
        return _lagrange(self.at, nodes, [self.params[j] for j in nodes], i)

    def objective(self, problems: Problems, params: Tensor) -> Tensor:
        return problems.objective(scores_of(self.design.values, params), params)

    def problems(self, points: Sequence[int]) -> Problems:
        """The problems of some penalties, lane by lane within each."""
        n_lanes, device = self.lanes.n_lanes, self.params.device
        lane = torch.arange(n_lanes, device=device).repeat(len(points))
        weights = self.lanes.weights
        return Problems(
            self.lanes.loss.select(lane),
            self.penalties[list(points)].repeat_interleave(n_lanes),
            None if weights is None else weights[:, lane],
            self.anchors_near(points) if self.active is None else self.active.select(lane),
        )

    def anchors_near(self, points: Sequence[int]) -> Anchors:
        """For each lane of some penalties the anchor that was made nearest."""
        n_lanes, device = self.lanes.n_lanes, self.params.device
        lane = torch.arange(n_lanes, device=device).repeat(len(points))
        nearest = [
            min(range(len(self.anchor_at)), key=lambda a: abs(self.anchor_at[a] - self.at[i]))
            for i in points
        ]
        place = torch.tensor(nearest, device=device).repeat_interleave(n_lanes)
        n_targets = self.lanes.n_targets
        return Anchors(self.anchors, place * n_targets + lane % n_targets)

    def solve_points(
        self, points: Sequence[int], starts: Sequence[Tensor], tol: float | None = None
    ) -> float:
        """Solve some penalties, as many at once as fit; returns products a step of the worst."""
        most = 0.0
        n_lanes, n_outputs = self.params.shape[1:3]
        column_bytes = self.design.n_samples * self.params.element_size()
        room = _BATCH_BYTES.get(self.params.device.type, 2**25) // column_bytes
        n_at_once = max(1, room // (n_lanes * n_outputs))
        for first in range(0, len(points), n_at_once):
            part = list(points[first : first + n_at_once])
            start = torch.cat(list(starts[first : first + n_at_once]))
            found = solve(
                self.design,
                self.problems(part),
                start,
                tol=tol or self.tol,
                max_iter=self.max_iter,
                softest=torch.cat([self.softest_near(i) for i in part]),
            )
            rows = torch.tensor(part, device=start.device)[:, None] * n_lanes
            rows = (rows + torch.arange(n_lanes, device=start.device)).reshape(-1)
            self.found.params[rows] = found.params
            self.found.objective[rows] = found.objective
            self.found.gap[rows] = found.gap
            self.found.n_iter[rows] += found.n_iter
            self.found.converged[rows] = found.converged
            self.found.softest[rows] = found.softest
            most = max(most, found.n_products)
        return most

    def softest_near(self, i: int) -> Tensor:
        """The least curvature met at a penalty and at those solved on either side of it."""
        n_lanes = self.lanes.n_lanes
        softest, n_iter = self.found.softest.reshape(-1, n_lanes), self.found.n_iter
        known = (n_iter.reshape(-1, n_lanes) > 0).any(dim=1).nonzero()[:, 0].tolist()
        if i in known:
            return softest[i]
        around = [*[j for j in known if j < i][-1:], *[j for j in known if j > i][:1]]
        return softest[[i, *around]].amin(dim=0)

    def anchors_of(self, i: int) -> list[Anchor]:
        """The anchors of a solved point, one a target; the folds of it are averaged."""
        problems = self.problems([i])
        _, bend = problems.loss.slope(scores_of(self.design.values, self.params[i]))
        strength = problems.weighted(problems.loss.strength(bend))
        strength = strength.reshape(len(strength), -1, self.lanes.n_targets).mean(dim=1)
        return [make_anchor(self.design, one) for one in strength.unbind(dim=1)]


def _stride(at: Sequence[float]) -> int:
    """The largest power of two whose coarse points lie within about a decade of each other."""
    widest = max((abs(b - a) for a, b in pairwise(at)), default=0.0)
    stride = 1
    while 2 * stride * widest <= _COARSE and 4 * stride < len(at):
        stride *= 2
    return stride


def _lagrange(
    at: Sequence[float], nodes: Sequence[int], values: Sequence[Tensor], i: int
) -> Tensor:
    """The polynomial through ``values`` at ``at[nodes]``, at ``at[i]``."""
    result = torch.zeros_like(values[0])
    for j, value in zip(nodes, values, strict=True):
        share = 1.0
        for k in nodes:
            if k != j:
                share *= (at[i] - at[k]) / (at[j] - at[k])
        result += share * value
    return result
