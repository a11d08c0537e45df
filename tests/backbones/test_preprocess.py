"""Preprocessing gives what the official PIL-based transforms give, whatever the shape."""

import json
import math

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as official
from torchvision.transforms._presets import ImageClassification

from pipeline.backbones.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

SIZES = [(640, 427), (427, 640), (500, 375), (333, 334), (224, 224), (97, 61), (1000, 130), (5, 9)]


@pytest.fixture(scope="module", params=["china.jpg", "flower.jpg"])
def photo(request):
    return Image.fromarray(load_sample_image(request.param))


def as_pixels(image):
    """(3, H, W) in channels-last memory, as `decode_image` gives it."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def grey_levels(normalised, mean, std):
    scale = torch.tensor(std).view(3, 1, 1)
    return (normalised * scale + torch.tensor(mean).view(3, 1, 1)) * 255


def is_turned(image, preprocess):
    """Whether Pillow resizes the columns before the rows, which rounds differently in between.

    It did so from version 13 on, where that is less work: in squashes of tall images, and strips.
    """
    is_squashed = not isinstance(preprocess.resize, int) and image.height > image.width
    return is_squashed or max(image.size) > 7 * min(image.size)


def assert_same_levels(preprocess, image, reference):
    """Compare with the normalised (3, height, width) tensor of an official transform.

    Pillow and torch round the weights of a filter differently: now and then a level or two.
    """
    mine = preprocess.normalise(preprocess(as_pixels(image))[None])[0]
    scale = preprocess.mean, preprocess.std

    assert mine.shape == reference.shape
    gap = (grey_levels(mine, *scale) - grey_levels(reference, *scale)).abs()

    most, mean = (4.01, 0.3) if is_turned(image, preprocess) else (2.01, 0.02)
    assert gap.max() < most
    assert gap.mean() < mean


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("resize", "crop", "interpolation"),
    [(256, 224, "bilinear"), (232, 224, "bilinear"), (288, 288, "bicubic"), (235, 224, "bicubic")],
)
def test_it_is_torchvisions_preset(photo, size, resize, crop, interpolation):
    image = photo.resize(size)
    preset = ImageClassification(
        crop_size=crop, resize_size=resize, interpolation=InterpolationMode(interpolation)
    )

    assert_same_levels(Preprocess(crop, crop, resize, interpolation), image, preset(image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("crop", "share", "mode", "interpolation"),
    [
        (224, 0.875, "center", "bicubic"),
        (224, 0.9, "center", "bicubic"),
        (160, 0.95, "center", "bilinear"),
        (256, 1.0, "center", "bicubic"),
        (224, 1.0, "squash", "bicubic"),
        (196, 0.94, "squash", "bicubic"),
    ],
)
def test_it_is_timms_evaluation_transform(photo, size, crop, share, mode, interpolation):
    image = photo.resize(size)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    config = timm.data.resolve_data_config(
        pretrained_cfg={
            "input_size": (3, crop, crop),
            "crop_pct": share,
            "crop_mode": mode,
            "interpolation": interpolation,
            "mean": mean,
            "std": std,
        }
    )
    reference = timm.data.create_transform(**config)(image)
    side = math.floor(crop / share)
    resize = side if mode == "center" else (side, side)

    assert_same_levels(Preprocess(crop, crop, resize, interpolation, mean, std), image, reference)


def test_none_squashes_to_the_crop(photo):
    image = photo.resize((90, 40))
    squashed = Preprocess(32, 48, None, "nearest")(as_pixels(image))

    assert torch.equal(squashed, as_pixels(image.resize((48, 32), Image.Resampling.NEAREST)))
    assert torch.equal(squashed, Preprocess(32, 48, (32, 48), "nearest")(as_pixels(image)))


def test_a_crop_larger_than_the_resized_image_is_padded_with_black(photo):
    image = photo.resize((40, 20))
    preprocess = Preprocess(64, 64, 21, "bilinear")
    reference = official.center_crop(official.resize(image, 21), [64, 64])

    padded = preprocess(as_pixels(image))

    assert (padded.int() - as_pixels(reference).int()).abs().max() <= 1
    assert (padded[:, :21] == 0).all()
    assert (padded[:, 21, 11:53] > 0).any()


def test_memory_format_does_not_matter(photo):
    pixels = as_pixels(photo.resize((301, 200)))
    preprocess = Preprocess(96, 96, 110, "bicubic")

    assert torch.equal(preprocess(pixels), preprocess(pixels.contiguous()))


def test_the_image_is_not_changed(photo):
    for size in [(301, 200), (4, 300), (32, 32)]:
        pixels = as_pixels(photo.resize(size))
        before = pixels.clone()
        preprocess = Preprocess(32, 32, 32)

        preprocess.normalise(preprocess(pixels)[None])

        assert torch.equal(pixels, before)


# Extreme shapes


@pytest.mark.parametrize("size", [(400, 3), (3, 400), (997, 11), (4001, 320), (7, 61)])
@pytest.mark.parametrize("resize", [16, 20, 37])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_strip_is_cropped_as_if_resized_in_full(photo, size, resize, interpolation):
    image = photo.resize(size)
    resized = official.resize(image, resize, InterpolationMode(interpolation))
    reference = as_pixels(official.center_crop(resized, [16, 16]))

    cropped = Preprocess(16, 16, resize, interpolation)(as_pixels(image))

    gap = (cropped.int() - reference.int()).abs()
    assert gap.max() <= 2
    assert gap.float().mean() < 0.3


@pytest.mark.parametrize("is_tall", [False, True])
def test_a_line_of_20_000_pixels(is_tall):
    line = torch.arange(20_000).div(20_000 / 256, rounding_mode="floor").to(torch.uint8)
    pixels = line.view(1, 1, -1).repeat(3, 1, 1)
    # Resized in full it would have 256 × 5,120,000 pixels.
    cropped = Preprocess(224, 224, 256)(pixels.transpose(1, 2) if is_tall else pixels)

    assert cropped.shape == (3, 224, 224)
    assert (cropped.int() - 128).abs().max() <= 1


def test_a_single_pixel():
    pixels = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1)

    assert torch.equal(Preprocess(24, 24, 32)(pixels), pixels.expand(3, 24, 24))


# Normalising


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalise_is_torchvisions(memory_format):
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (2, 3, 8, 9), dtype=torch.uint8, generator=generator)
    batch = batch.to(memory_format=memory_format)

    normalised = Preprocess(8, 9, None).normalise(batch)

    expected = official.normalize(batch / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(normalised, expected)
    assert normalised.is_contiguous(memory_format=memory_format)


def test_low_precision_is_rounded_only_once():
    batch = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    preprocess = Preprocess(16, 16, None)

    low = preprocess.normalise(batch, torch.bfloat16)

    assert torch.equal(low, preprocess.normalise(batch).to(torch.bfloat16))


def test_normalise_does_not_write_into_its_input():
    batch = torch.full((1, 3, 2, 2), 7.0)

    Preprocess(2, 2, None).normalise(batch)

    assert (batch == 7).all()


# The recipe


@pytest.mark.parametrize("resize", [256, (230, 240), None])
def test_it_survives_json(resize):
    preprocess = Preprocess(224, 200, resize, "bicubic", (0.5, 0.5, 0.5), (0.1, 0.2, 0.3), False)

    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize("resize", [256, 224, 248, (240, 240), None])
def test_another_size_shows_the_same_share_of_the_image(resize):
    preprocess = Preprocess(224, 224, resize, "bicubic")

    assert preprocess.with_size(224) == preprocess
    doubled = {None: None, (240, 240): (480, 480)}.get(resize, resize and resize * 2)
    assert preprocess.with_size(448) == Preprocess(448, 448, doubled, "bicubic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "A side must be a positive number of pixels, found 0."),
        ({"width": 224.0}, "A side must be a positive number of pixels, found 224.0."),
        ({"resize": True}, "A side must be a positive number of pixels, found True."),
        ({"resize": [256, None]}, "A side must be a positive number of pixels, found None."),
        ({"resize": [256]}, r"resize must be \(height, width\), found \(256,\)."),
        ({"interpolation": "cubic"}, "Unknown interpolation 'cubic'; known: nearest, bilinear, b"),
        ({"mean": [0.5, 0.5]}, r"mean must be three finite numbers, found \(0.5, 0.5\)."),
        ({"mean": [0.5, 0.5, math.nan]}, "mean must be three finite numbers"),
        ({"mean": 0.5}, "mean must be three finite numbers, found 0.5."),
        ({"std": [0.2, 0.2, 0]}, "std must be positive"),
        ({"std": ["1", "1", "1"]}, "std must be three finite numbers"),
        ({"antialias": "no"}, "antialias must be true or false, found 'no'."),
        ({"crop": 3}, "check: crop."),
    ],
)
def test_nonsense_is_refused(change, message):
    values = Preprocess(224, 224, 256).to_dict() | change

    with pytest.raises(ValueError, match=message):
        Preprocess.from_dict(values)


def test_a_missing_key_is_named():
    values = Preprocess(224, 224, 256).to_dict()
    del values["std"]

    with pytest.raises(ValueError, match="check: std"):
        Preprocess.from_dict(values)
