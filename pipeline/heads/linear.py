"""A softmax layer trained by gradient steps."""

from __future__ import annotations

from typing import Any

from pipeline.heads.gradient import GradientHead


class LinearHead(GradientHead):
    """Softmax regression by gradient steps from zero weights (Oquab et al., DINOv2, 2023, B.3).

    Args:
        lr: the learning rate at its highest; it falls to zero along a cosine.
        weight_decay: of the weights; decoupled for AdamW, added to the gradient for SGD.
        epochs: passes over the samples.
        batch_size: samples a step.
        warmup: share of the steps in which the learning rate rises.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        label_smoothing: share of each target that is spread evenly over the classes.
        class_weight: None, "balanced" or {class: weight}.
        seed: of the order of the samples and of their views.
        device: "cpu", "cuda[:N]" or "auto".

    Attributes:
        weight_: (n_classes, n_features) float32.
        bias_: (n_classes,) float32.
        n_iter_: epochs that were run.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        weight_decay: float = 1e-2,
        epochs: int = 20,
        batch_size: int = 128,
        warmup: float = 0.0,
        optimizer: str = "adamw",
        label_smoothing: float = 0.0,
        class_weight: Any = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.warmup = warmup
        self.optimizer = optimizer
        self.label_smoothing = label_smoothing
        self.class_weight = class_weight
        self.seed = seed
        self.device = device
