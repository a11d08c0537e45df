"""Classifier: a backbone without its own classifier, and a new head behind it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.weights import seeded
from pipeline.errors import UsageError

_HEAD_STD = 0.01


class L2Normalise(nn.Module):
    """Rows of length one: the scaling "l2" of heads on cached features."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        return nn.functional.normalize(features, dim=1)


class Classifier(nn.Module):
    """From normalised images to logits.

    Attributes:
        trunk: (N, 3, H, W) -> (N, n_features): what "penultimate" is in a feature store.
        head: (N, n_features) -> (N, n_outputs).
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float -> (N, n_outputs)."""
        outputs: torch.Tensor = self.head(self.trunk(images).flatten(1))
        return outputs


def make_trunk(backbone: Backbone) -> nn.Module:
    """A copy of the network whose output is the penultimate layer; nothing in it is frozen.

    Raises:
        UsageError: the network cannot be parted from its classifier.
    """
    trunk: Any = copy.deepcopy(backbone.module)
    classifier = backbone.trace.classifier
    if classifier is not None:
        trunk.set_submodule(classifier, nn.Identity())
    elif hasattr(trunk, "reset_classifier"):
        trunk.reset_classifier(0)  # timm's own way
    for parameter in trunk.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    size = (backbone.preprocess.height, backbone.preprocess.width)
    with torch.inference_mode():
        features = trunk.eval()(torch.zeros(1, 3, *size))
    n_found = features.flatten(1).shape[1] if isinstance(features, torch.Tensor) else 0
    if n_found != backbone.trace.n_features:
        raise UsageError(
            f"{backbone.name} cannot be fine-tuned: without its classifier it gives {n_found} "
            f"features, expected {backbone.trace.n_features}."
        )
    module: nn.Module = trunk
    return module


def make_head(
    n_features: int,
    n_outputs: int,
    *,
    hidden: Iterable[int] = (),
    dropout: float = 0.0,
    normalise: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """Linear layers with ReLU between them, dropout before each.

    Args:
        n_features: of the trunk.
        n_outputs: logits.
        hidden: widths of hidden layers; () for one linear layer.
        dropout: share of what is silenced.
        normalise: whether features are first given length one.
        seed: of the starting weights.
    """
    layers: list[nn.Module] = [L2Normalise()] if normalise else []
    widths = (n_features, *hidden, n_outputs)
    with seeded(seed):
        for i, (n_inputs, width) in enumerate(pairwise(widths)):
            layers += [nn.Dropout(dropout)] if dropout else []
            layers.append(nn.Linear(n_inputs, width))
            layers += [nn.ReLU()] if i < len(widths) - 2 else []
        last = layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=_HEAD_STD)
        nn.init.zeros_(last.bias)
    return nn.Sequential(*layers)


def fresh_like(head: nn.Module, seed: int) -> nn.Sequential:
    """A head of the same layers that knows nothing."""
    layers = linear_layers(head)
    return make_head(
        layers[0].in_features,
        layers[-1].out_features,
        hidden=[layer.out_features for layer in layers[:-1]],
        dropout=next((m.p for m in head.modules() if isinstance(m, nn.Dropout)), 0.0),
        normalise=any(isinstance(module, L2Normalise) for module in head.modules()),
        seed=seed,
    )


def linear_layers(head: nn.Module) -> list[nn.Linear]:
    """The layers of a head that have weights, in order."""
    return [module for module in head.modules() if isinstance(module, nn.Linear)]
