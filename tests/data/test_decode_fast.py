"""Large JPEGs at a part of their size: close to the exact pixels, and as strict about the file."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipeline.backbones.preprocess import Preprocess
from pipeline.data.decode import DECODING, FAST_DECODING, FAST_MARGIN, decode_image
from pipeline.errors import ImageError
from tests.faults.test_image_faults import AWKWARD, BAD

from .encoded import PLAIN, TRANSPARENT, encode, patched, photo, with_end_marker
from .test_decode_refusals import BOMBS, REFUSED

TINY = (1, 1)  # least height and width: every JPEG of some pixels is decoded at an eighth
JPEGS = {name: one for name, one in PLAIN.items() if one[0] == "JPEG"}
LARGE = encode(photo(640, 480), "JPEG")


def at_part(data, part):
    """What Pillow's draft mode gives, upright."""
    image = Image.open(io.BytesIO(data))
    image.draft(None, (image.width // part, image.height // part))
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def outcome(data, least=None):
    """Shape of the pixels, or the reason against the file."""
    try:
        return tuple(decode_image(data, least=least).pixels.shape)
    except ImageError as error:
        return str(error)


# How far


@pytest.mark.parametrize(
    ("least", "size"),
    [
        ((30, 40), (60, 80)),
        ((30, 41), (120, 160)),
        ((31, 40), (120, 160)),
        ((61, 80), (240, 320)),
        ((120, 160), (240, 320)),
        ((121, 160), (480, 640)),
        ((10_000, 1), (480, 640)),
    ],
)
def test_neither_side_falls_below_its_margin(least, size):
    assert FAST_MARGIN == 2
    assert decode_image(LARGE, least=least).pixels.shape == (3, *size)


@pytest.mark.parametrize("size", [(640, 480), (643, 481), (200, 1900), (16, 16)])
@pytest.mark.parametrize(("file_format", "mode", "options"), JPEGS.values(), ids=JPEGS)
def test_a_large_jpeg_has_the_pixels_of_pillows_draft(file_format, mode, options, size):
    data = encode(photo(*size, mode=mode), file_format, **options)

    for part in (8, 4, 2):
        least = (size[1] // (part * FAST_MARGIN), size[0] // (part * FAST_MARGIN))
        if 0 in least:
            continue
        decoded = decode_image(data, least=least)
        assert decoded.notes == ()
        assert decoded.pixels.dtype == torch.uint8
        assert decoded.pixels.permute(1, 2, 0).is_contiguous()
        assert np.array_equal(decoded.pixels.permute(1, 2, 0), at_part(data, part))


@pytest.mark.parametrize("part", [2, 4, 8])
def test_it_shows_the_same_picture(part):
    preprocess = Preprocess(480 // part // 4, 480 // part // 4, 480 // part // 2)
    exact = preprocess(decode_image(LARGE).pixels)
    fast = decode_image(LARGE, least=preprocess.least_size).pixels

    assert fast.shape == (3, 480 // part, 640 // part)
    gap = (preprocess(fast).int() - exact.int()).abs()
    assert gap.max() <= 6
    assert gap.float().mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_least_is_meant_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(640, 480), "JPEG", exif=exif)
    height, width = decode_image(data).pixels.shape[1:]

    decoded = decode_image(data, least=(height // 8, width // 8))

    assert decoded.pixels.shape == (3, height // 4, width // 4)
    assert decoded.pixels.permute(1, 2, 0).is_contiguous()
    assert np.array_equal(decoded.pixels.permute(1, 2, 0), at_part(data, 4))
    assert decode_image(data, least=(height // 8 + 1, 1)).pixels.shape[1] == height // 2
    assert decode_image(data, least=(1, width // 8 + 1)).pixels.shape[2] == width // 2


def test_the_main_picture_of_a_camera_file_counts():
    data = encode(photo(640, 480), "MPO", save_all=True, append_images=[photo(64, 48)])

    assert outcome(data, (60, 80)) == (3, 120, 160)


# What stays exact


SMALL_OR_OTHER = {
    **{name: encode(photo(64, 48, one[1]), one[0], **one[2]) for name, one in PLAIN.items()
       if one[0] != "JPEG"},
    **{name: data for name, (data, _, _) in TRANSPARENT.items()},
    "CMYK JPEG": encode(photo(640, 480, "CMYK"), "JPEG"),
    "one pixel": encode(photo(1, 1), "JPEG"),
    "a row": encode(photo(20_000, 1), "JPEG"),
    "a column": encode(photo(1, 20_000), "JPEG"),
    "wholly grey": encode(Image.new("RGB", (640, 480), (128, 128, 128)), "JPEG"),
}  # fmt: skip


@pytest.mark.parametrize("data", SMALL_OR_OTHER.values(), ids=SMALL_OR_OTHER)
def test_other_images_keep_every_pixel_and_note(data):
    exact, fast = decode_image(data), decode_image(data, least=TINY)

    assert torch.equal(fast.pixels, exact.pixels)
    assert fast.notes == exact.notes


def test_images_near_the_needed_size_keep_every_pixel():
    data = encode(photo(500, 375), "JPEG")

    fast = decode_image(data, least=Preprocess(224, 224, 256).least_size)

    assert torch.equal(fast.pixels, decode_image(data).pixels)


# What is refused


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_whole_image_says_why(data, reason):
    with pytest.raises(ImageError, match=re.escape(reason)):
        decode_image(data, least=TINY)


FAULTS = {name: fault for name, fault in BAD.items() if fault.has_decoders}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_costs_a_sample_its_row_still_does(fault):
    with pytest.raises(ImageError, match=re.escape(fault.reason)):
        decode_image(fault.data, least=TINY)


@pytest.mark.parametrize("awkward", AWKWARD.values(), ids=AWKWARD)
def test_what_is_only_awkward_shows_the_same_and_is_noted(awkward):
    preprocess = Preprocess(6, 8, None)

    exact = decode_image(awkward.data)
    fast = decode_image(awkward.data, least=preprocess.least_size)

    assert fast.notes == exact.notes
    assert (preprocess(fast.pixels).int() - preprocess(exact.pixels).int()).abs().max() <= 6


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_the_cap_is_on_the_whole_image(data):
    assert str(outcome(data, TINY)).startswith("too large to decode: ")


@pytest.mark.parametrize("name", JPEGS)
def test_a_cut_file_is_refused_at_every_length(name):
    file_format, mode, options = JPEGS[name]
    data = encode(photo(61, 47, mode), file_format, **options)

    for n_bytes in range(0, len(data), max(1, len(data) // 60)):
        exact = outcome(data[:n_bytes])
        # Where nothing but what follows the pixels was lost, exact decoding accepts it, too.
        assert isinstance(outcome(data[:n_bytes], TINY), str) == isinstance(exact, str), n_bytes


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("least", [(1, 1), (5, 5), (10, 10)])
def test_a_cut_scan_that_was_closed_again_is_refused_as_exactly(name, least):
    file_format, mode, options = JPEGS[name]
    data = encode(photo(61, 47, mode), file_format, **options)

    for percent in range(2, 100, 2):
        cut = with_end_marker(data, percent / 100)
        exact, fast = outcome(cut), outcome(cut, least)
        assert isinstance(fast, str) == isinstance(exact, str), percent


def test_a_header_of_nonsense_is_no_crash():
    data = patched(LARGE, LARGE.index(b"\xff\xc0") + 9, "B", 77)

    assert "JPEG" in str(outcome(data, TINY))


# For others


def test_the_recipe_says_so():
    assert json.loads(json.dumps(FAST_DECODING)) == FAST_DECODING
    assert FAST_DECODING != DECODING
    assert {name: FAST_DECODING[name] for name in DECODING} == DECODING


@pytest.mark.parametrize(
    ("resize", "least"), [(256, (256, 256)), ((40, 60), (40, 60)), (None, (224, 200))]
)
def test_the_least_size_is_never_enlarged(resize, least):
    preprocess = Preprocess(224, 200, resize)

    assert preprocess.least_size == least
    for size in (least, (3 * least[0], least[1]), (least[0], 2 * least[1])):
        assert all(map(int.__le__, preprocess._resized_size(*size), size))
