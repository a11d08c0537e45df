"""Whatever decodes it, an image has the pixels that Pillow sees: formats, frames, orientation."""

import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, features

from pipeline.data import codecs, decode
from pipeline.data.decode import DECODING, decode_image

from .encoded import PLAIN, as_pillow_sees, chunk, encode, encode_png, photo, rotated

# Pixels do not depend on the decoder


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize("size", [(40, 30), (17, 33), (1, 1), (9, 1), (1, 23)])
@pytest.mark.parametrize(("file_format", "mode", "options"), PLAIN.values(), ids=PLAIN)
def test_a_plain_image_has_the_pixels_that_pillow_sees(file_format, mode, options, size):
    data = encode(photo(*size, mode=mode), file_format, **options)

    decoded = decode_image(data)

    assert decoded.pixels.dtype == torch.uint8
    assert decoded.pixels.shape == (3, size[1], size[0])
    assert decoded.pixels.permute(1, 2, 0).is_contiguous()
    assert torch.equal(decoded.pixels, as_pillow_sees(data))
    assert decoded.notes == ()


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_png_of_few_bits(depth, interlaced):
    header = struct.pack(">IIBBBBB", 8, 1, depth, 0, 0, 0, interlaced)
    data = bytearray(encode_png(np.zeros((1, depth, 1)), 0, size=(1, 8)))
    # One row of eight pixels in `depth` bytes; Adam7 splits it into passes, one pixel row each.
    body = zlib.compress(b"\0" + b"\xe4" * depth) if not interlaced else _adam7_row(depth)
    data = data[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")

    assert torch.equal(decode_image(bytes(data)).pixels, as_pillow_sees(data))


def _adam7_row(depth):
    counts = (1, 1, 0, 2, 0, 4)  # pixels that passes 1 to 6 take of a single row of eight
    return zlib.compress(
        b"".join(b"\0" + b"\xe4" * -(-count * depth // 8) for count in counts if count)
    )


@pytest.mark.usefixtures("decoders")
def test_gamma_in_a_png_changes_nothing():
    pixels = np.array(photo())
    data = encode_png(pixels, 2, chunks=[(b"gAMA", struct.pack(">I", 100_000))])

    assert np.array_equal(decode_image(data).pixels.permute(1, 2, 0), pixels)


def test_threads_agree_with_one_another():
    files = [encode(photo(mode=mode), kind, **more) for kind, mode, more in PLAIN.values()] * 4
    alone = [decode_image(data).pixels for data in files]

    with ThreadPoolExecutor(8) as pool:
        together = [decoded.pixels for decoded in pool.map(decode_image, files)]

    assert all(map(torch.equal, alone, together))


# Frames, pages, orientation


@pytest.mark.parametrize(
    ("file_format", "note"),
    [
        ("GIF", "animated GIF: first of 3 frames"),
        ("WEBP", "animated WebP: first of 3 frames"),
        ("PNG", "animated PNG: first of 3 frames"),
        ("TIFF", "multi-page TIFF: first of 3 pages"),
    ],
)
def test_only_the_first_frame_counts(file_format, note):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)

    decoded = decode_image(data)

    assert decoded.pixels[:, 4, 4].tolist() == [255, 0, 0]
    assert decoded.notes == (note,)


def test_the_previews_of_a_camera_are_not_noted():
    data = encode(photo(), "MPO", save_all=True, append_images=[photo(20, 15)])

    assert decode_image(data).notes == ()
    assert decode_image(data).pixels.shape == (3, 30, 40)


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(file_format, orientation):
    data = rotated(file_format, orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))

    decoded = decode_image(data)

    assert np.array_equal(decoded.pixels.permute(1, 2, 0), upright.convert("RGB"))
    assert decoded.pixels.permute(1, 2, 0).is_contiguous()
    assert decoded.notes == ()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
@pytest.mark.skipif("AVIF" not in codecs.DECODERS, reason="this torchcodec does not read AVIF")
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_avif_without_pillow_has_the_same_pixels(orientation, monkeypatch):
    data = rotated("AVIF", orientation)
    by_pillow = decode_image(data).pixels
    monkeypatch.setattr(decode, "_OPENABLE", ["JPEG"])

    assert torch.equal(decode_image(data).pixels, by_pillow)


# Sizes


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF"])
def test_extreme_shapes(size, file_format):
    data = encode(Image.new("L", size, 200), file_format)

    assert decode_image(data).pixels.shape == (3, size[1], size[0])


# Broken metadata


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "metadata",
    [
        {"icc_profile": b"no profile at all"},
        {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()[:99]},
        {"exif": b"Exif\0\0no Exif at all"},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12"},
        {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0six\0\0\0\0\0"},
    ],
    ids=["no ICC", "short ICC", "no EXIF", "short EXIF", "EXIF orientation of text"],
)
def test_broken_metadata_is_ignored(file_format, metadata):
    data = encode(photo(), file_format, **metadata)
    plain = encode(photo(), file_format)

    assert torch.equal(decode_image(data).pixels, decode_image(plain).pixels)


@pytest.mark.parametrize("tag", [330, 34_665, 34_675, 34_853, 40_965])
def test_broken_metadata_of_a_tiff_is_ignored(tag):
    image = photo()
    data = encode(image, "TIFF", tiffinfo={tag: 7 if tag != 34_675 else b"no profile"})

    assert np.array_equal(decode_image(data).pixels.permute(1, 2, 0), image)


def test_a_broken_icc_chunk_of_a_png_is_ignored():
    pixels = np.array(photo())
    data = encode_png(pixels, 2, chunks=[(b"iCCP", b"name\0\0not deflated")])

    assert np.array_equal(decode_image(data).pixels.permute(1, 2, 0), pixels)


def test_the_recipe_part_is_json():
    assert json.loads(json.dumps(DECODING)) == DECODING
