"""torchvision's augmentations, made to depend on nothing but a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from pipeline.backbones.preprocess import Preprocess
from pipeline.finetune.settings import Settings

_ASPECT = (3 / 4, 4 / 3)
_FILTERS = {
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
_DRAWS = {torch.rand, torch.randint, torch.randn, torch.randperm, torch.Tensor.uniform_}

Augment = Callable[[torch.Tensor, int], torch.Tensor]


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything that prints; the same on every machine."""
    text = "\n".join(str(part) for part in parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1


class Seeded(TorchFunctionMode):
    """Within it, random numbers of this thread come from a generator of its own.

    torchvision draws from torch's global generator, which threads share: what one image gets would
    depend on which thread was first.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Hand the generator to whatever draws."""
        kwargs = dict(kwargs or {})
        if func in _DRAWS:
            kwargs.setdefault("generator", self._generator)
        return func(*args, **kwargs)


@contextmanager
def seeded_step(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout and mixing within it depend on ``seed`` alone; the global state is left alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def make_augment(settings: Settings, preprocess: Preprocess) -> Augment:
    """A function from (3, H, W) uint8 pixels and a seed to (3, height, width) uint8."""
    if settings.augment == "none":
        return lambda pixels, _: preprocess(pixels)
    steps: list[Any] = [
        v2.RandomResizedCrop(
            (preprocess.height, preprocess.width),
            scale=(max(settings.min_crop, 1e-3), 1.0),
            ratio=_ASPECT,
            interpolation=_FILTERS[preprocess.interpolation],
            antialias=preprocess.antialias,
        )
    ]
    if settings.flip:
        steps.append(v2.RandomHorizontalFlip())
    if settings.augment == "trivial":
        steps.append(v2.TrivialAugmentWide())
    elif settings.augment == "rand":
        steps.append(v2.RandAugment())
    transform = v2.Compose(steps)

    def augment(pixels: torch.Tensor, seed: int) -> torch.Tensor:
        with Seeded(seed):
            view: torch.Tensor = transform(pixels)
        return view

    return augment


def make_mix(settings: Settings, n_classes: int) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """Mixup and CutMix of a batch: inputs and (n,) classes -> inputs and what to learn of them.

    Args:
        settings: their strengths.
        n_classes: columns of the mixed targets.
    """
    kinds: list[Any] = []
    if settings.mixup:
        kinds.append(v2.MixUp(alpha=float(settings.mixup), num_classes=n_classes))
    if settings.cutmix:
        kinds.append(v2.CutMix(alpha=float(settings.cutmix), num_classes=n_classes))
    if not kinds:
        return lambda inputs, targets: (inputs, targets)
    mix = v2.RandomChoice(kinds)
    return lambda inputs, targets: mix(inputs, targets)
