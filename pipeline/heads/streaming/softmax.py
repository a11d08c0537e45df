"""Softmax layers that learn from mini-batches, whoever brings them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.adamw import adamw

from pipeline.heads.solvers.mlp import MlpSetting

Array = NDArray[Any]

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
_MOMENTUM = 0.9


class SoftmaxSteps:
    """Layers side by side, from zero weights; one product a mini-batch serves them all.

    Each moves as a member without hidden layers of :func:`pipeline.heads.solvers.mlp.fit_mlps`
    does, but for rounding.

    Args:
        settings: one a layer.
        n_features: columns.
        n_classes: outputs.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        device: a torch device.

    Attributes:
        settings: one a layer.
        weights: (n_layers, n_classes, n_features) float32.
        biases: (n_layers, n_classes) float32.
        n_steps: that were made.
    """

    def __init__(
        self,
        settings: Sequence[MlpSetting],
        n_features: int,
        n_classes: int,
        *,
        optimizer: str,
        device: str | torch.device,
    ) -> None:
        self.settings = list(settings)
        self.weights = torch.zeros(len(self.settings), n_classes, n_features, device=device)
        self.biases = torch.zeros(len(self.settings), n_classes, device=device)
        n_moments = 2 if optimizer == "adamw" else 1
        self._moments = [
            [torch.zeros_like(params) for _ in range(n_moments)]
            for params in (self.weights, self.biases)
        ]
        self.n_steps = 0

    @torch.no_grad()
    def step(self, x: Array, y: Array, weights: Array, lr_factor: float = 1.0) -> None:
        """Move against the gradient of Σ weight · cross-entropy / n.

        Args:
            x: (n, n_features).
            y: (n,), class indices.
            weights: (n,), of the samples.
            lr_factor: what each learning rate is multiplied by.
        """
        device = self.weights.device
        batch = torch.from_numpy(np.asarray(x, dtype=np.float32)).to(device)
        by_score = self._score_gradient(batch, torch.from_numpy(np.asarray(y, np.int64)).to(device))
        share = torch.from_numpy(np.asarray(weights / len(x), dtype=np.float32)).to(device)
        by_score *= share[:, None, None]
        self.n_steps += 1
        by_weight = (by_score.flatten(1).T @ batch).view_as(self.weights)
        self._move(self.weights, by_weight, self._moments[0], lr_factor, decays=True)
        self._move(self.biases, by_score.sum(dim=0), self._moments[1], lr_factor, decays=False)

    def _score_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, n_layers, n_classes), of each sample's cross-entropy by the scores."""
        smoothing = torch.tensor([one.label_smoothing for one in self.settings], device=x.device)
        scores = (x @ self.weights.flatten(0, 1).T).view(len(x), *self.biases.shape) + self.biases
        gradient = torch.softmax(scores, dim=2)
        gradient -= smoothing[:, None] / gradient.shape[2]
        truth = y[:, None, None].expand(-1, len(self.settings), 1)
        gradient.scatter_add_(2, truth, (smoothing - 1).expand(len(x), -1)[:, :, None])
        return gradient

    def _move(
        self,
        params: Tensor,
        gradients: Tensor,
        moments: Sequence[Tensor],
        lr_factor: float,
        *,
        decays: bool,
    ) -> None:
        for i, setting in enumerate(self.settings):
            lr, decay = setting.lr * lr_factor, setting.weight_decay if decays else 0.0
            if len(moments) == 2:
                n_before = torch.full((), self.n_steps - 1.0, device=params.device)
                adamw(
                    [params[i]], [gradients[i]], [moments[0][i]], [moments[1][i]], [], [n_before],
                    fused=True, amsgrad=False, maximize=False,
                    beta1=_BETA1, beta2=_BETA2, eps=_EPS, lr=lr, weight_decay=decay,
                )  # fmt: skip
                continue
            momentum = moments[0][i].mul_(_MOMENTUM).add_(gradients[i])
            if decay:
                momentum.add_(params[i], alpha=decay)
            params[i].add_(momentum, alpha=-lr)

    def failure(self, i: int) -> str:
        """Why the parameters of layer ``i`` are of no use, or ""."""
        total = self.weights[i].sum() + self.biases[i].sum()
        if bool(torch.isfinite(total)):
            return ""
        lr = self.settings[i].lr
        return f"its parameters are not finite: try a learning rate below {lr:g}"

    def arrays(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weights (n_classes, n_features) and biases (n_classes,) of layer ``i``, copied."""
        return self.weights[i].cpu().numpy().copy(), self.biases[i].cpu().numpy().copy()

    def set_arrays(self, i: int, weights: Array, biases: Array) -> None:
        """Go on from there with layer ``i``."""
        self.weights[i] = torch.from_numpy(weights)
        self.biases[i] = torch.from_numpy(biases)
