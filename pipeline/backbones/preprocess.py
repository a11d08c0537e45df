"""From the pixels of any image to the square that a backbone was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TORCH_FILTERS = {
    # Pillow's nearest takes the pixel under the centre, which torch calls nearest-exact.
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
_PILLOW_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
INTERPOLATIONS = tuple(_TORCH_FILTERS)

# A resized side longer than this many crops is never made in full: see _resize_and_crop_at_once.
_MAX_RESIZED_CROPS = 8


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalisation of one backbone; part of the recipe.

    It gives what the torchvision presets and timm's evaluation transforms give from a PIL image,
    to a grey level or two (rounding between the two passes of a filter), but works on uint8
    tensors, which is several times faster.

    Attributes:
        height: of the crop that the backbone sees, pixels.
        width: of that crop, pixels.
        resize: what the image is resized to before the centre crop: the length of its shorter
            side (the aspect ratio is kept), or (height, width) in pixels, or None for the crop's
            own height and width (both squash the image). A crop larger than the resized image is
            padded with black, as torchvision does.
        interpolation: "nearest", "bilinear" or "bicubic", as Pillow means them.
        mean: of each channel, for pixels between 0 and 1.
        std: standard deviation of each channel, for pixels between 0 and 1.
        antialias: whether downscaling averages every pixel it passes over (Pillow always does).
    """

    height: int
    width: int
    resize: int | tuple[int, int] | None
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    antialias: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.resize, tuple) and len(self.resize) != 2:
            raise ValueError(f"resize must be (height, width), found {self.resize!r}.")
        sides = [self.height, self.width]
        if self.resize is not None:
            sides += self.resize if isinstance(self.resize, tuple) else [self.resize]
        for side in sides:
            if type(side) is not int or side < 1:
                raise ValueError(f"A side must be a positive number of pixels, found {side!r}.")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"Unknown interpolation {self.interpolation!r}; known: {known}.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not _are_three_numbers(values):
                raise ValueError(f"{name} must be three finite numbers, found {values!r}.")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, found {self.std!r}.")
        if not isinstance(self.antialias, bool):
            raise ValueError(f"antialias must be true or false, found {self.antialias!r}.")

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Resize and crop one image; normalising waits for the batch.

        Args:
            pixels: (3, H, W), uint8; fastest in channels-last memory, as the decoders give it.

        Returns:
            (3, height, width), uint8.
        """
        size = self._resized_size(pixels.shape[-2], pixels.shape[-1])
        if size[0] > _MAX_RESIZED_CROPS * self.height or size[1] > _MAX_RESIZED_CROPS * self.width:
            resized = self._resize_and_crop_at_once(pixels, size)
        else:
            resized = transforms.resize(
                pixels, list(size), _TORCH_FILTERS[self.interpolation], antialias=self.antialias
            )
        cropped: torch.Tensor = transforms.center_crop(resized, [self.height, self.width])
        return cropped

    def normalise(self, batch: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scale pixels to 0…1, subtract the mean, divide by the standard deviation.

        Args:
            batch: (N, 3, H, W), uint8, on any device and in any memory format.
            dtype: of the result; the arithmetic is float32 in any case.

        Returns:
            (N, 3, H, W) of `dtype`, on the batch's device and in its memory format.
        """
        std = torch.tensor(self.std, device=batch.device).view(3, 1, 1)
        mean = torch.tensor(self.mean, device=batch.device).view(3, 1, 1)
        return batch.to(torch.float32, copy=True).mul_(1 / (255 * std)).sub_(mean / std).to(dtype)

    def with_size(self, size: int) -> Preprocess:
        """The same steps for a square crop of another size; it shows the same share of the image.

        Args:
            size: height and width of the new crop, pixels.
        """
        resize = self.resize
        if isinstance(resize, int):
            resize = size * resize // min(self.height, self.width)
        elif resize is not None:
            resize = (size * resize[0] // self.height, size * resize[1] // self.width)
        return replace(self, height=size, width=size, resize=resize)

    @property
    def least_size(self) -> tuple[int, int]:
        """Height and width that an image must have so that resizing it never enlarges it.

        Where the shorter side decides, the aspect ratio is kept: both then are at least that long.
        """
        if self.resize is None:
            return self.height, self.width
        return self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary for the recipe."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Undo `to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value makes no sense.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            odd = ", ".join(sorted(set(values) ^ known))
            raise ValueError(f"Preprocessing must have exactly {sorted(known)}; check: {odd}.")
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**arguments)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a resized image, rounded as torchvision rounds them."""
        if self.resize is None:
            return self.height, self.width
        if isinstance(self.resize, tuple):
            return self.resize
        if width <= height:
            return int(self.resize * height / width), self.resize
        return self.resize, int(self.resize * width / height)

    def _resize_and_crop_at_once(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Make only the part of the resized image that the centre crop shows.

        An image of 1 × 20,000 pixels would be resized to 256 × 5,120,000. Pillow can resize from
        a box with fractional edges, and looks beyond them where the filter needs it, so the
        result is that of its ordinary resize.
        """
        top, crop_height = _centre(size[0], self.height)
        left, crop_width = _centre(size[1], self.width)
        y, x = pixels.shape[-2] / size[0], pixels.shape[-1] / size[1]
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
        resized = image.resize(
            (crop_width, crop_height),
            _PILLOW_FILTERS[self.interpolation],
            box=(left * x, top * y, (left + crop_width) * x, (top + crop_height) * y),
        )
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(pixels.device)


def _are_three_numbers(values: object) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == 3
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )


def _centre(resized: int, crop: int) -> tuple[int, int]:
    """Start and length of the centre crop along one side, as torchvision rounds them."""
    if crop >= resized:
        return 0, resized
    return round((resized - crop) / 2), crop
