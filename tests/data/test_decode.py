"""One table a group of faults: every file either decodes to the right pixels or says why not."""

import base64
import io
import json
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps, features

from pipeline.data import codecs, decode, jpeg
from pipeline.data.decode import BACKGROUND, DECODING, MAX_PIXELS, decode_image
from pipeline.errors import ImageError

HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAVZtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAA"
    "AAAAAAAAACJpbG9jAAAAAERAAAEAAQAAAAABegABAAAAAAAAABwAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABo"
    "dmMxAAAAAA5waXRtAAAAAAABAAAA1mlwcnAAAAC3aXBjbwAAAHhodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEA"
    "GEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQArQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqSSmubgIaDAgAAAMAyAAA"
    "AwAIQGIAAQAHRAHBcrAiQAAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAABBwaXhpAAAAAAMI"
    "CAgAAAAXaXBtYQAAAAAAAAABAAEEgQIDBAAAACRtZGF0AAAAGCgBrxOA5qhw0//9AVH+154fbZ8tJ5v3wA=="
)  # 64 × 64 pixels of (200, 40, 90)


def photo(width=40, height=30, mode="RGB"):
    """A smooth picture with some grain, and no grey in its last corner."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    colours = np.stack([255 * x, 255 * y, 200 * (1 - x) * (1 - y)], axis=-1)
    grain = np.random.default_rng(0).normal(0, 8, colours.shape)
    image = Image.fromarray((colours + grain).clip(0, 255).astype(np.uint8))
    if "A" in mode:
        image.putalpha(Image.fromarray((255 * x).astype(np.uint8)))
    return image.convert(mode)


def encode(image, file_format, **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def encode_png(pixels, colour_type, *, depth=8, chunks=(), size=None):
    """A PNG of an array (H, W, C), of colour types and depths that Pillow does not write."""
    height, width = size or pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(f">u{max(depth // 8, 1)}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


def as_pillow_sees(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def reason_against(data):
    with pytest.raises(ImageError) as refusal:
        decode_image(data)
    return str(refusal.value)


def pixels_or_reason(data):
    try:
        return decode_image(data).pixels
    except ImageError as error:
        return str(error)


@pytest.fixture(params=["the best", "torchvision", "pillow"])
def decoders(request, monkeypatch):
    """Run a test with the decoders of this machine, of an older torch, and with Pillow alone."""
    best = codecs.DECODERS
    older = {"torchvision": codecs._torchvision_decoders(), "pillow": {}}.get(request.param, best)
    monkeypatch.setattr(codecs, "DECODERS", older)


# Pixels do not depend on the decoder

PLAIN = {
    "4:4:4": ("JPEG", "RGB", {"subsampling": 0}),
    "4:2:2": ("JPEG", "RGB", {"subsampling": 1}),
    "4:2:0": ("JPEG", "RGB", {"subsampling": 2}),
    "coarse": ("JPEG", "RGB", {"quality": 5}),
    "fine": ("JPEG", "RGB", {"quality": 100}),
    "progressive": ("JPEG", "RGB", {"progressive": True}),
    "optimised": ("JPEG", "RGB", {"optimize": True}),
    "restart markers": ("JPEG", "RGB", {"restart_marker_blocks": 2}),
    "stored as RGB": ("JPEG", "RGB", {"keep_rgb": True}),
    "grey JPEG": ("JPEG", "L", {}),
    "progressive grey JPEG": ("JPEG", "L", {"progressive": True}),
    "PNG": ("PNG", "RGB", {}),
    "grey PNG": ("PNG", "L", {}),
    "palette PNG": ("PNG", "P", {}),
    "black and white PNG": ("PNG", "1", {}),
    "WebP": ("WEBP", "RGB", {}),
    "coarse WebP": ("WEBP", "RGB", {"quality": 5}),
    "lossless WebP": ("WEBP", "RGB", {"lossless": True}),
    "GIF": ("GIF", "P", {}),
    "BMP": ("BMP", "RGB", {}),
    "TIFF": ("TIFF", "RGB", {}),
    "packed TIFF": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "PPM": ("PPM", "RGB", {}),
    "PGM": ("PPM", "L", {}),
    "JPEG 2000": ("JPEG2000", "RGB", {}),
}


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
    data = data[:8] + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")

    assert torch.equal(decode_image(bytes(data)).pixels, as_pillow_sees(data))


def _adam7_row(depth):
    counts = (1, 1, 0, 2, 0, 4)  # pixels that passes 1 to 6 take of a single row of eight
    return zlib.compress(
        b"".join(b"\0" + b"\xe4" * -(-count * depth // 8) for count in counts if count)
    )


def _chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


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


# Files that are no whole image: found, said why


def cut(data, share):
    return data[: int(len(data) * share)]


def with_end_marker(data, share=0.5):
    """Keep a share of the scans of a JPEG, and close it again."""
    first_scan = data.index(b"\xff\xda")
    return data[: first_scan + int((len(data) - first_scan) * share)] + b"\xff\xd9"


JPEG = encode(photo(), "JPEG")
PNG = encode(photo(), "PNG")

REFUSED = {
    "empty": (b"", "empty file (0 bytes)"),
    "HTML": (b"<!DOCTYPE html><title>404</title>", "not an image: starts with '<!DOCTYPE'"),
    "HTML with a byte order mark": (b"\xef\xbb\xbf\n<html>", "not an image: starts with '<html>'"),
    "text": (b"Not found\n", "not an image: starts with 'Not'"),
    "JSON": (b'{"error": "quota"}', "not an image: starts with '{\"error\":'"),
    "noise": (bytes([7, 200, 3, 4] * 99), "not an image: starts with the bytes 07 c8 03 04"),
    "zeros": (bytes(5000), "not an image: all 5,000 bytes are zero"),
    "one byte": (b"\xff", "not an image: starts with the bytes ff"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "PDF": (b"%PDF-1.7\n", "a PDF document, not an image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing; export it as PNG"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + bytes(99), "an MP4 or QuickTime file"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "header only": (JPEG[:20], "JPEG"),
    "half a JPEG": (cut(JPEG, 0.8), "truncated JPEG: the file ends before the image does"),
    "JPEG with a zero tail": (
        cut(JPEG, 0.8) + bytes(len(JPEG) // 5),
        "truncated JPEG: the file ends before the image does",
    ),
    "JPEG, cut, with an end marker": (
        with_end_marker(JPEG),
        "truncated JPEG: its last part is missing",
    ),
    "grey JPEG, cut, with an end marker": (
        with_end_marker(encode(photo(mode="L"), "JPEG")),
        "truncated JPEG: its last part is missing",
    ),
    "progressive JPEG, cut, with an end marker": (
        with_end_marker(encode(photo(160, 120), "JPEG", progressive=True), 0.2),
        "truncated JPEG: its last part is missing",
    ),
    "half a PNG": (cut(PNG, 0.5), "truncated PNG: the file ends before the image does"),
    "PNG with a flipped bit": (PNG.replace(PNG[99:101], b"\0\1"), "corrupt PNG: "),
    "half a GIF": (cut(encode(photo(), "GIF"), 0.8), "truncated GIF"),
    "half a WebP": (cut(encode(photo(), "WEBP"), 0.5), "truncated WebP"),
    "half a BMP": (cut(encode(photo(), "BMP"), 0.5), "truncated BMP"),
    "half a TIFF": (cut(encode(photo(), "TIFF"), 0.5), "truncated TIFF"),
    "half a PGM": (cut(encode(photo(mode="L"), "PPM"), 0.5), "truncated PPM"),
    "half a JPEG 2000": (cut(encode(photo(), "JPEG2000"), 0.5), "corrupt JPEG 2000: "),
    "half a HEIC": (HEIC[:300], "HEIC"),
    "NaN": (encode(Image.fromarray(np.float32([[0, np.nan]])), "TIFF"), "NaN or infinite"),
    "infinity": (encode(Image.fromarray(np.float32([[0, np.inf]])), "TIFF"), "NaN or infinite"),
}


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_whole_image_says_why(data, reason):
    assert reason in reason_against(data)


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize("name", PLAIN)
def test_a_cut_file_is_refused_at_every_length(name):
    file_format, mode, options = PLAIN[name]
    data = encode(photo(24, 18, mode), file_format, **options)
    whole = decode_image(data).pixels

    for n_bytes in range(0, len(data), max(1, len(data) // 60)):
        outcome = pixels_or_reason(data[:n_bytes])
        # Or else all that was lost is what follows the pixels.
        assert isinstance(outcome, str) or torch.equal(outcome, whole), n_bytes


def test_a_setting_of_another_library_does_not_pad_truncated_files(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)

    assert "truncated" in reason_against(cut(JPEG, 0.8))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_whole_jpeg_ignores_longer_scans(mode, options):
    data = encode(photo(61, 47, mode), "JPEG", **options)
    longer = jpeg.with_longer_scans(data)

    assert len(longer) > len(data)
    assert torch.equal(as_pillow_sees(longer), as_pillow_sees(data))


def test_a_whole_grey_image_is_not_taken_for_a_cut_one():
    data = encode(Image.new("RGB", (50, 50), (128, 128, 128)), "JPEG")

    assert jpeg.may_be_cut(data, as_pillow_sees(data))
    assert (decode_image(data).pixels == 128).all()


@pytest.mark.usefixtures("decoders")
def test_what_follows_the_image_is_ignored():
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encode(photo(), kind)
        assert torch.equal(decode_image(data + b"trailer").pixels, decode_image(data).pixels)


# Colours


@pytest.mark.parametrize("transform", [0, 2], ids=["CMYK", "YCCK"])
def test_cmyk_is_converted_and_noted(transform):
    data = encode(photo(mode="CMYK"), "JPEG", quality=95)
    adobe = data.index(b"Adobe")
    data = data[: adobe + 11] + bytes([transform]) + data[adobe + 12 :]

    decoded = decode_image(data)

    assert torch.equal(decoded.pixels, as_pillow_sees(data))
    assert decoded.notes == ("CMYK converted to RGB",)


def test_adobes_inverted_cmyk_is_not_a_negative():
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = decode_image(data).pixels.float().mean(dim=(1, 2))

    assert red > 240
    assert green < 15
    assert blue < 15


def test_cmyk_tiff():
    data = encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")

    assert decode_image(data).pixels[:, 0, 0].tolist() == [255, 0, 0]


SIXTEEN_BIT = np.array([[0, 128, 129, 257, 32768, 65278, 65407, 65535]], dtype=np.uint16)
EIGHT_BIT = [[0, 0, 1, 1, 128, 254, 255, 255]]


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(SIXTEEN_BIT), "PNG"),
        encode(Image.fromarray(SIXTEEN_BIT), "TIFF"),
        encode(Image.fromarray(SIXTEEN_BIT), "PPM"),
        encode_png(np.repeat(SIXTEEN_BIT[..., None], 3, axis=2), 2, depth=16),
        encode_png(np.stack([SIXTEEN_BIT, np.full_like(SIXTEEN_BIT, 65535)], 2), 4, depth=16),
    ],
    ids=["grey PNG", "TIFF", "PGM", "colour PNG", "grey PNG with alpha"],
)
def test_sixteen_bits_are_scaled_and_not_clipped(data):
    decoded = decode_image(data)

    assert decoded.pixels.tolist() == [EIGHT_BIT] * 3
    assert decoded.notes == ("16-bit pixels scaled to 8 bits",)


def test_sixteen_bits_of_transparency():
    half = np.array([[[65535, 0, 0, 32768]]], dtype=np.uint16)
    key = struct.pack(">HHH", 1, 2, 3)  # this very colour is transparent
    keyed = np.array([[[1, 2, 3], [1, 2, 4]]], dtype=np.uint16)

    assert decode_image(encode_png(half, 6, depth=16)).pixels.flatten().tolist() == [255, 127, 127]
    transparent, opaque = (
        decode_image(encode_png(keyed, 2, depth=16, chunks=[(b"tRNS", key)]), background=(9, 8, 7))
        .pixels[:, 0]
        .T
    )
    assert transparent.tolist() == [9, 8, 7]
    assert opaque.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "expected", "note"),
    [
        (np.float32([0, 0.5, 1]), [0, 128, 255], "float pixels scaled from 0…1 to 0…255"),
        (np.float32([0, 7.4, 255]), [0, 7, 255], "float pixels taken as 0…255"),
        (np.float32([-1, 0, 3]), [0, 64, 255], "float pixels scaled from -1…3 to 0…255"),
        (np.float32([900, 900, 900]), [0, 0, 0], "float pixels scaled from 900…900 to 0…255"),
        (np.int32([0, 1, 200]), [0, 1, 200], "32-bit pixels taken as 0…255"),
        (np.int32([0, 257, 514]), [0, 1, 2], "32-bit pixels scaled from 0…65535 to 0…255"),
        (np.int32([-5, 0, 5]), [0, 128, 255], "32-bit pixels scaled from -5…5 to 0…255"),
    ],
)
def test_a_tiff_of_numbers_is_scaled_and_says_how(values, expected, note):
    decoded = decode_image(encode(Image.fromarray(values[None]), "TIFF"))

    assert decoded.pixels.tolist() == [[expected]] * 3
    assert decoded.notes == (note,)


def transparent_images():
    clear, half = (10, 20, 30, 0), (0, 0, 0, 128)
    rgba = Image.new("RGBA", (2, 1), clear)
    rgba.putpixel((1, 0), half)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    return {
        "RGBA PNG": (encode(rgba, "PNG"), [255] * 3, [127] * 3),
        "LA PNG": (encode(rgba.convert("LA"), "PNG"), [255] * 3, [127] * 3),
        "RGBA WebP": (encode(rgba, "WEBP", lossless=True), [255] * 3, [127] * 3),
        "RGBA TIFF": (encode(rgba, "TIFF"), [255] * 3, [127] * 3),
        "palette PNG": (encode(palette, "PNG", transparency=0), [255] * 3, [200, 100, 50]),
        "palette PNG with alphas": (
            encode(palette, "PNG", transparency=bytes([0, 128])),
            [255] * 3,
            [227, 177, 152],
        ),
        "palette GIF": (encode(palette, "GIF", transparency=0), [255] * 3, [200, 100, 50]),
        "RGB PNG with a key": (
            encode(palette.convert("RGB"), "PNG", transparency=(10, 20, 30)),
            [255] * 3,
            [200, 100, 50],
        ),
        "grey PNG with a key": (
            encode(Image.frombytes("L", (2, 1), b"\x07\x08"), "PNG", transparency=7),
            [255] * 3,
            [8] * 3,
        ),
    }


TRANSPARENT = transparent_images()


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize(("data", "first", "second"), TRANSPARENT.values(), ids=TRANSPARENT)
def test_transparency_shows_one_fixed_background(data, first, second):
    pixels = decode_image(data).pixels

    assert pixels[:, 0, 0].tolist() == first == list(BACKGROUND)
    assert pixels[:, 0, 1].tolist() == second


def test_another_background():
    data = encode(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), "PNG")

    assert decode_image(data, background=(1, 2, 3)).pixels.flatten().tolist() == [1, 2, 3]


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


def rotated(file_format, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(), file_format, exif=exif, **options)


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


def patched(data, at, layout, *values):
    return data[:at] + struct.pack(layout, *values) + data[at + struct.calcsize(layout) :]


BOMBS = {
    "PNG": encode_png(np.zeros((1, 1, 1)), 0, size=(20_000, 20_000)),
    "JPEG": patched(JPEG, JPEG.index(b"\xff\xc0") + 5, ">HH", 65_000, 65_000),
    "GIF": patched(encode(photo(), "GIF"), 6, "<HH", 65_000, 65_000),
    "BMP": patched(encode(photo(), "BMP"), 18, "<ii", 20_000, 20_000),
    "HEIC": patched(HEIC, HEIC.index(b"ispe") + 8, ">II", 20_000, 20_000),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_decompression_bomb_is_not_decoded(data):
    reason = reason_against(data)

    assert reason.startswith("too large to decode: ")
    assert "400" in reason or "4225" in reason or "65,000" in reason or "20,000" in reason
    assert str(MAX_PIXELS) in reason.replace(",", "")


def test_the_cap_holds_whatever_pillow_is_set_to(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    assert reason_against(BOMBS["PNG"]) == (
        "too large to decode: 20,000 × 20,000 pixels; the cap is 178,956,970 pixels"
    )


def test_a_large_image_below_the_cap_does_not_warn():
    data = encode_png(np.zeros((1, 1, 1)), 0, depth=1, size=(10_000, 10_000))

    assert reason_against(data).startswith("truncated PNG")


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


# HEIC


def test_heic_decodes_or_names_what_to_install():
    outcome = pixels_or_reason(HEIC)

    if isinstance(outcome, str):
        assert outcome == "HEIC without a decoder; install one: pip install pillow-heif"
    else:
        assert outcome.shape == (3, 64, 64)
        assert (outcome[:, 32, 32].int() - torch.tensor([200, 40, 90])).abs().max() < 12


def test_heic_without_a_decoder_names_what_to_install(monkeypatch):
    monkeypatch.setattr(codecs, "DECODERS", codecs._torchvision_decoders())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decode._register_pillow_heif.cache_clear()

    assert reason_against(HEIC) == "HEIC without a decoder; install one: pip install pillow-heif"


# Anything at all

SEEDS = [encode(photo(12, 9, mode), kind, **more) for kind, mode, more in PLAIN.values()]
SEEDS += [data for data, _, _ in TRANSPARENT.values()]
SEEDS += [encode(photo(12, 9, "CMYK"), "JPEG"), encode(photo(12, 9, "F"), "TIFF"), HEIC]
SEEDS += [
    encode(photo(9, 9), kind, save_all=True, append_images=[photo(9, 9, "L")])
    for kind in ("GIF", "WEBP", "PNG", "TIFF")
]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    data=st.sampled_from(SEEDS),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 8)), max_size=4
    ),
    end=st.floats(0, 1) | st.just(1.0),
)
def test_damaged_bytes_give_an_image_or_an_image_error(data, edits, end):
    damaged = data
    for share, replacement, n_replaced in edits:
        at = int(share * len(damaged))
        damaged = damaged[:at] + replacement + damaged[at + n_replaced :]
    damaged = damaged[: int(end * len(damaged))]

    outcome = pixels_or_reason(damaged)

    if isinstance(outcome, str):
        assert outcome
        assert "\n" not in outcome
    else:
        assert outcome.dtype == torch.uint8
        assert outcome.ndim == len(outcome) == 3


def test_the_recipe_part_is_json():
    assert json.loads(json.dumps(DECODING)) == DECODING
