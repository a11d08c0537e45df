"""What libjpeg does not tell: JPEG files that end too early, yet look whole.

It fills what is missing with grey and accepts the file, if only an end marker follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_END_OF_IMAGE = 0xD9
_START_OF_SCAN = 0xDA
_APP1 = 0xE1  # EXIF, XMP
_APP15 = 0xEF  # nothing that any decoder looks at
_SEQUENTIAL = {0xC0, 0xC1, 0xC3, 0xC9, 0xCB}
_PROGRESSIVE = {0xC2, 0xCA}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
# Any bits that do not happen to spell an empty block; 0xFF would be a marker.
_MORE_BITS = bytes(range(1, 65))


def may_be_cut(data: bytes, pixels: torch.Tensor) -> bool:
    """Whether a second look is worth its time.

    Args:
        data: the file, which a decoder has accepted.
        pixels: (3, H, W), uint8, what it made of it; EXIF rotation not yet applied.
    """
    red, green, blue = (int(value) for value in pixels[:, -1, -1])
    ends_grey = 126.5 <= 0.299 * red + 0.587 * green + 0.114 * blue <= 129.5
    return ends_grey or _lacks_detail(data)


def with_longer_scans(data: bytes) -> bytes:
    """Add bits to the end of every scan.

    A decoder reads them only if the scan was too short to fill the image. So the pixels of a
    whole file stay the same, and those of a cut one change.
    """
    pieces, copied = [], 0
    for marker, _, end in segments(data):
        if marker == _START_OF_SCAN:
            pieces += [data[copied:end], _MORE_BITS]
            copied = end
    return b"".join([*pieces, data[copied:]])


def without_exif(data: bytes) -> bytes:
    """Turn EXIF and XMP into something that decoders skip; nothing else moves or changes."""
    hidden = bytearray(data)
    for marker, body, end in segments(data):
        if marker == _START_OF_SCAN:
            break
        if marker == _APP1:
            hidden[end - len(body) - 3] = _APP15
    return bytes(hidden)


def _lacks_detail(data: bytes) -> bool:
    """Whether a progressive file has not brought every coefficient to its last bit."""
    missing: set[tuple[int, int]] = set()
    for marker, body, _ in segments(data):
        if marker in _SEQUENTIAL:
            return False
        if marker in _PROGRESSIVE:
            components = body[6::3]
            missing = {(component, k) for component in components for k in range(64)}
        elif marker == _START_OF_SCAN and body:
            parameters = 1 + 2 * body[0]
            first, last, bits = (*body[parameters : parameters + 3], 0, 0, 15)[:3]
            if bits & 15 == 0:
                scanned = body[1:parameters:2]
                missing -= {(component, k) for component in scanned for k in range(first, last + 1)}
    return bool(missing)


def segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, body and end of every segment up to the end of the image; a scan has its bits."""
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif marker == _END_OF_IMAGE:
            return
        else:
            start = position + 4
            position += 2 + int.from_bytes(data[position + 2 : start])
            body = data[start:position]
            if marker == _START_OF_SCAN:
                end = _END_OF_SCAN.search(data, position)
                position = end.start() if end else len(data)
            yield marker, body, position
