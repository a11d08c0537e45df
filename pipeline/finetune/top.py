"""The top of a network, which goes on from stored activations; nothing below them is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.backbones import PENULTIMATE
from pipeline.backbones.backbone import Backbone
from pipeline.backbones.layers import twin
from pipeline.backbones.pooling import layout_of
from pipeline.errors import UsageError
from pipeline.finetune.network import Classifier

# Of the trunk's output, relative; the cosine of two vectors so far apart is 0.999.
_MAX_ERROR = 0.045


@dataclass(frozen=True)
class SplitPoint:
    """Where a network is parted: what is below never changes, what is above is trained.

    Attributes:
        layer: whose activation is stored; "penultimate" where the head alone is trained.
        shape: of one sample's activation as a store has it: (D,), (T, D) or (C, H, W).
        below: stages that run before it: module path -> shape of one sample's activation.
        is_nhwc: whether the network itself has the channels of a map last.
        image_shape: (3, height, width) of the network's input.
    """

    layer: str
    shape: tuple[int, ...]
    below: Mapping[str, tuple[int, ...]]
    is_nhwc: bool
    image_shape: tuple[int, int, int]

    @property
    def pooling(self) -> str:
        """Of the store's layer."""
        return "avg" if self.layer == PENULTIMATE else "none"


def find_split(backbone: Backbone, policy: str) -> SplitPoint:
    """The output of the last block that a policy leaves frozen.

    Args:
        backbone: that will be trained.
        policy: "head" or "last:N".

    Raises:
        UsageError: the policy trains all of it, or the network has too few blocks.
    """
    preprocess = backbone.preprocess
    image_shape = (3, preprocess.height, preprocess.width)
    if policy == "head":
        return SplitPoint(PENULTIMATE, (backbone.trace.n_features,), {}, False, image_shape)
    if not policy.startswith("last:"):
        raise UsageError(
            f"Policy {policy!r} trains the whole depth of a network, so no activation in it can be "
            "stored.\n  Use --cached with --policy last:N or head."
        )
    n_last, stages = int(policy.removeprefix("last:")), backbone.stages
    if n_last >= len(stages):
        most = f"last:{len(stages) - 1} or less" if len(stages) > 1 else "head"
        raise UsageError(
            f"--cached stores the output of the last frozen block, and policy {policy} leaves none "
            f"frozen: this network has {len(stages)} blocks that can be told apart.\n"
            f"  Use --policy {most}, or leave --cached out."
        )
    layer = stages[-n_last - 1]
    shapes = backbone.trace.shapes
    channels_last = getattr(backbone.module, "output_fmt", None) in ("NHWC", "nhwc")
    return SplitPoint(
        layer,
        backbone.feature_net((layer,), "none").shapes[layer],
        {stage: shapes[stage] for stage in stages[: -n_last - 1] if stage in shapes},
        layout_of(shapes[layer], channels_last=channels_last) == "nhwc",
        image_shape,
    )


class TopClassifier(Classifier):
    """A classifier that goes on from the activations at a split point.

    It has a structure of its own on the tensors of a whole one: what it learns, the whole has
    learned. Its trunk runs as it is written, on blank images: stages below the split point say
    which shape they would give, what else is down there computes shapes only, and at the split
    point the stored activations take the place of what was computed.

    Args:
        whole: the network; shares all its numbers.
        split: where the activations are from.
        shapes_only: whether what runs before and between the stages below computes shapes, which
            costs next to nothing; else it computes on blank images, which a network needs that
            makes something there for later blocks, such as rotary position embeddings.
    """

    def __init__(self, whole: Classifier, split: SplitPoint, *, shapes_only: bool = True) -> None:
        is_head_alone = split.layer == PENULTIMATE
        trunk: Any = nn.Identity() if is_head_alone else twin(whole.trunk)
        super().__init__(trunk, whole.head)
        self._split = split
        self._shapes_only = shapes_only
        self._stored = _Stored()
        if not is_head_alone:
            trunk.set_submodule(split.layer, self._stored)
            for path, shape in split.below.items():
                trunk.set_submodule(path, _Blank(shape))

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        """(N, *split.shape) float -> (N, n_outputs)."""
        outputs: torch.Tensor = self.head(self.features(stored))
        return outputs

    def features(self, stored: torch.Tensor) -> torch.Tensor:
        """(N, *split.shape) float -> (N, n_features): what the trunk gives."""
        if self._split.layer == PENULTIMATE:
            return stored.flatten(1)
        mode = _ShapesOnly() if self._shapes_only else None
        if self._split.is_nhwc:
            stored = stored.permute(0, 2, 3, 1)
        self._stored.value = stored
        self._stored.on_reached = (lambda: None) if mode is None else mode.end
        device = stored.device if mode is None else "meta"
        images = torch.zeros((), device=device).expand(len(stored), *self._split.image_shape)
        with mode or nullcontext():
            features: torch.Tensor = self.trunk(images)
        return features.flatten(1)


def make_top(
    whole: Classifier, split: SplitPoint, images: torch.Tensor, stored: torch.Tensor
) -> TopClassifier:
    """A network's top, once it was seen to give what the whole network gives.

    Args:
        whole: the network, in eval mode.
        split: where the activations are from.
        images: (n, 3, height, width) float, normalised, where the network is; a few.
        stored: (n, *split.shape) float, their activations.

    Raises:
        UsageError: it does not: the network uses more than what the split point gives.
    """
    found = ""
    with torch.inference_mode():
        wanted = whole.trunk(images).flatten(1)
        for shapes_only in (True, False):
            top = TopClassifier(whole, split, shapes_only=shapes_only)
            try:
                got = top.features(stored)
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
                found = found or (str(error).splitlines() or [type(error).__name__])[0]
                continue
            error_share = _largest_error(got, wanted)
            if error_share <= _MAX_ERROR:
                return top
            found = found or f"the features that come out differ by {error_share:.0%}"
    raise UsageError(
        f"This network cannot go on from the stored activations of {split.layer} alone: "
        f"{found:.160}.\n"
        "  Leave --cached out, or part it elsewhere with another N in --policy last:N."
    )


def _largest_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of any row, relative to its length."""
    if got.shape != wanted.shape:
        return 1.0
    errors = (got.float() - wanted.float()).norm(dim=1)
    return float((errors / wanted.float().norm(dim=1).clamp(min=1e-30)).max())


class _Stored(nn.Module):
    """Stands for the stage at the split point."""

    value: torch.Tensor | None = None
    on_reached: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """The stored activations, whatever comes in."""
        value, self.value = self.value, None
        if value is None:
            raise RuntimeError("the split point is passed more than once")
        self.on_reached()
        return value


class _Blank(nn.Module):
    """Stands for a stage below the split point: gives zeros of its shape, which take no memory."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, inputs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(N, ...) -> (N, *shape)."""
        return inputs.new_zeros(()).expand(len(inputs), *self._shape)


class _ShapesOnly(TorchFunctionMode):
    """Within it, until :meth:`end`, every operation computes the shape of its result and no more.

    torch computes so with tensors on its meta device, and here all tensors are seen as such.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_on = True

    def end(self) -> None:
        """From here on everything is computed."""
        self._is_on = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if self._is_on:
            args = tuple(_shape_of(value) for value in args)
            kwargs = {name: _shape_of(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _shape_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else torch.empty_like(value, device="meta")
    if type(value) in (list, tuple):
        return type(value)(_shape_of(one) for one in value)
    return value
