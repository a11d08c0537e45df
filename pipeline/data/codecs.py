"""The decoders beside Pillow: they release the GIL, and their pixels are the same bit for bit.

torchcodec's image decoders where this machine has them (version 0.16), torchvision's older ones
for JPEG and WebP otherwise. Where one refuses the bytes, Pillow has the last word.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torchvision import io as torchvision_io

from pipeline.data import jpeg

Decoder = Callable[[torch.Tensor], torch.Tensor]


def _load_torchcodec() -> ModuleType | None:
    """Import torchcodec's decoders, unless they are too old or miss a shared library."""
    try:
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError):  # RuntimeError: no FFmpeg, or another torch
        return None
    module: ModuleType = decoders
    return module if hasattr(module, "decode_jpeg") else None


def _torchcodec_decoders(codec: ModuleType) -> dict[str, Decoder]:
    return {
        "JPEG": lambda encoded: codec.decode_jpeg(encoded, mode="RGB"),
        "PNG": lambda encoded: codec.decode_png(encoded, mode="RGB"),
        "WEBP": lambda encoded: codec.decode_webp(encoded, mode="RGB"),
        "PNG16": lambda encoded: codec.decode_png(
            encoded, mode="RGB_ALPHA", output_dtype=torch.uint16
        ),
        "AVIF": lambda encoded: codec.decode_avif(encoded, mode="RGB_ALPHA"),
        "HEIC": lambda encoded: codec.decode_heic(encoded, mode="RGB_ALPHA"),
    }


def _torchvision_decoders() -> dict[str, Decoder]:
    """Not its PNG decoder: a corrupt file makes that one end the process (version 0.29)."""
    rgb = torchvision_io.ImageReadMode.RGB
    return {
        "JPEG": lambda encoded: torchvision_io.decode_jpeg(encoded, mode=rgb),
        "WEBP": lambda encoded: torchvision_io.decode_webp(encoded, mode=rgb),
    }


_torchcodec = _load_torchcodec()
DECODERS = _torchvision_decoders() if _torchcodec is None else _torchcodec_decoders(_torchcodec)


def decode(kind: str, data: bytes) -> torch.Tensor | None:
    """Decode without Pillow.

    Args:
        kind: "JPEG", "PNG" or "WEBP", of 8-bit grey or RGB: gives (3, H, W) uint8, as stored.
            PNG and WebP must be without EXIF.
            "PNG16", any PNG of 16 bits a channel: gives (4, H, W) uint16, red to alpha.
            "AVIF" or "HEIC": gives (4, H, W) uint8, upright; (n_frames, 4, H, W) if several.
        data: the bytes of the file.

    Returns:
        The pixels, in channels-last memory; None if the decoder does not accept these bytes.

    Raises:
        ImportError: there is no decoder of this kind here.
    """
    if kind not in DECODERS:
        raise ImportError(f"no decoder for {kind}")
    if kind == "JPEG":
        # torchcodec would apply an EXIF orientation, torchvision would not.
        data = jpeg.without_exif(data)
    elif kind == "WEBP":
        # libwebp's simple decoder would read on into what follows the container.
        data = data[: int.from_bytes(data[4:8], "little") + 8]
    # A copy, because torch warns about memory that it must not write to.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        return DECODERS[kind](encoded)  # HEIC without libheif is an ImportError
    except (RuntimeError, ValueError):
        return None
