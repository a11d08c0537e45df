"""What is learned: a loss to go down, and scores that choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from pipeline.finetune.augment import make_mix
from pipeline.finetune.settings import Settings
from pipeline.heads.tasks import NO_LABEL, task_slices


class Objective(Protocol):
    """What a trainer needs to know of a task."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What is learned beside the network, in numbers that have no weight decay."""
        ...

    @property
    def task_weights(self) -> list[float]:
        """What the loss of each task is multiplied with."""
        ...

    def mix(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        all_targets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix samples of a batch with each other, where that is wanted.

        Args:
            inputs: (n, ...), as the network takes them.
            targets: (n,) or (n, n_tasks).
            all_targets: those of the same step in all processes; None where these are all.
        """
        ...

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss of a batch, to be learned."""
        ...

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
        """Of samples as they are: mean loss, and accuracy from 0 to 1."""
        ...


class Classification:
    """One class a sample, by cross-entropy.

    Args:
        settings: label smoothing, mixup and CutMix.
        n_classes: columns of the logits.
    """

    def __init__(self, settings: Settings, n_classes: int) -> None:
        self._mix = make_mix(settings, n_classes)
        self._loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self.parameters: tuple[nn.Parameter, ...] = ()
        self.task_weights = [1.0]

    def mix(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        all_targets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixup or CutMix; targets become (n, n_classes) shares."""
        mixed: tuple[torch.Tensor, torch.Tensor] = self._mix(inputs, targets)
        return mixed

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of (n, n_classes) logits with (n,) classes or (n, n_classes) shares."""
        loss: torch.Tensor = self._loss(outputs.float(), targets)
        return loss

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
        """Negative log-likelihood in nats, and top-1 accuracy."""
        loss = functional.cross_entropy(outputs.double(), targets)
        right = (outputs.argmax(dim=1) == targets).double().mean()
        return float(loss), float(right)


class MultiTask:
    """One class a sample and task, by cross-entropy, the logits of all tasks side by side.

    A task's loss is the mean over its labelled samples of a step; where there is none it is 0.
    Losses are averaged, or weighted by their uncertainty: the sum of exp(-s) loss + s / 2 over the
    tasks, where each s is the log of a learned variance (Kendall, Gal and Cipolla, "Multi-task
    learning using uncertainty to weigh losses", 2018, section 3.2). That is least where s is
    log(2 loss): each weight comes to 1 / (2 loss), so that no task drowns another.

    Args:
        settings: label smoothing, mixup, CutMix and how tasks are weighted.
        n_classes: of each task.
        device: of the network.
    """

    def __init__(
        self, settings: Settings, n_classes: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self._n_classes = tuple(n_classes)
        self._slices = task_slices(n_classes)
        self._mix = make_mix(settings, sum(n_classes))
        self._smoothing = settings.label_smoothing
        self._log_variances: nn.Parameter | None = None
        if settings.task_weights == "uncertainty":
            self._log_variances = nn.Parameter(torch.zeros(len(self._n_classes), device=device))
        self.parameters = () if self._log_variances is None else (self._log_variances,)

    def mix(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        all_targets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixup or CutMix; (n, n_tasks) codes become (n, n_outputs) weights of log-likelihoods.

        A sample without a label in a task has weights of zero there, one that was mixed with such
        a sample only its own share. Over the whole step the weights of a task add up to as many
        as there are samples, so that the losses of its pieces add up to its own.
        """
        shares = [
            self._one_hot(codes, n) for codes, n in zip(targets.T, self._n_classes, strict=True)
        ]
        inputs, mixed = self._mix(inputs, torch.cat(shares, dim=1))
        step = targets if all_targets is None else all_targets
        # Mixing moves shares from sample to sample, and leaves their sum as it was.
        scales = len(step) / (step != NO_LABEL).sum(dim=0).clamp(min=1).to(mixed)
        for part, scale in zip(self._slices, scales, strict=True):
            mixed[:, part] *= scale
        return inputs, mixed

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean over the samples of what they add to the batch's loss.

        Args:
            outputs: (n, n_outputs) logits.
            targets: (n, n_outputs), what :meth:`mix` gave, or a piece of it.
        """
        losses = torch.stack(
            [functional.cross_entropy(outputs[:, p].float(), targets[:, p]) for p in self._slices]
        )
        if self._log_variances is None:
            return losses.mean()
        # 1 for all of a step; 0 where it has no label of the task, which then learns nothing.
        present = torch.stack([targets[:, part].sum() / len(targets) for part in self._slices])
        log_variances = self._log_variances
        return (torch.exp(-log_variances) * losses + present * log_variances / 2).sum()

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
        """Negative log-likelihood in nats and top-1 accuracy, means over the tasks with labels."""
        found = []
        for part, codes in zip(self._slices, targets.T, strict=True):
            has_label = codes != NO_LABEL
            if has_label.any():
                logits, wanted = outputs[has_label, part].double(), codes[has_label]
                right = (logits.argmax(dim=1) == wanted).double().mean()
                found.append(torch.stack([functional.cross_entropy(logits, wanted), right]))
        loss, top1 = torch.stack(found).mean(dim=0).tolist()
        return loss, top1

    @property
    def task_weights(self) -> list[float]:
        """What each task's loss is multiplied with."""
        if self._log_variances is None:
            return [1 / len(self._n_classes)] * len(self._n_classes)
        weights: list[float] = torch.exp(-self._log_variances.detach()).tolist()
        return weights

    def _one_hot(self, codes: torch.Tensor, n_classes: int) -> torch.Tensor:
        """(n, n_classes) targets, smoothed; zeros for samples without a label."""
        targets = functional.one_hot(codes.clamp(min=0), n_classes).float()
        targets = targets * (1 - self._smoothing) + self._smoothing / n_classes
        return targets * (codes != NO_LABEL)[:, None]
