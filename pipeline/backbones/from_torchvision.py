"""torchvision's image classifiers as backbones."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torchvision.models import get_model, get_model_weights

from pipeline.backbones.backbone import Backbone, make_backbone
from pipeline.backbones.catalogue import Spec, torchvision_tags
from pipeline.backbones.downloads import fetch_url
from pipeline.backbones.layers import find_classifier
from pipeline.backbones.preprocess import Preprocess
from pipeline.backbones.weights import (
    StateDict,
    load_weights,
    read_state_dict,
    seeded,
    weights_choice,
)

# Their weights expect other statistics than ImageNet's, which the networks put right themselves.
_INCEPTION = {"transform_input": True, "aux_logits": False, "init_weights": False}
_OPTIONS: dict[str, dict[str, Any]] = {"googlenet": _INCEPTION, "inception_v3": _INCEPTION}

# Heads that help training and are left out afterwards, as torchvision does.
_AUXILIARY = re.compile(r"^(aux1|aux2|AuxLogits)\.")

# Names in DenseNet files, which torchvision itself rewrites on loading: "norm.1" -> "norm1".
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def load_torchvision(spec: Spec, *, weights: str, image_size: int | None, seed: int) -> Backbone:
    """Load a torchvision classifier; see `load_backbone`."""
    tag, file = weights_choice(spec.name, weights, spec.tag, torchvision_tags(spec.architecture))
    entry = get_model_weights(spec.architecture)[tag]
    preprocess = torchvision_preprocess(entry)
    with seeded(seed):
        network = build_torchvision(spec.architecture, preprocess)
    if image_size is not None:
        preprocess = preprocess.with_size(image_size)
    if file is None and weights != "random":
        file = fetch_url(entry.url, f"{spec.name} ({tag})")
        source = tag
    else:
        source = f"random:seed={seed}" if file is None else str(file)
    if file is not None:
        state = _modern_names(read_state_dict(file))
        classifiers = [find_classifier(network)]
        load_weights(network, state, classifiers=classifiers, name=spec.name, path=file)
    return make_backbone(
        spec.name, network, preprocess, source, file=file, resized=image_size is not None
    )


def build_torchvision(architecture: str, preprocess: Preprocess) -> nn.Module:
    """The network for one set of weights, with random numbers in it."""
    options = _OPTIONS.get(architecture, {})
    if architecture.startswith("vit_"):
        # Some weights come with a larger input, and position embeddings for it.
        options = {"image_size": preprocess.height}
    network: nn.Module = get_model(architecture, weights=None, **options)
    return network


def torchvision_preprocess(entry: Any) -> Preprocess:
    """The preset of a torchvision weights entry.

    Args:
        entry: a member of a ``WeightsEnum``.
    """
    preset = entry.transforms()
    (crop,) = preset.crop_size
    (resize,) = preset.resize_size
    return Preprocess(
        height=crop,
        width=crop,
        resize=resize,
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        antialias=bool(preset.antialias),
    )


def _modern_names(state: StateDict) -> StateDict:
    return {
        _OLD_DENSENET.sub(r"\1\2", key): values
        for key, values in state.items()
        if not _AUXILIARY.match(key)
    }
