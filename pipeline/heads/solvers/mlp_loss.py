"""What a stack of networks minimises: a softmax cross-entropy for each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.heads.solvers.mlp_setting import MlpSetting
from pipeline.heads.tasks import NO_LABEL


@dataclass
class Objective:
    """The loss of each member of a stack.

    Attributes:
        tasks: columns of each task's scores.
        smoothing: (n_members, 1, 1), share of each target that is spread evenly over the classes.
    """

    tasks: Sequence[slice]
    smoothing: Tensor

    @classmethod
    def of(
        cls, tasks: Sequence[slice], settings: Sequence[MlpSetting], device: torch.device
    ) -> Objective:
        """The loss of networks with these settings."""
        shares = [setting.label_smoothing for setting in settings]
        return cls(tasks, torch.tensor(shares, device=device)[:, None, None])

    def select(self, kept: Tensor) -> Objective:
        """Of some of the members."""
        return replace(self, smoothing=self.smoothing[kept])

    def gradient(
        self,
        scores: Tensor,
        y: Tensor,
        weights: Tensor,
        log_variances: Sequence[Tensor] = (),
        by_log_variance: Sequence[Tensor] = (),
    ) -> Tensor:
        """Gradient of the loss of a batch by the scores, shaped as they are.

        Args:
            scores: (n_members, n, n_outputs), those of all tasks side by side.
            y: (n,) classes, or (n, n_tasks) with NO_LABEL.
            weights: (1 or n_members, n), of the samples.
            log_variances: one (n_members, n_tasks), where the weights of the tasks are learned;
                otherwise the loss is the mean over the tasks.
            by_log_variance: where to write the gradients by them, shaped as they are.
        """
        if y.ndim == 1:
            return _score_gradient(scores, y, weights / len(y), self.smoothing)
        by_score = torch.empty_like(scores)
        for t, columns in enumerate(self.tasks):
            has_label = y[:, t] != NO_LABEL
            n_labelled = has_label.sum().clamp(min=1)
            shares = weights * has_label / n_labelled
            part, truth = scores[:, :, columns], y[:, t].clamp(min=0)
            if not log_variances:
                task_shares = shares / len(self.tasks)
            else:
                precision = torch.exp(-log_variances[0][:, t])
                task_shares = shares * precision[:, None]
                loss = (_losses(part, truth, self.smoothing) * shares).sum(dim=1)
                # A batch without a label of the task says nothing of its variance.
                by_log_variance[0][:, t] = (0.5 - precision * loss) * has_label.any()
            by_score[:, :, columns] = _score_gradient(part, truth, task_shares, self.smoothing)
        return by_score

    def validation(self, scores: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over a block of samples, from which the validation loss is made.

        Args:
            scores: as for :meth:`gradient`.
            y: likewise.
            weights: likewise.

        Returns:
            (n_tasks, n_members) float64 negative log-likelihoods, nats, and (n_tasks, 1) counts of
            the labelled samples.
        """
        sums, counts = [], []
        for t, columns in enumerate(self.tasks):
            codes = y if y.ndim == 1 else y[:, t]
            has_label = codes != NO_LABEL
            losses = _losses(scores[:, :, columns], codes.clamp(min=0))
            sums.append((losses * weights * has_label).sum(dim=1, dtype=torch.float64))
            counts.append(has_label.sum(dim=0, keepdim=True))
        return torch.stack(sums), torch.stack(counts)


def mean_over_tasks(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean loss over the tasks that have labels, of what :meth:`Objective.validation` gave.

    Args:
        sums: (n_tasks, n_members).
        counts: (n_tasks, 1).

    Returns:
        (n_members,), nats.
    """
    found = counts[:, 0] > 0
    return (sums[found] / counts[found]).mean(dim=0)


def _score_gradient(scores: Tensor, y: Tensor, weights: Tensor, smoothing: Tensor) -> Tensor:
    """Gradient of the weighted cross-entropy, shaped as the scores (n_members, n, n_classes)."""
    gradient = torch.softmax(scores, dim=2)
    gradient -= smoothing / scores.shape[2]
    truth = y[None, :, None].expand(len(scores), -1, 1)
    gradient.scatter_add_(2, truth, (smoothing - 1).expand(-1, len(y), 1).contiguous())
    gradient *= weights[:, :, None]
    return gradient


def _losses(scores: Tensor, y: Tensor, smoothing: Tensor | float = 0.0) -> Tensor:
    """Cross-entropy of each sample, nats: (n_members, n)."""
    truth = y[None, :, None].expand(len(scores), -1, 1)
    of_truth = scores.gather(2, truth)
    if isinstance(smoothing, Tensor):
        of_truth = of_truth + smoothing * (scores.mean(dim=2, keepdim=True) - of_truth)
    return scores.logsumexp(dim=2) - of_truth[:, :, 0]
