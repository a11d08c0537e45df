"""Frozen networks: their names, their weights, their preprocessing and their layers.

    catalogue.py         which names there are, and which library knows each
    loader.py            a name -> a Backbone
    backbone.py          Backbone: a frozen network with its weights and preprocessing
    features.py          FeatureNet: one forward pass -> the layers that were asked for
    layers.py            which modules of a network make good layers, found by running it
    pooling.py           a map or a sequence of tokens -> one vector an image
    preprocess.py        any image -> the square that the network was trained on
    weights.py           reading, fitting and hashing weights
    downloads.py         fetching weights that are not here, and saying so where that fails
    from_torchvision.py · from_timm.py · bundled.py · pixels.py    one source of networks each

Importing this package imports none of them; each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.backbones.backbone import Backbone, freeze
    from pipeline.backbones.features import FeatureNet
    from pipeline.backbones.loader import load_backbone
    from pipeline.backbones.preprocess import Preprocess

__all__ = [
    "DEFAULT_BACKBONE",
    "PENULTIMATE",
    "POOLINGS",
    "Backbone",
    "FeatureNet",
    "Preprocess",
    "freeze",
    "load_backbone",
]

DEFAULT_BACKBONE = "efficientnet_lite0"
"""Its weights come inside a package, so it works without a network connection."""

PENULTIMATE = "penultimate"
"""The layer that every backbone has: the vector that the network's own classifier sees."""

POOLINGS = ("avg", "max", "gem", "cls", "none")
"""How a map or a sequence of tokens becomes one vector an image; see pooling.py."""

_HOME = {
    "Backbone": "pipeline.backbones.backbone",
    "FeatureNet": "pipeline.backbones.features",
    "Preprocess": "pipeline.backbones.preprocess",
    "freeze": "pipeline.backbones.backbone",
    "load_backbone": "pipeline.backbones.loader",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
