"""Backbone: a frozen network with its weights and its preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from pipeline.backbones import PENULTIMATE
from pipeline.backbones.features import FeatureNet
from pipeline.backbones.layers import Trace, find_stages, trace
from pipeline.backbones.preprocess import Preprocess
from pipeline.backbones.weights import weights_digest
from pipeline.errors import UsageError

__all__ = ["Backbone", "FeatureNet", "freeze", "make_backbone"]

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen network, its weights and its preprocessing.

    Attributes:
        name: "torchvision:resnet50", "timm:vit_base_patch16_224", "efficientnet_lite0",
            "pixels:32"; which weights is not part of it.
        module: in eval mode, no parameter requires a gradient.
        preprocess: any image -> the network's input.
        weights: where the weights come from: a tag such as "IMAGENET1K_V2", the bundled
            package, "random:seed=0", a path, or "none".
        weights_digest: sha256 of the weights themselves; see `weights_digest`.
        stages: module paths of the stages, in the order in which they run.
        n_parameters: of the whole network with its classifier.
        trace: what one forward pass goes through.
        file: the weights file that was read; None where there is none.
        origin: the arguments of `load_backbone` that load this backbone again.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    weights: str
    weights_digest: str
    stages: tuple[str, ...]
    n_parameters: int
    trace: Trace
    file: Path | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """What "all" stands for: every stage and "penultimate"."""
        return (*self.stages, PENULTIMATE)

    def feature_net(
        self, layers: Sequence[str] = (PENULTIMATE,), pooling: str = "avg"
    ) -> FeatureNet:
        """A module that gives several layers in one forward pass.

        Args:
            layers: "penultimate", stages, any module path, or "all".
            pooling: of every layer but "penultimate": "avg", "max", "gem", "cls" or "none".

        Raises:
            UnknownNameError: a layer or the pooling does not exist; close matches are offered.
            UsageError: a layer cannot be stored, or cannot be pooled so.
        """
        return FeatureNet(self, layers, pooling)


def make_backbone(
    name: str,
    module: nn.Module,
    preprocess: Preprocess,
    weights: str,
    *,
    file: Path | None = None,
    resized: bool = False,
) -> Backbone:
    """Freeze a network with its weights in place and find its layers.

    Args:
        name: canonical.
        module: the network.
        preprocess: of its input.
        weights: where the numbers come from.
        file: the weights file that was read.
        resized: the input size is the user's, not the one of the weights.

    Raises:
        UsageError: the network cannot take the size that the user asked for.
    """
    freeze(module)
    try:
        traced = trace(module, preprocess.height, preprocess.width)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        if not resized:
            raise
        raise UsageError(
            f"{name} cannot take images of {preprocess.height}×{preprocess.width} pixels: {error}\n"
            f"  Leave the image size out to use the one that its weights were trained with."
        ) from error
    return Backbone(
        name=name,
        module=module,
        preprocess=preprocess,
        weights=weights,
        weights_digest=weights_digest(module.state_dict()),
        stages=find_stages(module, traced),
        n_parameters=sum(parameter.numel() for parameter in module.parameters()),
        trace=traced,
        file=file,
    )


def freeze(module: AnyModule) -> AnyModule:
    """Make a network only computable: eval mode (BatchNorm, dropout) and no gradients."""
    module.eval()
    module.requires_grad_(False)
    return module
