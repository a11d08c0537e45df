"""From the bytes of an image file to RGB pixels, or to one short reason why not.

Pillow reads the header and has the last word; the plain 8-bit files that data sets mostly hold
go through a decoder that releases the GIL and gives the same pixels. Runs in many threads.
"""

from __future__ import annotations

import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from pipeline.data import codecs, jpeg
from pipeline.errors import ImageError

BACKGROUND = (255, 255, 255)
MAX_PIXELS = 178_956_970  # where Pillow, too, stops by default: 512 MiB of RGB

# Everything that decides a pixel, for the recipe. A change of meaning needs a new version.
DECODING: dict[str, object] = {
    "version": 1,
    "exif_orientation": "applied",
    "icc_profile": "ignored",
    "background": list(BACKGROUND),
    "cmyk": "pillow",
    "sixteen_bit": "round(value / 257)",
    "float": "0..1 times 255; 0..255 as they are; otherwise min-max",
    "frame": 0,
    "max_pixels": MAX_PIXELS,
}

# How many times the size that is needed a JPEG must still have when it is decoded at a part of its
# own: see docs/fast-decoding.md for what less of it costs.
FAST_MARGIN = 2

# The same for a recipe whose images are decoded with `least`.
FAST_DECODING: dict[str, object] = {
    **DECODING,
    "fast": {"version": 1, "method": "JPEG DCT scaled by 1/8, 1/4 or 1/2", "margin": FAST_MARGIN},
}

# An allow-list: Pillow's EPS plugin would run a program, and its TGA plugin takes noise.
_FORMATS = {
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WEBP": "WebP",
    "GIF": "GIF",
    "BMP": "BMP",
    "TIFF": "TIFF",
    "PPM": "PPM",
    "JPEG2000": "JPEG 2000",
    "AVIF": "AVIF",
}
Image.init()
_OPENABLE = [name for name in _FORMATS if name in Image.OPEN]

_SIGNATURES = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}

_STRANGERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the image itself; fetch it: git lfs pull",
    b"%PDF": "a PDF document, not an image; export its pages",
    b"8BPS": "a Photoshop document; export it as PNG",
    b"<svg": "an SVG drawing; export it as PNG",
    b"\xff\x0a": "a JPEG XL image, which cannot be decoded; convert it to PNG",
    b"\0\0\0\x0cJXL": "a JPEG XL image, which cannot be decoded; convert it to PNG",
}

_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}

# Steps along rows and columns that undo an EXIF orientation; 5 to 8 are transposed before.
_FLIPS = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}

# What Pillow raises for bytes that are not what they claim.
_REFUSALS = (
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    RuntimeError,
    SystemError,
    UnboundLocalError,
    Warning,
    struct.error,
    zlib.error,
)

# Pillow logs some refusals, too; the reason is in our own error.
logging.getLogger("PIL").addHandler(logging.NullHandler())
_QUIET_MODULES = re.compile(r"PIL\.|torchvision\.io\.")


@contextmanager
def _refusing(data: bytes, name: str = "") -> Iterator[None]:
    """Give the reason for a refusal by Pillow; only around its own calls, to hide no bug of ours.

    Raises:
        ImageError: the reason.
    """
    try:
        yield
    except _REFUSALS as error:
        text = str(error)
        name = name or _signature(data) or _container(data) or "image"
        is_short_webp = name == "WebP" and len(data) < int.from_bytes(data[4:8], "little") + 8
        if is_short_webp or isinstance(error, EOFError) or "truncated" in text.lower():
            reason = f"truncated {name}: the file ends before the image does"
        else:
            reason = f"corrupt {name}: {text or type(error).__name__}"
        raise ImageError(reason) from error


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The pixels of one image.

    Attributes:
        pixels: (3, H, W), uint8, RGB, upright; in channels-last memory, which resizes faster.
        notes: what a user may want to know about how they came about; usually ().
    """

    pixels: torch.Tensor
    notes: tuple[str, ...] = ()


def decode_image(
    data: bytes,
    *,
    background: tuple[int, int, int] = BACKGROUND,
    least: tuple[int, int] | None = None,
) -> DecodedImage:
    """Decode an image file; its name does not matter.

    Args:
        data: the bytes of the file.
        background: red, green, blue (0…255) behind transparent pixels.
        least: height and width, in pixels, that the upright image is needed with. A JPEG that is
            much larger may then come out at an eighth, a quarter or half of its size, never below
            `FAST_MARGIN` times these; which is faster, and part of the recipe. None for every
            pixel of every image.

    Raises:
        ImageError: with a short reason, for anything that is not a whole image.
    """
    if not data:
        raise ImageError("empty file (0 bytes)")
    prepare_pillow()
    image = open_image(data)
    if image is None:
        return _decode_without_pillow(data, background)
    _check_size(*image.size)
    fast = _decode_scaled(image, data, least) if least else None
    return fast or _decode_plain(image, data) or _decode_any(image, data, background)


def prepare_pillow() -> None:
    """Undo process-wide settings under which a broken image would pass, or a good one warn.

    The older decoders of torchvision warn that they are old. `warnings.catch_warnings` is no way
    out: it must not be used in threads.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if not warnings.filters or warnings.filters[0][3] != _QUIET_MODULES:
        warnings.filterwarnings("ignore", module=_QUIET_MODULES.pattern)


def open_image(data: bytes) -> ImageFile.ImageFile | None:
    """Read the header; None if another decoder than Pillow has to try."""
    is_heic = _container(data) == "HEIC"
    if is_heic and not _register_pillow_heif():
        return None
    with _refusing(data):
        try:
            return Image.open(BytesIO(data), formats=["HEIF"] if is_heic else _OPENABLE)
        except Image.DecompressionBombError as error:
            raise ImageError(f"too large to decode: {error}") from error
        except UnidentifiedImageError as error:
            if _container(data) == "AVIF":
                return None
            raise ImageError(_stranger(data)) from error


def _check_size(width: int, height: int) -> None:
    """Refuse a decompression bomb before it is decoded."""
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"too large to decode: {width:,} × {height:,} pixels; the cap is {MAX_PIXELS:,} pixels"
        )
    if width < 1 or height < 1:
        raise ImageError(f"no pixels: {width} × {height}")


def plain_kind(image: ImageFile.ImageFile, data: bytes) -> str:
    """Which of the fast decoders takes this image: "JPEG", "PNG", "WEBP", or "" for none.

    The others take still, opaque images of 8-bit grey or RGB.
    """
    if image.mode not in ("L", "RGB") or image.has_transparency_data:
        return ""
    if image.format in ("JPEG", "MPO"):
        return "JPEG"
    if getattr(image, "is_animated", False):
        return ""
    if image.format == "PNG":
        # Bit depth 8, grey or RGB. An orientation may follow the pixels: Pillow must go there.
        has_metadata = any(name in data for name in (b"eXIf", b"exif", b"XML:com.adobe.xmp"))
        return "PNG" if data[24] == 8 and data[25] in (0, 2) and not has_metadata else ""
    return "WEBP" if image.format == "WEBP" and "exif" not in image.info else ""


def _decode_scaled(
    image: ImageFile.ImageFile, data: bytes, least: tuple[int, int]
) -> DecodedImage | None:
    """Decode a large JPEG at a part of its size; None if it is none, or is to be decoded whole.

    The inverse cosine transform makes fewer pixels of each block, from its lower frequencies. All
    of the file is still read.
    """
    if plain_kind(image, data) != "JPEG":
        return None
    orientation = orientation_of(image)
    reduction = _reduction(image.size, least if orientation >= 5 else least[::-1])
    if reduction == 1:
        return None
    try:
        scaled = JpegImagePlugin.JpegImageFile(BytesIO(data))  # the other one may be needed whole
        scaled.draft(None, (image.width // reduction, image.height // reduction))
        pixels = _as_tensor(scaled.convert("RGB"))
    except _REFUSALS:
        return None
    # What is missing may not show in fewer pixels.
    return None if jpeg.may_be_cut(data, pixels) else DecodedImage(_upright(pixels, orientation))


def _reduction(size: tuple[int, int], least: tuple[int, int]) -> int:
    """The largest part, 1/8 to 1/1, at which an image still is `FAST_MARGIN` times ``least``."""
    enough = [FAST_MARGIN * side for side in least]
    return next(
        part
        for part in (8, 4, 2, 1)
        if part == 1
        or all(side >= part * wanted for side, wanted in zip(size, enough, strict=True))
    )


def _decode_plain(image: ImageFile.ImageFile, data: bytes) -> DecodedImage | None:
    """Decode without Pillow and without its lock; None if that does not work."""
    kind = plain_kind(image, data)
    pixels = codecs.decode(kind, data) if kind in codecs.DECODERS else None
    if pixels is None or tuple(pixels.shape) != (3, image.height, image.width):
        return None
    if kind == "JPEG":
        _refuse_cut_jpeg(image, data, pixels)
        pixels = _upright(pixels, orientation_of(image))
    return DecodedImage(pixels)


def _decode_any(
    image: ImageFile.ImageFile, data: bytes, background: tuple[int, int, int]
) -> DecodedImage:
    """Decode with Pillow whatever it can open."""
    with _refusing(data, _FORMATS.get(image.format or "", "")):
        image.load()
    is_simple_grey = image.mode == "I;16" and not image.has_transparency_data
    if image.format == "PNG" and data[24] == 16 and not is_simple_grey:
        pixels, notes = _sixteen_bit_png(data, background)
    else:
        pixels, notes = _to_rgb(image, background)
    if image.format in ("JPEG", "MPO"):
        _refuse_cut_jpeg(image, data, pixels)
    return DecodedImage(_upright(pixels, orientation_of(image)), (*notes, *_frame_notes(image)))


def _decode_without_pillow(data: bytes, background: tuple[int, int, int]) -> DecodedImage:
    """Decode HEIC and AVIF where Pillow lacks them."""
    name = _container(data)
    # Image spatial extents: version and flags, width, height. The whole and its tiles have one.
    for extent in re.finditer(rb"ispe.{4}(.{4})(.{4})", data, re.DOTALL):
        _check_size(int.from_bytes(extent[1]), int.from_bytes(extent[2]))
    try:
        frames = codecs.decode(name, data)
    except ImportError as error:
        wanted = "pillow-heif" if name == "HEIC" else "'pillow>=11.3'"
        raise ImageError(f"{name} without a decoder; install one: pip install {wanted}") from error
    if frames is None:
        raise ImageError(f"corrupt or truncated {name}")
    frames = frames.reshape(-1, *frames.shape[-3:])
    rgba = Image.fromarray(frames[0].permute(1, 2, 0).contiguous().numpy())
    notes = (f"{name}: first of {len(frames)} images",) if len(frames) > 1 else ()
    return DecodedImage(_as_tensor(_flatten(rgba, background)), notes)


def _refuse_cut_jpeg(image: ImageFile.ImageFile, data: bytes, pixels: torch.Tensor) -> None:
    """Refuse a JPEG whose scan stops early but whose end marker is there: libjpeg accepts it."""
    # CMYK, which is rare, is looked at in any case: the grey of what is missing is no grey in RGB.
    if image.mode != "CMYK" and not jpeg.may_be_cut(data, pixels):
        return
    try:
        longer = JpegImagePlugin.JpegImageFile(BytesIO(jpeg.with_longer_scans(data))).convert("RGB")
        is_whole = torch.equal(_as_tensor(longer), pixels)
    except _REFUSALS:
        is_whole = False
    if not is_whole:
        raise ImageError("truncated JPEG: its last part is missing")


def _to_rgb(
    image: Image.Image, background: tuple[int, int, int]
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Pixels (3, H, W) of a loaded image of any mode, and notes."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        eight_bit = _eight_bit(np.asarray(image).astype(np.uint32))
        return _grey(eight_bit, image), ("16-bit pixels scaled to 8 bits",)
    if image.mode in ("I", "F"):
        eight_bit, note = _scale(np.asarray(image))
        return _grey(eight_bit, image), (note,)
    notes = ("CMYK converted to RGB",) if image.mode == "CMYK" else ()
    try:
        if image.has_transparency_data:
            return _as_tensor(_flatten(image, background)), notes
        return _as_tensor(image.convert("RGB")), notes
    except ValueError as error:
        raise ImageError(f"colour mode {image.mode} is not supported; save it as RGB") from error


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Put a background behind transparent pixels."""
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, background)
    canvas.paste(rgba, mask=rgba)
    return canvas


def _sixteen_bit_png(
    data: bytes, background: tuple[int, int, int]
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Pixels (3, H, W) of a 16-bit PNG, of which Pillow would drop the low bytes."""
    try:
        decoded = codecs.decode("PNG16", data)
    except ImportError as error:
        raise ImageError("16-bit colour PNG; to decode it: pip install -U torchcodec") from error
    if decoded is None:
        raise ImageError("corrupt PNG: libpng does not accept it")
    rgba = decoded.permute(1, 2, 0).contiguous().numpy()
    channels, alpha = rgba[..., :3].astype(np.uint64), rgba[..., 3:].astype(np.uint64)
    behind = np.array(background, dtype=np.uint64) * 257
    flat = (channels * alpha + behind * (65535 - alpha) + 32767) // 65535
    return torch.from_numpy(_eight_bit(flat)).permute(2, 0, 1), ("16-bit pixels scaled to 8 bits",)


def _eight_bit(sixteen_bit: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    """Values 0…65535 divided by 257 and rounded; the type must have room for 65663."""
    return ((sixteen_bit + 128) // 257).astype(np.uint8)


def _scale(values: NDArray[np.generic]) -> tuple[NDArray[np.uint8], str]:
    """Bring 32-bit grey of an unknown range to 0…255, and say how.

    Floats within 0…1 are taken for the usual scale. Values within 0…255, of integers also within
    0…65535, keep their meaning, so that a dark image stays dark. Others are stretched.
    """
    if not np.isfinite(values).all():
        raise ImageError("float image with NaN or infinite pixels")
    is_float = values.dtype.kind == "f"
    low, high = float(values.min()), float(values.max())
    start, end = low, high
    ranges = (1, 255) if is_float else (255, 65535)
    for known in ranges:
        if low >= 0 and high <= known:
            start, end = 0, known
            break
    scaled = (values.astype(np.float64) - start) * (255 / ((end - start) or 1))
    kind = "float" if is_float else "32-bit"
    how = f"scaled from {start:g}…{end:g} to" if end != 255 else "taken as"
    return scaled.round().astype(np.uint8), f"{kind} pixels {how} 0…255"


def _grey(values: NDArray[np.uint8], image: Image.Image) -> torch.Tensor:
    """Three equal channels, (3, H, W), of the (H, W) values of an image of more than 8 bits."""
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        values = 255 - values  # zero is white; Pillow turns only the plain ones round
    return torch.from_numpy(np.repeat(values[..., None], 3, axis=2)).permute(2, 0, 1)


def _as_tensor(rgb: Image.Image) -> torch.Tensor:
    """(3, H, W), uint8, in channels-last memory."""
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def orientation_of(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1…8; 1 if it is missing or broken. TIFF has applied it in load()."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _REFUSALS:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Undo an EXIF orientation of (3, H, W) pixels."""
    if orientation == 1:
        return pixels
    # A pixel moves as one item of three bytes: twice as fast as byte by byte.
    stored = pixels.permute(1, 2, 0).contiguous().numpy().view("V3")[..., 0]
    if orientation >= 5:
        stored = stored.T
    rows, columns = _FLIPS[orientation]
    upright = np.ascontiguousarray(stored[::rows, ::columns])
    return torch.from_numpy(upright.view(np.uint8).reshape(*upright.shape, 3)).permute(2, 0, 1)


def _frame_notes(image: ImageFile.ImageFile) -> tuple[str, ...]:
    """Say that other frames or pages were left out; a JPEG's others are previews of itself."""
    try:
        n_frames = getattr(image, "n_frames", 1)
    except _REFUSALS:
        return ()
    if n_frames < 2 or image.format == "MPO":
        return ()
    if image.format == "TIFF":
        return (f"multi-page TIFF: first of {n_frames} pages",)
    name = _FORMATS.get(image.format or "", image.format)
    return (f"animated {name}: first of {n_frames} frames",)


def _stranger(data: bytes) -> str:
    """Say what bytes are that no decoder takes for an image."""
    if name := _signature(data) or _container(data):
        return f"corrupt or truncated {name}: its header cannot be read"
    if data[4:8] == b"ftyp":
        return "not an image: an MP4 or QuickTime file"
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    for start, what in _STRANGERS.items():
        if text.startswith(start):
            return what
    if not any(data):
        return f"not an image: all {len(data):,} bytes are zero"
    first = (text.split() or [b""])[0][:20]
    if first.isascii() and first.decode("ascii").isprintable() and first:
        return f"not an image: starts with {first.decode('ascii')!r}"
    return f"not an image: starts with the bytes {data[:8].hex(' ')}"


def _signature(data: bytes) -> str:
    """The format that the first bytes promise; "" if none."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in _SIGNATURES.items() if data.startswith(start)), "")


def _container(data: bytes) -> str:
    """Whether an ISO base media file is "HEIC" or "AVIF"; "" if neither."""
    if data[4:8] != b"ftyp":
        return ""
    # The major brand, its version, then compatible brands to the end of the box.
    header = data[8 : min(int.from_bytes(data[:4]), 256)]
    brands = {header[at : at + 4] for at in range(0, len(header), 4) if at != 4}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIC" if brands & _HEIC_BRANDS else ""


@cache
def _register_pillow_heif() -> bool:
    """Teach Pillow HEIC if the user has installed pillow-heif."""
    try:
        import pillow_heif  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
