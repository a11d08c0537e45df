"""The Hessian of a loss that bends in steps, kept in step with the samples that bend it.

A sample of the squared hinge bends the objective by a constant or not at all. Between two Newton
steps few samples change sides, so the Hessian is updated by those rows and factorised again, as in
Keerthi and DeCoste, "A modified finite Newton method for fast solution of large scale linear SVMs",
2005, who solve each active set by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

_BLOCK_BYTES = 2**24


class _ActiveSet:
    """The Hessian of one problem without its penalty, and a Cholesky factor with it.

    Args:
        values: (n_samples, rank + 1), the design's rows.
        gram: (rank + 1, rank + 1), Xᵀ X.
        curvature: of every sample at the start.
    """

    def __init__(self, values: Tensor, gram: Tensor, curvature: float) -> None:
        self.values = values
        self.gram = curvature * gram
        self.curvature = torch.full_like(values[:, 0], curvature)
        self.factor: Tensor | None = None
        self.penalty = 0.0
        self.is_exact = False
        self.lift = 0.0

    def follow(self, curvature: Tensor, penalty: float) -> bool:
        """Take up the curvature (n_samples,) of a new place; whether there is a new factor.

        Raises:
            ArithmeticError: the Hessian is not finite.
        """
        changed = (curvature != self.curvature).nonzero()[:, 0]
        if self.factor is not None and penalty == self.penalty and not len(changed):
            return False
        self.penalty = penalty
        active = curvature.nonzero()[:, 0]
        factor = None
        if len(changed) < len(active):
            self._add(changed, (curvature - self.curvature)[changed])
            factor = self._factorise()
        self.curvature = curvature
        while factor is None:
            self._make(active)
            factor = self._factorise()
            if factor is None:  # rounding has lost the penalty: in float32, and in float64 too
                self.lift = 100 * self.lift or 1e-14 if self.is_exact else 0.0
                self.is_exact = True
            if self.lift > 1:
                raise ArithmeticError(
                    "the Hessian is not finite: the features or the sample weights are too large"
                )
        self.factor = factor
        return True

    def solve(self, residual: Tensor) -> Tensor:
        """(Hessian + penalty)⁻¹ residual, both (1, rank + 1)."""
        assert self.factor is not None
        right = residual.T.to(self.factor.dtype)
        return torch.cholesky_solve(right, self.factor).T.to(residual.dtype)

    def _make(self, active: Tensor) -> None:
        dtype = torch.float64 if self.is_exact else self.values.dtype
        self.gram = torch.zeros_like(self.gram, dtype=dtype)
        self._add(active, self.curvature[active])

    def _add(self, rows: Tensor, weights: Tensor) -> None:
        n_at_once = max(1, _BLOCK_BYTES // (self.gram.element_size() * len(self.gram)))
        for some, weight in zip(
            torch.split(rows, n_at_once), torch.split(weights, n_at_once), strict=True
        ):
            block = self.values[some].to(self.gram.dtype)
            self.gram.addmm_((block * weight[:, None]).T, block)

    def _factorise(self) -> Tensor | None:
        """A lower factor; None where rounding left the Hessian without one."""
        full = self.gram.clone()
        diagonal = full.diagonal()
        diagonal[:-1] += self.penalty
        # No active sample at all leaves the intercept without curvature.
        diagonal[-1:].clamp_(min=torch.finfo(full.dtype).eps)
        diagonal *= 1 + self.lift
        factor, info = torch.linalg.cholesky_ex(full)
        return None if int(info) else factor


@dataclass(frozen=True)
class ActiveSets:
    """A preconditioner of its own for every problem; see :class:`.newton.Preconditioner`.

    Attributes:
        sets: one a problem.
    """

    sets: list[_ActiveSet]
    is_exact: ClassVar[bool] = True

    @classmethod
    def of(cls, values: Tensor, n_problems: int, curvature: float) -> ActiveSets:
        """All samples active.

        Args:
            values: (n_samples, rank + 1), the design's rows.
            n_problems: how many.
            curvature: of an active sample with weight 1.
        """
        gram = values.T @ values
        return cls([_ActiveSet(values, gram, curvature) for _ in range(n_problems)])

    def select(self, kept: Tensor) -> ActiveSets:
        """Those of some of the problems."""
        return ActiveSets([self.sets[i] for i in kept.tolist()])

    def at(self, strength: Tensor, penalty: Tensor) -> FactoredHessians:
        """Follow the problems to where they are now.

        Args:
            strength: (n_samples, n_problems), curvatures with weights.
            penalty: (n_problems,).
        """
        pairs = zip(self.sets, strength.unbind(dim=1), penalty.tolist(), strict=True)
        fresh = [one.follow(curvature, strong) for one, curvature, strong in pairs]
        return FactoredHessians(self.sets, torch.tensor(fresh, device=penalty.device))


@dataclass(frozen=True)
class FactoredHessians:
    """Hessians at one place of each problem.

    Attributes:
        sets: one a problem.
        fresh: (n_problems,), whether its factor is new.
    """

    sets: list[_ActiveSet]
    fresh: Tensor

    def solve(self, residual: Tensor) -> Tensor:
        """Inverses times ``residual`` (n_problems, 1, rank + 1)."""
        parts = [one.solve(part) for one, part in zip(self.sets, residual.unbind(), strict=True)]
        return torch.stack(parts)

    def select(self, kept: Tensor) -> FactoredHessians:
        """Those of some of the problems."""
        return FactoredHessians([self.sets[i] for i in kept.tolist()], self.fresh[kept])
