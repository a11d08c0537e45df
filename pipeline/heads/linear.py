"""A softmax layer trained by gradient steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.heads.base import (
    Array,
    Head,
    fit_inputs,
    linear_logits,
    predict_inputs,
    sample_weights,
    softmax,
)
from pipeline.heads.solvers.adamw import Schedule, as_tensor, train


class LinearHead(Head):
    """Softmax regression trained with AdamW and a cosine schedule, from zero weights.

    Args:
        lr: learning rate at the start.
        weight_decay: decoupled decay of the weights.
        epochs: passes over the samples.
        batch_size: samples a step.
        class_weight: None, "balanced" or {class: weight}.
        seed: of the order of the samples.

    Attributes:
        weight_: (n_classes, n_features) float32.
        bias_: (n_classes,) float32.
    """

    def __init__(
        self,
        lr: float = 1e-2,
        *,
        weight_decay: float = 1e-2,
        epochs: int = 100,
        batch_size: int = 256,
        class_weight: Any = None,
        seed: int = 0,
    ) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.class_weight = class_weight
        self.seed = seed

    def fit(self, X: Array, y: Array) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,)."""
        X, index = fit_inputs(self, X, y)
        weights = sample_weights(X, self.classes_[index], self.class_weight)
        params = [
            torch.zeros(len(self.classes_), X.shape[1]),
            torch.zeros(len(self.classes_)),
        ]
        schedule = Schedule(self.lr, self.weight_decay, self.epochs, self.batch_size, self.seed)
        self.n_iter_ = train(_forward, params, as_tensor(X), torch.tensor(index), weights, schedule)
        self.weight_, self.bias_ = (param.numpy() for param in params)
        self.converged_ = True
        return self

    def logits(self, X: Array) -> Array:
        """Unnormalised log-probabilities (n_samples, n_classes)."""
        return linear_logits(predict_inputs(self, X), self.weight_, self.bias_)

    def predict_proba(self, X: Array) -> NDArray[Any]:
        """Probabilities (n_samples, n_classes)."""
        return softmax(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {"weight_": ("classes", "features"), "bias_": ("classes",)}


def _forward(params: Sequence[Tensor], x: Tensor, _: torch.Generator | None) -> Tensor:
    weight, bias = params
    return x @ weight.T + bias
