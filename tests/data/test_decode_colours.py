"""Colours that are not plain RGB: CMYK, more bits, floats and transparency."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.decode import BACKGROUND, decode_image

from .encoded import TRANSPARENT, as_pillow_sees, encode, encode_png, patched, photo


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


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_a_tiff_whose_zero_is_white_is_not_a_negative(kind):
    scale = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[kind]
    black_to_white = np.array([[0, 0.2, 1]]) * scale
    data = encode(Image.fromarray(black_to_white.astype(kind)), "TIFF")
    tag = data.index(struct.pack("<HH", 262, 3))
    zero_is_white = patched(data, tag + 8, "<H", 0)

    assert decode_image(data).pixels[0].tolist() == [[0, 51, 255]]
    assert decode_image(zero_is_white).pixels[0].tolist() == [[255, 204, 0]]


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize(("data", "first", "second"), TRANSPARENT.values(), ids=TRANSPARENT)
def test_transparency_shows_one_fixed_background(data, first, second):
    pixels = decode_image(data).pixels

    assert pixels[:, 0, 0].tolist() == first == list(BACKGROUND)
    assert pixels[:, 0, 1].tolist() == second


def test_another_background():
    data = encode(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), "PNG")

    assert decode_image(data, background=(1, 2, 3)).pixels.flatten().tolist() == [1, 2, 3]
