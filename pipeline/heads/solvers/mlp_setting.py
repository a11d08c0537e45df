"""What is asked of the networks of ``solvers.mlp``, and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.heads.tasks import TASK_WEIGHTS

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class MlpSetting:
    """One network: linear, ReLU, dropout, …, linear.

    Attributes:
        hidden: widths of the hidden layers; () for a softmax layer alone, which starts from zero.
        dropout: share of the hidden units that is silenced at each step.
        lr: the learning rate at its highest.
        weight_decay: on matrices only; decoupled for AdamW, added to the gradient for SGD.
        label_smoothing: share of each target that is spread evenly over the classes.
        seed: of the starting weights and of dropout.
    """

    hidden: tuple[int, ...] = (256,)
    dropout: float = 0.0
    lr: float = 1e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if not (0 <= self.dropout < 1 and 0 <= self.label_smoothing < 1):
            raise ValueError(
                f"dropout is {self.dropout:g} and label smoothing {self.label_smoothing:g}, "
                "expected 0 or more and below 1"
            )
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden layers of {self.hidden} units, expected 1 or more each")
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"lr is {self.lr:g} and weight_decay {self.weight_decay:g}, "
                "expected a number above 0, and one of 0 or more"
            )


@dataclass(frozen=True)
class Training:
    """What all members of a call share.

    Attributes:
        n_epochs: passes over the samples, at most.
        batch_size: samples a step.
        warmup: share of the steps in which the learning rate rises; then it falls to zero along a
            cosine.
        patience: epochs without a lower validation loss until a member stops; None for never.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        seed: of the order of the samples, and of their views.
        device: a torch device.
        precision: of the products into hidden layers: "bfloat16" (float32 parameters and sums),
            "float32", or "auto": bfloat16 where the hardware multiplies it. Products into the
            scores are float32.
        task_weights: of several tasks: "equal", or "uncertainty", which learns them.
    """

    n_epochs: int = 50
    batch_size: int = 256
    warmup: float = 0.0
    patience: int | None = None
    optimizer: str = "adamw"
    seed: int = 0
    device: str | torch.device = "cpu"
    precision: str = "auto"
    task_weights: str = "equal"

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.n_epochs < 1 or self.batch_size < 1 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"{self.n_epochs} epochs in batches of {self.batch_size} with a warm-up of "
                f"{self.warmup:g}, expected 1 or more, 1 or more, and 0 or more and below 1"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}, expected 1 or more epochs")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
            ("task_weights", TASK_WEIGHTS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )

    @property
    def dtype(self) -> torch.dtype:
        """Of the products into hidden layers."""
        if self.precision == "float32":
            return torch.float32
        if self.precision == "bfloat16" or _multiplies_bfloat16(torch.device(self.device)):
            return torch.bfloat16
        return torch.float32

    def lr_factor(self, step: int, n_steps: int) -> float:
        """What the learning rate is multiplied by: a linear warm-up, then a cosine to zero."""
        n_warmup = int(self.warmup * n_steps)
        if step < n_warmup:
            return (step + 1) / n_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without instructions for it, a processor takes longer over bfloat16 than over float32.
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True)
class FittedMlp:
    """A trained member.

    Attributes:
        setting: what was asked for.
        weights: one (n_outputs, n_inputs) float32 a layer.
        biases: one (n_outputs,) float32 a layer.
        n_epochs: that were run.
        best_epoch: whose parameters these are: that of the lowest validation loss, or the last.
        val_loss: at the best epoch, nats a sample; NaN without validation samples.
        failure: why its parameters are of no use, or "".
        log_variances: one a task, where their weights were learned.
    """

    setting: MlpSetting
    weights: tuple[NDArray[np.float32], ...]
    biases: tuple[NDArray[np.float32], ...]
    n_epochs: int
    best_epoch: int
    val_loss: float
    failure: str = ""
    log_variances: tuple[float, ...] = ()
