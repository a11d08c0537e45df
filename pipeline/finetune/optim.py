"""Optimiser, learning rates by depth and step, moving averages, and the pull to the start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pipeline.finetune.network import Classifier
from pipeline.finetune.policies import Policy
from pipeline.finetune.settings import Settings

State = dict[str, torch.Tensor]


def make_optimizer(
    network: Classifier, policy: Policy, settings: Settings
) -> torch.optim.Optimizer:
    """AdamW or SGD over all that is ever trained; `set_lr` gives the groups their rates."""
    groups = parameter_groups(network, policy, settings)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=1.0)
    momentum = settings.momentum
    return torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=momentum > 0)


def parameter_groups(
    network: Classifier, policy: Policy, settings: Settings
) -> list[dict[str, Any]]:
    """Parameters of one block and one weight decay together.

    Block b of n has ``scale`` = layer_decay ** (n - 1 - b), the head 1. Biases, norms and other
    single vectors have no weight decay, nor has what the network itself names, nor the trunk where
    L2-SP pulls it elsewhere.
    """
    n_blocks = len(policy.blocks)
    exempt: set[str] = getattr(network.trunk, "no_weight_decay", lambda: set())()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        path = name.removeprefix("trunk.")
        in_trunk = path != name
        if in_trunk and path not in policy.parameters:
            continue
        block = policy.blocks.of_parameter(path) if in_trunk else n_blocks - 1
        decays = parameter.ndim > 1 and path not in exempt and not (in_trunk and settings.l2_sp)
        group = groups.setdefault(
            (block if in_trunk else n_blocks, decays),
            {
                "params": [],
                "scale": settings.decay ** (n_blocks - 1 - block),
                "weight_decay": settings.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def lr_factor(progress: float, warmup: float) -> float:
    """Linear warm-up to 1, then a cosine to 0 (Loshchilov and Hutter, SGDR, 2017, equation 5).

    Args:
        progress: share of the training that is done, 0 to 1.
        warmup: share of the training in which the rate rises.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def snapshot(network: nn.Module, names: Iterable[str]) -> State:
    """Copies of some of the network's parameters and buffers."""
    state = network.state_dict()
    return {name: state[name].detach().clone() for name in names}


def restore(network: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put copies back."""
    state = network.state_dict()
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)


class MovingAverage:
    """Exponential moving average of what is trained; of counters and the like the last value.

    Args:
        network: to average.
        names: of its parameters and buffers.
        decay: at most; early steps count more, so that the start is soon forgotten.
    """

    def __init__(self, network: nn.Module, names: Iterable[str], decay: float) -> None:
        self.values = snapshot(network, names)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take the weights after step number ``step`` in."""
        decay = min(self._decay, (1 + step) / (10 + step))
        state = network.state_dict()
        for name, value in self.values.items():
            if value.is_floating_point():
                value.lerp_(state[name], 1 - decay)
            else:
                value.copy_(state[name])


class PullToStart:
    """L2-SP: half of ``strength`` times the squared distance from the starting weights.

    Li, Grandvalet and Davoine, 2018, equation 3; only the trunk has weights to start from.
    """

    def __init__(self, network: Classifier, policy: Policy, strength: float) -> None:
        self._strength = strength
        self._pairs = [
            (parameter, parameter.detach().clone())
            for name, parameter in network.trunk.named_parameters()
            if name in policy.parameters and strength
        ]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add its gradient to that of the loss."""
        for parameter, start in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._strength)
