"""What an engine is given, and what it gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.backbones.features import FeatureNet
from pipeline.backbones.preprocess import Preprocess
from pipeline.errors import ResourceError, UsageError
from pipeline.extract.half import at_precision, input_dtype


class EngineError(UsageError):
    """An engine is not installed, cannot compute this network, or computes it wrongly."""


@dataclass(frozen=True, eq=False)
class Work:
    """What an engine is to compute.

    Attributes:
        net: frozen, float32, on the CPU, BatchNorm folded.
        preprocess: its normalisation is the engine's business.
        device: where it runs.
        precision: "fp32", "bf16" or "fp16": what the features are to be as exact as.
        until: the module before which half precision does not begin; "" for none.
        batch_size: images in every batch.
        key: digest of what decides the features; see :mod:`~pipeline.extract.engines.memo`.
    """

    net: FeatureNet
    preprocess: Preprocess
    device: torch.device
    precision: str
    until: str
    batch_size: int
    key: str = ""

    @property
    def batch_shape(self) -> tuple[int, int, int, int]:
        """(batch_size, height, width, 3)."""
        return (self.batch_size, self.preprocess.height, self.preprocess.width, 3)

    def example(self) -> torch.Tensor:
        """(1, 3, height, width) float32 on the device: black, normalised."""
        image = torch.zeros(self.batch_shape[1:], dtype=torch.uint8, device=self.device)
        return self.preprocess.normalise(image.permute(2, 0, 1)[None])


class Engine(Protocol):
    """Computes the layers of one network for batches of one shape.

    Attributes:
        name: as in ``--engine``.
        details: what provenance keeps of it, such as its version.
    """

    name: str
    details: dict[str, Any]

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run one batch.

        Args:
            images: (batch_size, height, width, 3) uint8, contiguous, on the engine's device.

        Returns:
            (batch_size, ...) float32 for each layer of the network, on that device. The next call
            may overwrite them.
        """
        ...


class Normalised(nn.Module):
    """A network with its normalisation: uint8 pixels in.

    The same arithmetic as :meth:`~pipeline.backbones.preprocess.Preprocess.normalise`, in a form
    that can be exported.

    Args:
        net: the network.
        preprocess: of its input.
        dtype: of its input.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, net: FeatureNet, preprocess: Preprocess, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = net
        self.dtype = dtype
        std = torch.tensor(preprocess.std).view(3, 1, 1)
        mean = torch.tensor(preprocess.mean).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", mean / std)
        self.eval()
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run (N, height, width, 3) uint8 images, which is channels-last for a network."""
        # In place, which is a tenth of a small network's time less.
        pixels = images.permute(0, 3, 1, 2).float().mul_(self.scale).sub_(self.shift)
        return self.net(pixels.to(self.dtype))  # type: ignore[no-any-return]


@contextmanager
def enough_memory(device: torch.device, batch_size: int) -> Iterator[None]:
    """Say plainly what torch says of memory that is not there.

    Raises:
        ResourceError: the device has too little memory for a batch.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one of them
        is_told = "can't allocate memory" in str(error)
        if not is_told and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise ResourceError(
            f"{device} has too little memory for batches of {batch_size}.\n"
            f"  Use --batch-size {max(1, batch_size // 2)}, a smaller --image-size or a smaller "
            "backbone."
        ) from error


def prepared(work: Work) -> Normalised:
    """The network of some work, at its precision and on its device."""
    net = at_precision(work.net, work.precision, work.until, work.example())
    dtype = input_dtype(work.precision, work.until)
    return Normalised(net, work.preprocess, dtype).to(work.device)


def not_installed(name: str, extra: str) -> EngineError:
    """What to say of an engine whose package is missing.

    Args:
        name: of the engine.
        extra: of tlpipe, which installs it.
    """
    return EngineError(
        f"The engine {name} is not installed.\n"
        f"  Install it:  pip install 'tlpipe[{extra}]'\n  Or use --engine auto."
    )


def check_on_cpu(name: str, work: Work) -> None:
    """Refuse anything but a CPU.

    Raises:
        EngineError: with the engines that do run there.
    """
    if work.device.type != "cpu":
        raise EngineError(
            f"The engine {name} computes on CPUs only, not on {work.device}.\n"
            "  Use --engine auto, eager or inductor."
        )


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
