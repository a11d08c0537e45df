"""What is learned: a loss to go down, and scores that choose."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from pipeline.finetune.augment import make_mix
from pipeline.finetune.settings import Settings


class Objective(Protocol):
    """What a trainer needs to know of a task."""

    def mix(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix samples of a batch with each other, where that is wanted."""
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

    def mix(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixup or CutMix; targets become (n, n_classes) shares."""
        mixed: tuple[torch.Tensor, torch.Tensor] = self._mix(inputs, targets)
        return mixed

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of (n, n_classes) logits with (n,) classes or (n, n_classes) shares."""
        loss: torch.Tensor = self._loss(outputs.float(), targets)
        return loss

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
        """Negative log-likelihood in nats, and top-1 accuracy."""
        loss = nn.functional.cross_entropy(outputs.double(), targets)
        right = (outputs.argmax(dim=1) == targets).double().mean()
        return float(loss), float(right)
