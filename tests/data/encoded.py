"""Image files made up for tests: of every format, cut short, and patched to claim nonsense."""

import base64
import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

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
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    extra = b"".join(chunk(*one) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + body


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def as_pillow_sees(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def cut(data, share):
    return data[: int(len(data) * share)]


def with_end_marker(data, share=0.5):
    """Keep a share of the scans of a JPEG, and close it again."""
    first_scan = data.index(b"\xff\xda")
    return data[: first_scan + int((len(data) - first_scan) * share)] + b"\xff\xd9"


def rotated(file_format, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(), file_format, exif=exif, **options)


def patched(data, at, layout, *values):
    return data[:at] + struct.pack(layout, *values) + data[at + struct.calcsize(layout) :]


JPEG = encode(photo(), "JPEG")
PNG = encode(photo(), "PNG")

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
