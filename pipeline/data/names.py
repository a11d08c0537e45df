"""Names of files, data sources and classes, made safe to store, print and use as folders."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".avif", ".heic", ".heif",
)  # fmt: skip


def to_id(relative: str) -> str:
    r"""The id of a file: Unicode NFC, bytes that are not UTF-8 written as ``\xNN``.

    Args:
        relative: path below the data root with ``/`` between its parts, as the system spells it.
    """
    if relative.isascii():
        return relative
    try:
        relative.encode()
    except UnicodeEncodeError:
        relative = os.fsencode(relative).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", relative)


def safe_name(text: str) -> str:
    """A folder name of letters, digits and ``._-`` that a reader still recognises.

    ``"Fleurs d'été (2024)"`` becomes ``"Fleurs-d-ete-2024"``; a name with nothing left, such as
    one in another script, becomes ``"source-"`` and a digest of it.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:80].rstrip("-._")
    if slug:
        return slug
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"source-{digest[:8]}"


def class_folders(classes: Iterable[str]) -> list[str]:
    """Folder names for class names, one each and in order.

    What some file system refuses becomes ``-``: ``"T-shirt/top"`` -> ``"T-shirt-top"``. Names that
    would meet on a file system that ignores case (``"A"``, ``"a"``) get their number appended.
    """
    folders: list[str] = []
    taken: set[str] = set()
    for number, name in enumerate(classes):
        folder = re.sub(r'[/\\:*?"<>|\x00-\x1f]+', "-", to_id(name)).strip(" .") or "-"
        if folder.casefold() in taken:
            folder = f"{folder}-{number}"
        taken.add(folder.casefold())
        folders.append(folder)
    return folders


def quoted(names: Iterable[str], n_shown: int = 5) -> str:
    """``'a', 'b' and 3 more``: names for a sentence, control characters escaped, cut at 60."""
    names = list(names)
    shown = [repr(name if len(name) <= 60 else f"{name[:57]}…") for name in names[:n_shown]]
    rest = len(names) - len(shown)
    if rest:
        return f"{', '.join(shown)} and {rest:,} more"
    return ", ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1]


def counted(n: int, noun: str, plural: str = "") -> str:
    """``1 image``, ``2,000 images``; ``plural`` where it is not the noun and an s."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {plural or noun + 's'}"
