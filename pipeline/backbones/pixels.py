"""The backbone without a network: resized raw pixels, the baseline for everything else."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.backbones.backbone import Backbone, make_backbone
from pipeline.backbones.catalogue import Spec
from pipeline.backbones.preprocess import Preprocess
from pipeline.errors import UsageError


class Pixels(nn.Module):
    """Gives its input back, row by row of each channel."""

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) as it is."""
        return images

    def forward_head(self, features: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        """(N, 3·H·W)."""
        return features.flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, 3·H·W)."""
        return self.forward_head(self.forward_features(images))


def pixels_preprocess(size: int) -> Preprocess:
    """Squash to size × size and scale to 0…1."""
    return Preprocess(size, size, resize=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def load_pixels(spec: Spec, *, weights: str, image_size: int | None) -> Backbone:
    """Load "pixels:SIZE".

    Raises:
        UsageError: weights were named.
    """
    if weights != "default":
        raise UsageError(f'"pixels" has no weights, so --weights {weights} means nothing for it.')
    size = image_size or int(spec.architecture)
    return make_backbone(f"pixels:{size}", Pixels(), pixels_preprocess(size), "none")
