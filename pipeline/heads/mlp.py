"""A network with one hidden layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.heads.base import (
    Array,
    Head,
    fit_inputs,
    predict_inputs,
    sample_weights,
    softmax,
)
from pipeline.heads.solvers.adamw import EarlyStopping, Schedule, as_tensor, train

_MIN_SAMPLES_TO_STOP_EARLY = 50


class MLPHead(Head):
    """Linear, ReLU, dropout, linear; trained with AdamW and a cosine schedule.

    Args:
        hidden: width of the hidden layer.
        dropout: share of the hidden units that is silenced at each step.
        lr: learning rate at the start.
        weight_decay: decoupled decay of the weights.
        epochs: passes over the samples, at most.
        batch_size: samples a step.
        early_stopping: hold a tenth of the samples out and keep the best epoch on them; with
            fewer than 50 samples all of them are fitted.
        patience: epochs without a better one until training stops.
        class_weight: None, "balanced" or {class: weight}.
        seed: of the starting weights, the order of the samples and dropout.

    Attributes:
        hidden_weight_: (n_hidden, n_features) float32.
        hidden_bias_: (n_hidden,) float32.
        weight_: (n_classes, n_hidden) float32.
        bias_: (n_classes,) float32.
    """

    def __init__(
        self,
        hidden: int = 256,
        *,
        dropout: float = 0.2,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
        epochs: int = 50,
        batch_size: int = 256,
        early_stopping: bool = False,
        patience: int = 5,
        class_weight: Any = None,
        seed: int = 0,
    ) -> None:
        self.hidden = hidden
        self.dropout = dropout
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.patience = patience
        self.class_weight = class_weight
        self.seed = seed

    def fit(self, X: Array, y: Array) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,)."""
        self.check_params()
        X, index = fit_inputs(self, X, y)
        weights = sample_weights(X, self.classes_[index], self.class_weight)
        x, y_index = as_tensor(X), torch.tensor(index)
        stopping, kept = self._hold_out(x, y_index, weights)
        params = self._start(X.shape[1])
        self.n_iter_ = train(
            self._forward,
            params,
            x[kept],
            y_index[kept],
            weights[kept.numpy()],
            Schedule(self.lr, self.weight_decay, self.epochs, self.batch_size, self.seed),
            stopping,
        )
        self.hidden_weight_, self.hidden_bias_, self.weight_, self.bias_ = (
            param.numpy() for param in params
        )
        self.converged_ = True
        return self

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected 0 or more and below 1")

    def _hold_out(
        self, x: Tensor, y: Tensor, weights: NDArray[np.float64]
    ) -> tuple[EarlyStopping | None, Tensor]:
        """A seeded tenth for early stopping, and the rows that are left to fit."""
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))
        if not self.early_stopping or len(x) < _MIN_SAMPLES_TO_STOP_EARLY:
            return None, order.sort().values
        held_out, kept = order[: len(x) // 10], order[len(x) // 10 :]
        held_out_weights = torch.tensor(weights[held_out.numpy()], dtype=torch.float32)
        return EarlyStopping(x[held_out], y[held_out], held_out_weights, self.patience), kept

    def _start(self, n_features: int) -> list[Tensor]:
        """He's uniform weights for the hidden layer, small ones for the last."""
        generator = torch.Generator().manual_seed(self.seed)
        bound = (6 / n_features) ** 0.5
        hidden = torch.empty(self.hidden, n_features).uniform_(-bound, bound, generator=generator)
        n_classes = len(self.classes_)
        bound = (1 / self.hidden) ** 0.5
        last = torch.empty(n_classes, self.hidden).uniform_(-bound, bound, generator=generator)
        return [hidden, torch.zeros(self.hidden), last, torch.zeros(n_classes)]

    def _forward(
        self, params: Sequence[Tensor], x: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        hidden_weight, hidden_bias, weight, bias = params
        hidden = torch.relu(x @ hidden_weight.T + hidden_bias)
        if generator is not None and self.dropout > 0:
            # torch's own dropout draws from the global generator.
            keep = torch.rand(hidden.shape, generator=generator) >= self.dropout
            hidden = hidden * keep / (1 - self.dropout)
        return hidden @ weight.T + bias

    def logits(self, X: Array) -> Array:
        """Unnormalised log-probabilities (n_samples, n_classes)."""
        X = predict_inputs(self, X)
        hidden = np.maximum(X @ self.hidden_weight_.T + self.hidden_bias_, 0)
        result: Array = hidden @ self.weight_.T + self.bias_
        return result

    def predict_proba(self, X: Array) -> NDArray[Any]:
        """Probabilities (n_samples, n_classes)."""
        return softmax(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {
            "hidden_weight_": ("hidden", "features"),
            "hidden_bias_": ("hidden",),
            "weight_": ("classes", "hidden"),
            "bias_": ("classes",),
        }
