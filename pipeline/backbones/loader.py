"""A name -> a backbone, ready to run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.backbones.backbone import Backbone
from pipeline.backbones.catalogue import parse_spec
from pipeline.errors import UsageError


def load_backbone(
    spec: str, *, weights: str = "default", image_size: int | None = None, seed: int = 0
) -> Backbone:
    """Load a frozen network with its weights and preprocessing.

    Args:
        spec: "resnet50", "resnet50:IMAGENET1K_V1", "torchvision:…", "timm:NAME.TAG",
            "efficientnet_lite0" (weights inside a package), "pixels:32".
        weights: "default", "random", one of the network's tags, or a path to a .safetensors
            file or a PyTorch checkpoint (never run as code).
        image_size: side of the square input, pixels; None is what the weights were trained with.
        seed: of random weights; the global random state is left alone.

    Raises:
        UnknownNameError: no such backbone or weights; close matches are offered.
        UsageError: the size does not suit the network.
        WeightsError: the weights are not here, do not fit, or are damaged.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"The image size must be a positive number of pixels, found {image_size}.")
    backbone = _load(spec, weights, image_size, seed)
    file = Path(weights)
    found_at = str(file.resolve()) if file.is_file() else weights
    origin = {"spec": spec, "weights": found_at, "image_size": image_size, "seed": seed}
    return replace(backbone, origin=origin)


def _load(spec: str, weights: str, image_size: int | None, seed: int) -> Backbone:
    """Let the right library load it."""
    found = parse_spec(spec)
    if found.family == "pixels":
        from pipeline.backbones.pixels import load_pixels

        return load_pixels(found, weights=weights, image_size=image_size)
    if found.family == "bundled":
        from pipeline.backbones.bundled import load_bundled

        return load_bundled(found, weights=weights, image_size=image_size, seed=seed)
    if found.family == "timm":
        from pipeline.backbones.from_timm import load_timm

        return load_timm(found, weights=weights, image_size=image_size, seed=seed)
    from pipeline.backbones.from_torchvision import load_torchvision

    return load_torchvision(found, weights=weights, image_size=image_size, seed=seed)
