"""Views of one image: the plain one, and augmentations that its bytes alone decide."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import torch

from pipeline.backbones.preprocess import Preprocess

VIEWS_VERSION = 1  # of the augmentation: whatever changes a pixel needs a new one
MIN_CROP_AREA = 0.35
MAX_CROP_ASPECT = 4 / 3
MAX_JITTER = 0.2

_ONE = 1 << 16  # colours are computed in integers, which are the same on every machine
_LUMA = (19595, 38470, 7471)  # ITU-R BT.601: 0.299, 0.587 and 0.114 of _ONE, as Pillow rounds them


def views_recipe(n_views: int) -> int | dict[str, Any]:
    """What the recipe says of views: 1 for the plain one alone, else all that decides the others.

    Args:
        n_views: views of each sample, the plain one included.
    """
    if n_views == 1:
        return 1
    return {
        "n_views": n_views,
        "version": VIEWS_VERSION,
        "random": "sha256(prefix, version, sha256 of the file, view), as 8 uint32",
        "crop": {"area": [MIN_CROP_AREA, 1.0], "aspect": [1 / MAX_CROP_ASPECT, MAX_CROP_ASPECT]},
        "flip": 0.5,
        "jitter": {"brightness": MAX_JITTER, "contrast": MAX_JITTER, "saturation": MAX_JITTER},
    }


def make_views(
    pixels: torch.Tensor, preprocess: Preprocess, n_views: int, digest: bytes
) -> torch.Tensor:
    """The plain view of an image, and augmentations of it.

    View k > 0 is a crop of random area and aspect ratio, resized to what the network sees, perhaps
    mirrored, with other colours. It is the same in every run, in every thread and for every
    ``n_views`` > k: what is random about it is taken from ``digest`` and k. Only resizing may round
    differently on another kind of processor, as it may for the plain view.

    Args:
        pixels: (3, H, W), uint8; fastest in channels-last memory, as the decoders give it.
        preprocess: makes the plain view; its interpolation and size serve the others, too.
        n_views: how many views, at least 1.
        digest: sha256 of the image file's bytes.

    Returns:
        (n_views, 3, height, width), uint8, in channels-last memory; view 0 is
        ``preprocess(pixels)``.
    """
    squash = replace(preprocess, resize=None)
    views = [preprocess(pixels)]
    views += [_augmented(pixels, squash, _uniform(digest, k)) for k in range(1, n_views)]
    return torch.stack([view.permute(1, 2, 0) for view in views]).permute(0, 3, 1, 2)


def _uniform(digest: bytes, view: int) -> list[float]:
    """Eight numbers from 0 to just under 1.

    A hash rather than a generator: no library's version and no state of a thread changes it.
    """
    words = VIEWS_VERSION.to_bytes(4), digest, view.to_bytes(4)
    hashed = hashlib.sha256(b"".join([b"tlpipe view", *words])).digest()
    return [int.from_bytes(hashed[i : i + 4]) / 2**32 for i in range(0, 32, 4)]


def _augmented(pixels: torch.Tensor, squash: Preprocess, uniform: list[float]) -> torch.Tensor:
    """(3, height, width), uint8: one view of (3, H, W) pixels."""
    area, aspect, top, left, flip, *jitter = uniform
    height, width = _crop_size(pixels.shape[-2], pixels.shape[-1], area, aspect)
    top = int(top * (pixels.shape[-2] - height + 1))
    left = int(left * (pixels.shape[-1] - width + 1))
    view = squash(pixels[:, top : top + height, left : left + width])
    return _jittered(view.flip(-1) if flip < 0.5 else view, *jitter)


def _crop_size(height: int, width: int, area: float, aspect: float) -> tuple[int, int]:
    """Height and width of a crop; smaller than its area says where that would not fit.

    Args:
        height: of the image.
        width: of the image.
        area: 0…1, for the smallest to the largest share of the image.
        aspect: 0…1, for the most upright to the widest crop.
    """
    wanted = (MIN_CROP_AREA + (1 - MIN_CROP_AREA) * area) * height * width
    # As often upright as wide, and square in the middle.
    elongation = 1 + (MAX_CROP_ASPECT - 1) * abs(2 * aspect - 1)
    ratio = elongation if aspect >= 0.5 else 1 / elongation
    crop_width = min(math.sqrt(wanted * ratio), width, height * ratio)
    return max(1, round(crop_width / ratio)), max(1, round(crop_width))


def _jittered(
    pixels: torch.Tensor, brightness: float, contrast: float, saturation: float
) -> torch.Tensor:
    """Change brightness, then contrast, then saturation, as torchvision's ``adjust_…`` do.

    The three are one linear map of a pixel, its luma and the mean luma of the image, because the
    weights of luma add up to one; so nothing is clipped and rounded in between.

    Args:
        pixels: (3, height, width), uint8.
        brightness: 0…1, for 1 - `MAX_JITTER` to 1 + `MAX_JITTER` times as much.
        contrast: the same.
        saturation: the same.
    """
    brightness, contrast, saturation = (
        1 + MAX_JITTER * (2 * value - 1) for value in (brightness, contrast, saturation)
    )
    planes = pixels.contiguous().to(torch.int32)  # torch is slow where channels lie side by side
    red, green, blue = (plane * weight for plane, weight in zip(planes, _LUMA, strict=True))
    luma = red.add_(green).add_(blue).bitwise_right_shift_(16)
    mean = int(luma.sum()) / luma.numel()
    of_pixel = round(_ONE * brightness * contrast * saturation)
    of_luma = round(_ONE * brightness * contrast * (1 - saturation))
    constant = round(_ONE * (brightness * (1 - contrast) * mean + 0.5))
    mixed = planes.mul_(of_pixel).add_(luma.mul_(of_luma).add_(constant))
    return mixed.bitwise_right_shift_(16).clamp_(0, 255).to(torch.uint8)
