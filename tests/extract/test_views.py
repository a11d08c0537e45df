"""Views: the plain one is plain, the others are decided by the image's bytes and nothing else."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import functional as transforms

from pipeline.backbones.pixels import pixels_preprocess
from pipeline.backbones.preprocess import Preprocess
from pipeline.extract import views
from pipeline.extract.views import make_views, views_recipe

PREPROCESS = Preprocess(56, 48, 64)
PHOTO = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)


def digest_of(number):
    return hashlib.sha256(str(number).encode()).digest()


def as_floats(pixels):
    return pixels.to(torch.float64)


# What they depend on


@pytest.mark.parametrize(
    "preprocess",
    [
        PREPROCESS,
        Preprocess(48, 56, (60, 90), "bicubic"),
        Preprocess(40, 40, None, "nearest"),
        Preprocess(64, 64, 21),
        pixels_preprocess(32),
    ],
    ids=["shorter side", "both sides", "squash", "padded", "pixels:32"],
)
def test_view_0_is_plain_and_all_have_the_size_of_the_crop(preprocess):
    made = make_views(PHOTO, preprocess, 3, digest_of(0))

    assert made.shape == (3, 3, preprocess.height, preprocess.width)
    assert made.dtype == torch.uint8
    assert torch.equal(made[0], preprocess(PHOTO))
    assert all(view.permute(1, 2, 0).is_contiguous() for view in made)


def test_one_view_is_the_plain_one():
    assert torch.equal(make_views(PHOTO, PREPROCESS, 1, digest_of(0)), PREPROCESS(PHOTO)[None])


def test_a_view_does_not_depend_on_how_many_there_are():
    few, many = (make_views(PHOTO, PREPROCESS, n, digest_of(0)) for n in (3, 7))

    assert torch.equal(few, many[:3])


def test_every_view_of_every_image_is_another():
    made = torch.cat([make_views(PHOTO, PREPROCESS, 5, digest_of(k))[1:] for k in range(5)])

    distances = torch.cdist(as_floats(made.flatten(1)), as_floats(made.flatten(1)))
    assert (distances + torch.eye(20) > 0).all()


def test_no_global_state_matters_and_none_is_touched():
    before = torch.get_rng_state()
    first = make_views(PHOTO, PREPROCESS, 4, digest_of(0))

    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(make_views(PHOTO, PREPROCESS, 4, digest_of(0)), first)
    torch.set_rng_state(before)


def test_threads_agree_with_one_another():
    digests = [digest_of(k) for k in range(24)]
    alone = [make_views(PHOTO, PREPROCESS, 3, digest) for digest in digests]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: make_views(PHOTO, PREPROCESS, 3, one), digests))

    assert all(map(torch.equal, alone, together))


def test_randomness_is_that_of_version_1():
    """On every machine. Stores keep views of this version: other numbers need another one."""
    numbers = views._uniform(bytes(32), 1)

    assert views.VIEWS_VERSION == 1
    assert [round(number, 6) for number in numbers] == [
        0.736992,
        0.842323,
        0.392833,
        0.348514,
        0.893398,
        0.778626,
        0.739248,
        0.438002,
    ]
    assert views._crop_size(375, 500, *numbers[:2]) == (356, 437)


# What they show


def test_numbers_are_uniform_and_independent():
    numbers = np.array([views._uniform(digest_of(n), k) for n in range(500) for k in range(1, 5)])

    assert numbers.shape == (2000, 8)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.1


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    height=st.integers(1, 6000),
    width=st.integers(1, 6000),
    area=st.floats(0, 1, exclude_max=True),
    aspect=st.floats(0, 1, exclude_max=True),
)
def test_a_crop_is_within_the_image_and_its_bounds(height, width, area, aspect):
    crop_height, crop_width = views._crop_size(height, width, area, aspect)

    assert 1 <= crop_height <= height
    assert 1 <= crop_width <= width
    # Rounding moves each side by half a pixel.
    assert (crop_width - 0.5) / (crop_height + 0.5) <= views.MAX_CROP_ASPECT
    assert (crop_height - 0.5) / (crop_width + 0.5) <= views.MAX_CROP_ASPECT
    fits = crop_height < height and crop_width < width
    share = (crop_height + 0.5) * (crop_width + 0.5) / (height * width)
    assert share >= views.MIN_CROP_AREA or not fits


def test_crops_are_of_all_sizes_and_shapes():
    numbers = np.linspace(0, 0.999, 21)
    sizes = np.array([views._crop_size(900, 900, a, r) for a in numbers for r in numbers])

    shares = sizes.prod(axis=1) / 900**2
    aspects = sizes[:, 1] / sizes[:, 0]
    assert shares.min() == pytest.approx(0.35, abs=0.01)
    assert shares.max() == pytest.approx(1, abs=0.01)
    assert aspects.min() == pytest.approx(3 / 4, abs=0.01)
    assert aspects.max() == pytest.approx(4 / 3, abs=0.01)
    assert (aspects > 1).mean() == pytest.approx(0.5, abs=0.06)


def test_crops_reach_every_corner_and_half_are_mirrored():
    """Position is written into the colours: columns in red, rows in green."""
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    position = torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)
    squash = Preprocess(256, 256, None, "nearest")
    corners, mirrored = [], 0
    for n in range(200):
        uniform = views._uniform(digest_of(n), 1)
        view = views._augmented(position, squash, [*uniform[:5], 0.5, 0.5, 0.5])
        assert view[1, 0, 0] < view[1, -1, 0]
        mirrored += bool(view[0, 0, 0] > view[0, 0, -1])
        corners.append([view[i].amin().item() for i in (0, 1)] + [view[i].amax() for i in (0, 1)])

    assert 75 < mirrored < 125
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    assert low[:2].tolist() == [0, 0]
    assert high[2:].tolist() == [255, 255]
    assert high[:2].min() > 50


def test_interpolation_is_that_of_the_backbone():
    def second_view(**changes):
        return make_views(PHOTO, replace(PREPROCESS, **changes), 2, digest_of(0))[1]

    assert not torch.equal(second_view(interpolation="nearest"), second_view())
    assert not torch.equal(second_view(interpolation="bicubic"), second_view())
    assert not torch.equal(second_view(antialias=False), second_view())


@pytest.mark.parametrize("numbers", [(0, 0, 0), (0.99, 0.99, 0.99), (0.2, 0.9, 0.1), (0.9, 0, 0.8)])
def test_colours_change_as_torchvision_changes_them(numbers):
    """In the floating point of the reference, and of colours that leave room at both ends."""
    pixels = (PREPROCESS(PHOTO).to(torch.int32) // 3 + 70).to(torch.uint8)
    brightness, contrast, saturation = (0.8 + 0.4 * number for number in numbers)
    reference = pixels.to(torch.float32) / 255
    reference = transforms.adjust_brightness(reference, brightness)
    reference = transforms.adjust_contrast(reference, contrast)
    reference = transforms.adjust_saturation(reference, saturation)

    jittered = views._jittered(pixels, *numbers)

    assert (jittered - 255 * reference).abs().max() < 1.01


def test_colours_saturate_instead_of_wrapping_round():
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    pixels[:, :2] = 255

    jittered = views._jittered(pixels, 0.999, 0.999, 0.999)

    assert (jittered[:, :2] == 255).all()
    assert (jittered[:, 2:] == 0).all()


def test_no_jitter_changes_nothing():
    pixels = PREPROCESS(PHOTO)

    assert torch.equal(views._jittered(pixels, 0.5, 0.5, 0.5), pixels)


def test_grey_stays_grey():
    grey = PHOTO[:1].expand(3, -1, -1)

    made = make_views(grey, PREPROCESS, 6, digest_of(0))

    assert (made.amax(dim=1) - made.amin(dim=1)).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 20_000), (20_000, 1), (3, 700)])
@pytest.mark.parametrize("preprocess", [PREPROCESS, pixels_preprocess(32)], ids=["crop", "squash"])
def test_extreme_shapes(size, preprocess):
    pixels = torch.full((3, *size), 90, dtype=torch.uint8)

    made = make_views(pixels, preprocess, 4, digest_of(1))

    assert made.shape == (4, 3, preprocess.height, preprocess.width)
    assert torch.equal(made[0], preprocess(pixels))
    assert all(view.min() > 60 and view.max() < 120 for view in made)


# The recipe


def test_the_recipe_of_one_view_is_what_it_always_was():
    assert views_recipe(1) == 1


def test_the_recipe_names_every_constant(monkeypatch):
    assert views_recipe(2) != views_recipe(3)
    assert json.loads(json.dumps(views_recipe(3))) == views_recipe(3)
    for name in ("VIEWS_VERSION", "MIN_CROP_AREA", "MAX_CROP_ASPECT", "MAX_JITTER"):
        before = views_recipe(3)
        monkeypatch.setattr(views, name, getattr(views, name) * 2)
        assert views_recipe(3) != before, name
