"""FAULTS, images: a bad one costs its own row and nothing else, an awkward one gets the right row.

Each is put beside good photographs and goes through `tlpipe extract`. Names begin with the number
of the fault.
"""

import os
import resource
import struct
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data import codecs, decode
from tests.data.encoded import HEIC, cut, encode, encode_png, patched, with_end_marker

from .conftest import SMALL, assert_same_features, extract, tlpipe


def photo(width=96, height=72):
    """A smooth picture without symmetry, bright and dark in every channel."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    colours = np.stack([255 * x, 255 * y, 255 * (1 - x) * (1 - y)], axis=-1)
    return Image.fromarray(colours.astype(np.uint8))


def grey(values):
    """(H, W) values of 0…255 as an RGB picture."""
    return Image.fromarray(np.asarray(values).astype(np.uint8)).convert("RGB")


# Bad images


@dataclass(frozen=True)
class Bad:
    """A file that is no image for us, and words of the reason; which decoders there are."""

    name: str
    data: bytes
    reason: str
    has_decoders: bool = True


JPEG = encode(photo(), "JPEG")
PNG = encode(photo(), "PNG")
TIFF = encode(photo(), "TIFF")
SCAN = JPEG.index(b"\xff\xda")
MIDDLE = (SCAN + len(JPEG)) // 2
AVIF = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(200)
NAN = Image.fromarray(np.float32([[0, np.nan], [1, 0.5]]))

BAD = {
    "1-corrupt-jpeg-header": Bad(
        "bad.jpg", patched(JPEG, JPEG.index(b"\xff\xc4") + 5, "16s", b"\xff" * 16), "corrupt JPEG"
    ),
    "1-corrupt-jpeg-scan": Bad(
        "bad.jpg", JPEG[:MIDDLE] + bytes(200) + JPEG[MIDDLE + 200 :], "JPEG: "
    ),
    "1-corrupt-png": Bad("bad.png", patched(PNG, len(PNG) // 2, "4s", b"\0\1\0\1"), "corrupt PNG"),
    "2-truncated-jpeg": Bad(
        "bad.jpg", cut(JPEG, 0.9), "truncated JPEG: the file ends before the image does"
    ),
    "2-truncated-jpeg-padded-with-zeros": Bad(
        "bad.jpg", cut(JPEG, 0.8) + bytes(len(JPEG) // 5), "truncated JPEG"
    ),
    "2-truncated-jpeg-with-an-end-marker": Bad(
        "bad.jpg", with_end_marker(JPEG, 0.7), "truncated JPEG: its last part is missing"
    ),
    "2-truncated-cmyk-jpeg-with-an-end-marker": Bad(
        "bad.jpg",
        with_end_marker(encode(photo().convert("CMYK"), "JPEG"), 0.9),
        "truncated JPEG: its last part is missing",
    ),
    "2-truncated-progressive-jpeg-with-an-end-marker": Bad(
        "bad.jpg",
        with_end_marker(encode(photo(), "JPEG", progressive=True), 0.3),
        "truncated JPEG",
    ),
    "2-truncated-png": Bad("bad.png", cut(PNG, 0.5), "truncated PNG"),
    "2-truncated-webp": Bad("bad.webp", cut(encode(photo(), "WEBP"), 0.5), "truncated WebP"),
    "2-truncated-gif": Bad("bad.gif", cut(encode(photo(), "GIF"), 0.8), "truncated GIF"),
    "2-truncated-tiff": Bad("bad.tif", cut(TIFF, 0.5), "truncated TIFF"),
    "3-zero-bytes": Bad("bad.jpg", b"", "empty file (0 bytes)"),
    "4-html": Bad(
        "bad.jpg", b"<!DOCTYPE html><title>404</title>", "not an image: starts with '<!DOCTYPE'"
    ),
    "4-text": Bad("bad.jpg", b"Not found\n", "not an image: starts with 'Not'"),
    "4-git-lfs-pointer": Bad(
        "bad.jpg", b"version https://git-lfs.github.com/spec/v1\n", "fetch it: git lfs pull"
    ),
    "8-float-tiff-with-nan": Bad("bad.tif", encode(NAN, "TIFF"), "NaN or infinite pixels"),
    "13-decompression-bomb": Bad(
        "bad.png",
        encode_png(np.zeros((1, 1, 1)), 0, size=(40_000, 40_000)),
        "too large to decode: ",
    ),
    "13-decompression-bomb-jpeg": Bad(
        "bad.jpg",
        patched(JPEG, JPEG.index(b"\xff\xc0") + 5, ">HH", 14_000, 14_000),
        "too large to decode: Image size (196000000 pixels)",
    ),
    "13-decompression-bomb-gif": Bad(
        "bad.gif", patched(encode(photo(), "GIF"), 6, "<HH", 65_000, 65_000), "too large to decode"
    ),
    "13-decompression-bomb-tiff": Bad(
        "bad.tif",
        patched(TIFF, TIFF.index(struct.pack("<HHII", 256, 4, 1, 96)) + 8, "<I", 2_000_000_000),
        "too large to decode",
    ),
    "13-a-format-that-runs-programs": Bad(
        "bad.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"
    ),
    "15-heic-without-a-decoder": Bad(
        "bad.heic",
        HEIC,
        "HEIC without a decoder; install one: pip install pillow-heif",
        has_decoders=False,
    ),
    "15-avif-without-a-decoder": Bad(
        "bad.avif",
        AVIF,
        "AVIF without a decoder; install one: pip install 'pillow>=11.3'",
        has_decoders=False,
    ),
}


@pytest.fixture
def few_decoders(monkeypatch):
    """As with a torch without torchcodec, and a Pillow without AVIF and HEIC."""

    def take_away():
        monkeypatch.setattr(codecs, "DECODERS", codecs._torchvision_decoders())
        monkeypatch.setattr(decode, "_OPENABLE", ["JPEG", "PNG"])
        monkeypatch.setattr(decode, "_register_pillow_heif", lambda: False)

    return take_away


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD)
def test_a_bad_image_costs_its_own_row_and_nothing_else(photos, good, few_decoders, fault):
    (photos / "rose" / fault.name).write_bytes(fault.data)
    if not fault.has_decoders:
        few_decoders()

    ran = extract()

    assert ran.code == 3
    ((sample_id, reason),) = ran.document["failures"].items()
    assert sample_id == f"rose/{fault.name}"
    assert fault.reason in reason
    assert f"  {sample_id}: {reason}" in ran.err.splitlines()
    assert "6 embedded, 1 skipped" in ran.err
    assert ran.store.failures == {sample_id: reason}
    assert_same_features(ran.features, good)
    again = extract()
    assert (again.code, again.document["failures"]) == (3, {sample_id: reason})


@contextmanager
def memory_left(size_bytes):
    """Let this process have only so much more memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_13_a_file_larger_than_the_memory_that_is_left(photos, good):
    file = photos / "rose" / "bad.jpg"
    file.touch()
    os.truncate(file, 900_000_000)

    with memory_left(400_000_000):
        ran = tlpipe("extract", "photos", *SMALL, "--threads", 1)

    assert ran.code == 3
    assert ran.document["failures"] == {"rose/bad.jpg": "too large for the memory that is left"}
    assert_same_features(ran.features, good)


# Awkward images


@dataclass(frozen=True)
class Awkward:
    """A file that is none of the plain ones, the picture that it shows, and what is noted."""

    name: str
    data: bytes
    shows: Image.Image
    note: str = ""
    tolerance: float = 0.01  # of 0…1: one or two grey levels, and half precision


def ycck(picture):
    """A JPEG of Adobe's inverted YCCK, which Pillow cannot write: it writes planes as they are."""
    luma_chroma = ImageOps.invert(picture).convert("YCbCr").split()
    planes = [ImageOps.invert(plane) for plane in luma_chroma]
    data = encode(Image.merge("CMYK", [*planes, Image.new("L", picture.size)]), "JPEG", quality=95)
    return patched(data, data.index(b"Adobe") + 11, "B", 2)


def with_alpha(picture, alpha):
    """The picture with one transparency throughout, and what is seen before white."""
    seen = Image.blend(Image.new("RGB", picture.size, "white"), picture, alpha / 255)
    return Image.merge("RGBA", [*picture.split(), Image.new("L", picture.size, alpha)]), seen


def palette_with_hole(picture):
    """A palette image whose commonest colour is transparent, and what is seen before white."""
    palette = picture.quantize(16)
    hole = max(palette.getcolors())[1]
    seen = np.array(palette.convert("RGB"))
    seen[np.array(palette) == hole] = 255
    return encode(palette, "PNG", transparency=hole), Image.fromarray(seen)


def rotated(picture, orientation, file_format="JPEG", **options):
    """The picture as a camera stores it that was held another way; its EXIF says which."""
    turn = Image.Transpose
    held = {3: turn.ROTATE_180, 6: turn.ROTATE_90, 8: turn.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture.transpose(held), file_format, exif=exif, **options)


def frames(picture, file_format, **options):
    """Three frames: the picture, a negative, and black."""
    others = [ImageOps.invert(picture), Image.new("RGB", picture.size)]
    return encode(picture, file_format, save_all=True, append_images=others, **options)


RAMP = np.linspace(0, 1, 96)[None].repeat(72, axis=0)
HALVES = np.array([[200, 30]])
LONG, SHORT = HALVES.repeat(10_000, axis=1), HALVES.repeat(40, axis=1).repeat(80, axis=0)
HALF_CLEAR, BEFORE_WHITE = with_alpha(photo(), 128)
GREY_CLEAR, GREY_BEFORE_WHITE = with_alpha(grey(255 * RAMP), 128)
HOLED, HOLE_BEFORE_WHITE = palette_with_hole(photo())
CUT_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12"
FINE = {"quality": 95, "subsampling": 0}

AWKWARD = {
    "5-png-called-jpg": Awkward("odd.jpg", PNG, photo()),
    "5-jpeg-called-png": Awkward("odd.png", encode(photo(), "JPEG", **FINE), photo()),
    "5-webp-called-bmp": Awkward("odd.bmp", encode(photo(), "WEBP", lossless=True), photo()),
    "6-cmyk": Awkward(
        "odd.jpg",
        encode(photo().convert("CMYK"), "JPEG", quality=95),
        photo(),
        "CMYK converted to RGB",
        tolerance=0.03,
    ),
    "6-ycck": Awkward("odd.jpg", ycck(photo()), photo(), "CMYK converted to RGB", tolerance=0.03),
    "7-sixteen-bit-grey": Awkward(
        "odd.png",
        encode(Image.fromarray((65535 * RAMP).astype(np.uint16)), "PNG"),
        grey(255 * RAMP),
        "16-bit pixels scaled to 8 bits",
    ),
    "7-sixteen-bit-grey-tiff": Awkward(
        "odd.tif",
        encode(Image.fromarray((65535 * RAMP).astype(np.uint16)), "TIFF"),
        grey(255 * RAMP),
        "16-bit pixels scaled to 8 bits",
    ),
    "8-float-tiff": Awkward(
        "odd.tif",
        encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        grey(255 * RAMP),
        "float pixels scaled from 0…1 to 0…255",
    ),
    "8-float-tiff-of-any-range": Awkward(
        "odd.tif",
        encode(Image.fromarray((3000 * RAMP - 1000).astype(np.float32)), "TIFF"),
        grey(255 * RAMP),
        "float pixels scaled from -1000…2000 to 0…255",
    ),
    "9-rgba": Awkward("odd.png", encode(HALF_CLEAR, "PNG"), BEFORE_WHITE),
    "9-grey-with-alpha": Awkward(
        "odd.png", encode(GREY_CLEAR.convert("LA"), "PNG"), GREY_BEFORE_WHITE
    ),
    "9-palette-with-transparency": Awkward("odd.png", HOLED, HOLE_BEFORE_WHITE),
    "9-invisible": Awkward(
        "odd.png", encode(with_alpha(photo(), 0)[0], "PNG"), Image.new("RGB", (8, 8), "white")
    ),
    "10-animated-gif": Awkward(
        "odd.gif", frames(photo(), "GIF"), photo(), "animated GIF: first of 3 frames", 0.05
    ),
    "10-animated-webp": Awkward(
        "odd.webp",
        frames(photo(), "WEBP", lossless=True),
        photo(),
        "animated WebP: first of 3 frames",
    ),
    "11-exif-upside-down": Awkward("odd.jpg", rotated(photo(), 3, **FINE), photo()),
    "11-exif-quarter-turn": Awkward("odd.jpg", rotated(photo(), 6, **FINE), photo()),
    "11-exif-quarter-turn-of-a-png": Awkward("odd.png", rotated(photo(), 8, "PNG"), photo()),
    "12-one-pixel": Awkward(
        "odd.png",
        encode(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"),
        Image.new("RGB", (8, 8), (9, 99, 199)),
    ),
    "12-one-by-twenty-thousand": Awkward("odd.png", encode(grey(LONG.T), "PNG"), grey(SHORT.T)),
    "12-twenty-thousand-by-one": Awkward("odd.jpg", encode(grey(LONG), "JPEG"), grey(SHORT)),
    "14-broken-icc": Awkward(
        "odd.jpg", encode(photo(), "JPEG", icc_profile=b"none", **FINE), photo()
    ),
    "14-broken-exif": Awkward(
        "odd.jpg",
        encode(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12", **FINE),
        photo(),
    ),
    "16-multi-page-tiff": Awkward(
        "odd.tif", frames(photo(), "TIFF"), photo(), "multi-page TIFF: first of 3 pages"
    ),
}


@pytest.mark.parametrize("fault", AWKWARD.values(), ids=AWKWARD)
def test_an_awkward_image_gets_the_row_of_what_it_shows(photos, good, fault):
    (photos / "rose" / fault.name).write_bytes(fault.data)
    (photos.parent / "plain").mkdir()
    fault.shows.save("plain/shown.png")
    expected = extract("plain").features["shown.png"]

    ran = extract()

    assert (ran.code, ran.document["failures"]) == (0, {})
    found = ran.features.pop(f"rose/{fault.name}")
    np.testing.assert_allclose(found.astype(float), expected.astype(float), atol=fault.tolerance)
    assert_same_features({i: ran.features[i] for i in good}, good)
    assert ran.document["notes"] == ({fault.note: 1} if fault.note else {})
    assert f"Note: 1 × {fault.note}" in ran.err or not fault.note
