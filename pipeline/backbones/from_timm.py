"""timm's networks as backbones."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from pipeline.backbones.backbone import Backbone, make_backbone
from pipeline.backbones.catalogue import Spec, timm_tags
from pipeline.backbones.downloads import HUB_FILES, fetch_hub, fetch_url
from pipeline.backbones.preprocess import INTERPOLATIONS, Preprocess
from pipeline.backbones.weights import (
    RANDOM,
    StateDict,
    load_weights,
    read_state_dict,
    seeded,
    weights_choice,
)
from pipeline.errors import UsageError, WeightsError


def load_timm(spec: Spec, *, weights: str, image_size: int | None, seed: int) -> Backbone:
    """Load a timm network; see `load_backbone`."""
    name, tags = spec.name, timm_tags(spec.architecture)
    tag, file = weights_choice(name, weights, spec.tag, tags)
    full = f"{spec.architecture}.{tag}" if tag else spec.architecture
    preprocess = timm_preprocess(name, timm_config(full), image_size)
    if file is not None:
        with seeded(0):
            network = build_timm(full, image_size)
        _load_file(network, name, file)
        source = str(file)
    elif weights == RANDOM:
        with seeded(seed):
            network = build_timm(full, image_size)
        source = f"random:seed={seed}"
    else:
        file = _fetch_published(name, full, bool(tags))
        network = _build_published(name, full, file, image_size)
        source = tag
    try:
        return make_backbone(
            name, network, preprocess, source, file=file, resized=image_size is not None
        )
    except (NotImplementedError, TypeError) as error:
        raise UsageError(
            f"{name} cannot be a backbone: it has no pooled features ({error})"
        ) from error


def timm_config(full: str) -> dict[str, Any]:
    """Timm's description of one set of weights, {} where there is none.

    Args:
        full: name with tag.
    """
    config = get_pretrained_cfg(full)
    return {} if config is None else dict(config.to_dict())


def timm_preprocess(name: str, config: dict[str, Any], image_size: int | None = None) -> Preprocess:
    """Timm's evaluation transform as a `Preprocess`.

    Args:
        name: of the backbone, for messages.
        config: of its weights.
        image_size: side of the square input, or None for the one in `config`.

    Raises:
        UsageError: the transform is of a kind that `Preprocess` does not have.
    """
    data = resolve_data_config({}, pretrained_cfg=config)
    _, height, width = data["input_size"]
    mode, pct, filter_name = data["crop_mode"], data["crop_pct"], data["interpolation"]
    if mode not in ("center", "squash") or filter_name not in INTERPOLATIONS:
        raise UsageError(
            f'{name} was trained with crop mode "{mode}" and interpolation "{filter_name}"; only '
            f"center and squash, and {', '.join(INTERPOLATIONS)} are supported."
        )
    if height != width and mode == "center" and image_size is None:
        raise UsageError(
            f"{name} takes {height}×{width} images, and only square ones are supported.\n"
            f"  Name a square size:  --image-size {min(height, width)}"
        )
    if image_size is not None:
        height = width = image_size
    sides = math.floor(height / pct), math.floor(width / pct)
    return Preprocess(
        height=height,
        width=width,
        resize=sides if mode == "squash" else sides[0],
        interpolation=filter_name,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def build_timm(
    full: str, image_size: int | None = None, state: StateDict | None = None
) -> nn.Module:
    """The network, with random numbers in it or with timm's own weights.

    Args:
        full: name with tag.
        image_size: side of the square input, pixels.
        state: the published weights, which timm adapts (names, position embeddings).

    Raises:
        UsageError: the network takes one size only.
    """
    options: dict[str, Any] = {}
    if image_size is not None and timm_config(full).get("fixed_input_size"):
        options["img_size"] = image_size
    if state is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
    try:
        network: nn.Module = timm.create_model(full, **options)
    except (TypeError, AssertionError) as error:
        if "img_size" not in options:
            raise
        raise UsageError(
            f"timm:{full} cannot be built for {image_size}×{image_size} images: {error}\n"
            f"  Leave the image size out to use the one that its weights were trained with."
        ) from error
    config: Any = network.pretrained_cfg
    if state is not None:
        config.pop("state_dict", None)  # a second copy of the weights
    return network


def _fetch_published(name: str, full: str, has_weights: bool) -> Path:
    config = timm_config(full)
    if not has_weights:
        raise WeightsError(
            f"timm knows {name}, but no weights for it.\n"
            f"  Give a file:  --weights PATH,  or measure with  --weights random"
        )
    what = f"{name} ({config.get('tag', '')})"
    if config.get("hf_hub_id"):
        own_file = config.get("hf_hub_filename")
        return fetch_hub(config["hf_hub_id"], what, [own_file] if own_file else HUB_FILES)
    return fetch_url(config["url"], what)


def _build_published(name: str, full: str, file: Path, image_size: int | None) -> nn.Module:
    state = read_state_dict(file)
    try:
        with seeded(0):
            return build_timm(full, image_size, state)
    except (RuntimeError, LookupError) as error:
        raise WeightsError(
            f"{file} does not fit {name}: {str(error).splitlines()[0]}\n"
            f"  Delete it, so that it is downloaded again."
        ) from error


def _load_file(network: nn.Module, name: str, file: Path) -> None:
    """Load a user's file: in timm's names, or in those that timm knows how to convert."""
    state = read_state_dict(file)
    config: Any = network.pretrained_cfg
    named = config.get("classifier") or ()
    classifiers = [named] if isinstance(named, str) else list(named)
    try:
        load_weights(network, state, classifiers=classifiers, name=name, path=file)
    except WeightsError as mismatch:
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        if convert is None:
            raise
        try:
            converted = dict(convert(dict(state), network))
            load_weights(network, converted, classifiers=classifiers, name=name, path=file)
        except (WeightsError, LookupError, ValueError, TypeError, AttributeError, RuntimeError):
            raise mismatch from None
