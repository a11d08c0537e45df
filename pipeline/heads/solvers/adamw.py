"""Small networks on features: AdamW with a cosine schedule, on any device torch has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.heads.base import Array

Forward = Callable[[Sequence[Tensor], Tensor, torch.Generator | None], Tensor]
"""(parameters, x (n, n_features), generator of the noise or None when scoring) -> logits."""


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        lr: learning rate at the start; it falls to zero along a cosine.
        weight_decay: decoupled, on matrices only.
        epochs: passes over the samples.
        batch_size: samples a step.
        seed: of the order of the samples and of dropout.
    """

    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    seed: int


@dataclass
class EarlyStopping:
    """Keep the parameters of the epoch with the lowest loss on held-out samples.

    Attributes:
        x: (n_held_out, n_features).
        y: (n_held_out,), class indices.
        weights: (n_held_out,), float32.
        patience: epochs without a better one until training stops.
    """

    x: Tensor
    y: Tensor
    weights: Tensor
    patience: int


def as_tensor(X: Array) -> Tensor:
    """A float32 copy; the caller's array may be read-only."""
    return torch.tensor(np.asarray(X, dtype=np.float32))


def train(
    forward: Forward,
    params: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    weights: NDArray[np.float64],
    schedule: Schedule,
    stopping: EarlyStopping | None = None,
) -> int:
    """Minimise the weighted cross-entropy, changing ``params`` in place.

    Args:
        forward: the network.
        params: its parameters, leaves that require no gradient yet.
        x: (n_samples, n_features), float32.
        y: (n_samples,), int64 class indices.
        weights: (n_samples,).
        schedule: how to train.
        stopping: held-out samples that choose the epoch, if any.

    Returns:
        Epochs that were run.

    Raises:
        ArithmeticError: the loss is not finite: the learning rate is too large.
    """
    for param in params:
        param.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": schedule.weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=schedule.lr,
        fused=True,
    )
    generator = torch.Generator().manual_seed(schedule.seed)
    sample_weight = torch.tensor(weights / weights.mean(), dtype=torch.float32)
    n_batches = math.ceil(len(x) / schedule.batch_size)
    n_steps = max(1, schedule.epochs * n_batches)
    best, best_params, bad_epochs, epoch, step = math.inf, [], 0, 0, 0
    for epoch in range(1, schedule.epochs + 1):
        total = torch.zeros(())
        for rows in torch.split(torch.randperm(len(x), generator=generator), schedule.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * 0.5 * (1 + math.cos(math.pi * step / n_steps))
            losses = cross_entropy(forward(params, x[rows], generator), y[rows], reduction="none")
            loss = (losses * sample_weight[rows]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach()
            step += 1
        if not math.isfinite(float(total)):
            raise ArithmeticError(
                f"the loss is not finite in epoch {epoch}: try a learning rate below "
                f"{schedule.lr:g}"
            )
        if stopping is not None:
            held_out = _held_out_loss(forward, params, stopping)
            if held_out < best:
                best, bad_epochs = held_out, 0
                best_params = [param.detach().clone() for param in params]
            elif (bad_epochs := bad_epochs + 1) >= stopping.patience:
                break
    for param in params:
        param.requires_grad_(False)
    for param, kept in zip(params, best_params, strict=False):
        param.copy_(kept)
    return epoch


def _held_out_loss(forward: Forward, params: Sequence[Tensor], stopping: EarlyStopping) -> float:
    with torch.no_grad():
        logits = forward(params, stopping.x, None)
        losses = cross_entropy(logits, stopping.y, reduction="none")
        return float((losses * stopping.weights).sum())
