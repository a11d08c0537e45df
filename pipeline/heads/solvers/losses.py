"""Losses of linear scores, many problems side by side: value, gradient and curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

HINGE_BEND = 2.0
"""Second derivative of the squared hinge below its margin; above it there is none."""


class Loss(Protocol):
    """What the solver asks of a loss; ``scores`` is (n_samples, n_problems, n_outputs)."""

    @property
    def n_outputs(self) -> int:
        """Columns of the scores of one problem."""

    def value(self, scores: Tensor) -> Tensor:
        """Of each sample: (n_samples, n_problems)."""

    def slope(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Derivative by the scores, and what :meth:`curve` needs; both shaped as the scores."""

    def curve(self, bend: Tensor, direction: Tensor) -> Tensor:
        """Second derivative by the scores, times a direction of them."""

    def strength(self, bend: Tensor) -> Tensor:
        """Mean curvature of each sample over the outputs: (n_samples, n_problems)."""

    def select(self, problems: Tensor) -> Loss:
        """The loss of some of the problems."""


@dataclass(frozen=True)
class Softmax:
    """Cross-entropy of softmax(scores).

    All is written in the scores of the other classes against the true one, so that a sample that
    is all but certain keeps its relative accuracy in float32.

    Attributes:
        truth: (n_samples, 1, 1), int64 class indices.
        n_outputs: classes.
    """

    truth: Tensor
    n_outputs: int

    def _index(self, scores: Tensor) -> Tensor:
        return self.truth.expand(-1, scores.shape[1], 1)

    def _against_truth(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores less the true one's (-inf there), and their log-sum-exp (n, n_problems, 1)."""
        index = self._index(scores)
        others = (scores - scores.gather(2, index)).scatter_(2, index, -torch.inf)
        return others, torch.logsumexp(others, dim=2, keepdim=True)

    def value(self, scores: Tensor) -> Tensor:
        """-log p(true class)."""
        return _softplus(self._against_truth(scores)[1][:, :, 0])

    def slope(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities less the truth; and probabilities with zeros at the true class."""
        others, total = self._against_truth(scores)
        others -= _softplus(total)
        bend = others.exp_()
        return bend.scatter(2, self._index(scores), -torch.sigmoid(total)), bend

    def curve(self, bend: Tensor, direction: Tensor) -> Tensor:
        """The product (diag p - p pᵀ) d."""
        index = self._index(direction)
        moved = direction - direction.gather(2, index)
        moved *= bend
        drift = moved.sum(dim=2, keepdim=True)
        others = bend.sum(dim=2, keepdim=True)
        moved.addcmul_(bend, drift, value=-1)
        return moved.scatter_(2, index, drift * (others - 1))

    def strength(self, bend: Tensor) -> Tensor:
        """Trace over the space that sums to zero: (1 - Σ p²) / (n_classes - 1)."""
        others = bend.sum(dim=2)
        return (others * (2 - others) - bend.square().sum(dim=2)) / (self.n_outputs - 1)

    def select(self, problems: Tensor) -> Softmax:
        """All problems have the same truth."""
        return self


@dataclass(frozen=True)
class Binary:
    """A loss of ``sign · score`` with one output, of its own target in every problem.

    Attributes:
        signs: (n_samples, n_problems, 1), +1 or -1.
        hinge: the squared hinge max(0, 1 - m)² instead of log(1 + exp(-m)).
    """

    signs: Tensor
    hinge: bool
    n_outputs: int = 1

    def value(self, scores: Tensor) -> Tensor:
        """Of each sample."""
        margin = (self.signs * scores)[:, :, 0]
        return (1 - margin).clamp_(min=0).square_() if self.hinge else _softplus(-margin)

    def slope(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative."""
        margin = self.signs * scores
        if self.hinge:
            lack = (1 - margin).clamp_(min=0)
            return -2 * self.signs * lack, HINGE_BEND * (lack > 0).to(scores.dtype)
        wrong = torch.sigmoid(-margin)
        return -self.signs * wrong, wrong * torch.sigmoid(margin)

    def curve(self, bend: Tensor, direction: Tensor) -> Tensor:
        """Elementwise."""
        return bend * direction

    def strength(self, bend: Tensor) -> Tensor:
        """The second derivative itself."""
        return bend[:, :, 0].clone()

    def select(self, problems: Tensor) -> Binary:
        """Their own targets."""
        return Binary(self.signs[:, problems], self.hinge)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own turns linear above a threshold, here one that is exact."""
    return softplus(x, threshold=40)
