"""Files that are no whole image, or too large a one: each says why in one line."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from pipeline.data import codecs, decode, jpeg
from pipeline.data.decode import MAX_PIXELS, decode_image
from pipeline.errors import ImageError

from .encoded import (
    HEIC,
    JPEG,
    PLAIN,
    PNG,
    TRANSPARENT,
    as_pillow_sees,
    cut,
    encode,
    encode_png,
    patched,
    photo,
    with_end_marker,
)


def reason_against(data):
    with pytest.raises(ImageError) as refusal:
        decode_image(data)
    return str(refusal.value)


def pixels_or_reason(data):
    try:
        return decode_image(data).pixels
    except ImageError as error:
        return str(error)


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
    "CMYK JPEG, cut, with an end marker": (
        with_end_marker(encode(photo(mode="CMYK"), "JPEG")),
        "truncated JPEG: its last part is missing",
    ),
    "progressive CMYK JPEG, cut, with an end marker": (
        with_end_marker(encode(photo(160, 120, "CMYK"), "JPEG", progressive=True), 0.2),
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
