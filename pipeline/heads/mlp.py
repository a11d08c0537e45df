"""A network of a few layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.heads.gradient import GradientHead
from pipeline.heads.solvers.mlp import MlpSetting, Training


class MLPHead(GradientHead):
    """Linear, ReLU, dropout, …, linear; trained by gradient steps.

    Args:
        hidden: width of the hidden layer, or the widths of several.
        dropout: share of the hidden units that is silenced at each step.
        lr: the learning rate at its highest; it falls to zero along a cosine.
        weight_decay: of the weights; decoupled for AdamW, added to the gradient for SGD.
        epochs: passes over the samples, at most.
        batch_size: samples a step.
        warmup: share of the steps in which the learning rate rises.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        label_smoothing: share of each target that is spread evenly over the classes.
        early_stopping: hold a tenth of the samples out and keep the best epoch on them; with
            fewer than 50 samples all of them are fitted.
        patience: epochs without a better one until training stops.
        class_weight: None, "balanced" or {class: weight}.
        seed: of the starting weights, the order of the samples and of their views, and dropout.
        device: "cpu", "cuda[:N]" or "auto".
        precision: of the products into hidden layers: "float32", "bfloat16", or "auto" for
            bfloat16 where the hardware multiplies it.

    Attributes:
        hidden_weight_: (n_hidden, n_features) float32; of further layers, ``hidden2_weight_``, ….
        hidden_bias_: (n_hidden,) float32, likewise.
        weight_: (n_classes, n_hidden) float32.
        bias_: (n_classes,) float32.
        n_iter_: epochs that were run.
    """

    def __init__(
        self,
        hidden: int | Sequence[int] = 256,
        *,
        dropout: float = 0.2,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        epochs: int = 15,
        batch_size: int = 128,
        warmup: float = 0.0,
        optimizer: str = "adamw",
        label_smoothing: float = 0.0,
        early_stopping: bool = False,
        patience: int = 5,
        class_weight: Any = None,
        seed: int = 0,
        device: str = "cpu",
        precision: str = "auto",
    ) -> None:
        self.hidden = hidden
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.warmup = warmup
        self.optimizer = optimizer
        self.label_smoothing = label_smoothing
        self.early_stopping = early_stopping
        self.patience = patience
        self.class_weight = class_weight
        self.seed = seed
        self.device = device
        self.precision = precision

    def widths(self) -> tuple[int, ...]:
        """Units of the hidden layers."""
        return tuple(self.hidden) if isinstance(self.hidden, Sequence) else (self.hidden,)

    def member(self) -> MlpSetting:
        """What is trained."""
        return replace(super().member(), dropout=self.dropout)

    def training(self, device: str | torch.device) -> Training:
        """How it is trained; heads that agree in it are trained together."""
        return replace(
            super().training(device),
            patience=self.patience if self.early_stopping else None,
            precision=self.precision,
        )
