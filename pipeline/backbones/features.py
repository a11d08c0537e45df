"""FeatureNet: one forward pass of a backbone -> the layers that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.backbones import PENULTIMATE, POOLINGS
from pipeline.backbones.layers import Tap, first_tensor, follows_timm, twin
from pipeline.backbones.pooling import (
    GEM_POWER,
    Pool,
    check_class_token,
    layout_of,
    n_prefix_tokens,
)
from pipeline.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from pipeline.backbones.backbone import Backbone

__all__ = ["GEM_POWER", "FeatureNet"]


class PoolingTap(Tap):
    """A forward hook that pools at once: what flows on may be overwritten in place."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def on_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the pooled output."""
        tensor = first_tensor(output)
        self.value = None if tensor is None else self.pool(tensor)


class FeatureNet(nn.Module):
    """A frozen network that gives the activations of several layers in one pass.

    It has a structure of its own on the backbone's tensors, so it can be moved, cast or compiled
    without touching the backbone; it stays in eval mode whatever it is told.

    Attributes:
        layers: names, in the order of the outputs.
        pooling: of every layer but "penultimate".
        shapes: layer -> shape of one sample's output.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[str], pooling: str) -> None:
        super().__init__()
        self.layers = expand_layers(backbone, layers)
        self.pooling = pooling
        _check_pooling(backbone, self.layers, pooling)
        self.network = twin(backbone.module)
        self._taps: dict[str, Tap] = {}
        self._classifier = backbone.trace.classifier
        self._wants_logits = False
        self.shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            if layer == PENULTIMATE:
                self.shapes[layer] = (backbone.trace.n_features,)
            else:
                self._tap(backbone, layer)
        if self._classifier is not None:
            self._input_tap = Tap()
            self.network.get_submodule(self._classifier).register_forward_pre_hook(
                self._input_tap.on_input
            )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the network once.

        Args:
            images: (N, 3, H, W), float, preprocessed and normalised.

        Returns:
            One tensor a layer, float32: (N, D) where pooled; (N, C, H, W) or (N, T, D) for
            stages with pooling "none".
        """
        penultimate = self._run(images)
        return tuple(
            penultimate if layer == PENULTIMATE else self._taps[layer].take()
            for layer in self.layers
        )

    def train(self, mode: bool = True) -> FeatureNet:
        """Stay frozen: training mode would change the features and the BatchNorm statistics."""
        return super().train(False)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        """One pass; the hooks keep the stages. Returns the penultimate layer, (N, D), float32."""
        network: Any = self.network
        if self._classifier is None:
            features = network.forward_features(images)
            penultimate = network.forward_head(features, pre_logits=True)
            if self._wants_logits:
                network.forward_head(features)
        else:
            network(images)
            penultimate = self._input_tap.take()
        if penultimate.ndim == 4:
            # SqueezeNet's classifier is a convolution whose output is averaged: the same as a
            # linear classifier on the averaged input, but for its last activation.
            return penultimate.float().mean((2, 3))  # type: ignore[no-any-return]
        return penultimate.float()  # type: ignore[no-any-return]

    def _tap(self, backbone: Backbone, layer: str) -> None:
        """Hook one module and pool what it gives."""
        network = backbone.module
        shape = backbone.trace.shapes[layer]
        layout = layout_of(
            shape, channels_last=getattr(network, "output_fmt", None) in ("NHWC", "nhwc")
        )
        n_prefix = n_prefix_tokens(shape[0], _declared_prefix(network)) if len(shape) == 2 else 0
        if self.pooling == "cls":
            check_class_token(
                layer, layout, n_prefix, has_class_token=_class_token(network) is not None
            )
        tap = PoolingTap(Pool(self.pooling, layout, n_prefix))
        self.network.get_submodule(layer).register_forward_hook(tap.on_output)
        self._taps[layer] = tap
        self._wants_logits |= follows_timm(network) and layer not in backbone.trace.trunk
        pooled = tap.pool(torch.empty(1, *shape, device="meta"))
        self.shapes[layer] = tuple(pooled.shape[1:])


def expand_layers(backbone: Backbone, layers: Sequence[str]) -> tuple[str, ...]:
    """Check layer names, put every stage and "penultimate" for "all", and drop repetitions.

    Raises:
        UnknownNameError: no such module; close matches are offered.
        UsageError: there is one, but it does not give one row an image; or no layer was named.
    """
    expanded: list[str] = []
    for layer in [layers] if isinstance(layers, str) else layers:
        expanded += backbone.layers if layer == "all" else [layer]
    for layer in expanded:
        if layer != PENULTIMATE and layer not in backbone.trace.shapes:
            _refuse(backbone, layer)
    if not expanded:
        raise UsageError('No layer was named. Name one or more, or "all".')
    return tuple(dict.fromkeys(expanded))


def _refuse(backbone: Backbone, layer: str) -> None:
    remedy = f"List them with:  tlpipe backbones {backbone.name}"
    if layer in dict(backbone.module.named_modules()):
        raise UsageError(
            f'Layer "{layer}" of {backbone.name} cannot be stored: it is not run for every image, '
            f"or does not give one row an image.\n  {remedy}"
        )
    known = [*backbone.layers, "all", *backbone.trace.shapes]
    raise UnknownNameError(f"layer of {backbone.name}", layer, dict.fromkeys(known), remedy)


def _check_pooling(backbone: Backbone, layers: tuple[str, ...], pooling: str) -> None:
    if pooling not in POOLINGS:
        raise UnknownNameError("pooling", pooling, POOLINGS)
    if pooling != "avg" and layers == (PENULTIMATE,):
        stages = (
            backbone.stages if pooling != "cls" or _class_token(backbone.module) is not None else ()
        )
        remedy = f"Pooling applies to stages:  --layers {stages[-1]}" if stages else "Leave it out."
        raise UsageError(
            f'Pooling "{pooling}" has nothing to pool: "penultimate" is the vector that the '
            f"network's own classifier sees, already pooled.\n"
            f"  {remedy}"
        )


def _class_token(network: nn.Module) -> torch.Tensor | None:
    """The network's class token: timm calls it ``cls_token``, torchvision ``class_token``."""
    for name in ("cls_token", "class_token"):
        token = getattr(network, name, None)
        if isinstance(token, torch.Tensor):
            return token
    return None


def _declared_prefix(network: nn.Module) -> int:
    declared = getattr(network, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    return 0 if _class_token(network) is None else 1
