"""Data sets that come as arrays, written out once as PNG files in the cache.

A set is built in a hidden folder beside its place and renamed when it is whole, under a lock, so
that neither a killed process nor two at once leave half of one behind.
"""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.folders import absolute, open_folder
from pipeline.data.samples import DataSource
from pipeline.errors import DataError, ResourceError

if TYPE_CHECKING:
    from PIL.Image import Image

MARKER = ".written.json"
"""In every written set: how many images it holds. Hidden, so that no scan lists it."""


def write_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Have ``build`` fill a new folder and move it to ``folder``; nothing if that is there.

    Raises:
        ResourceError: the disk is full.
        DataError: the cache cannot be written to.
    """
    if folder.exists():
        return
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                _build_aside(folder, build)
    except OSError as error:
        if is_out_of_space(error):
            raise ResourceError(
                f"No space left to write {folder}. Nothing unfinished was kept.\n"
                "  Free some, or name a cache on another disk."
            ) from error
        raise DataError(
            f"Cannot write {folder}: {error.strerror or error}.\n"
            "  Name a cache that can be written to."
        ) from error


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    full = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    return isinstance(error, OSError) and error.errno in full


def _build_aside(folder: Path, build: Callable[[Path], None]) -> None:
    unfinished = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        build(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_images(folder: Path, images: Iterable[tuple[str, Image]]) -> int:
    """Write images as PNG files and count them.

    Args:
        folder: where to.
        images: (path below ``folder`` with ``/`` between its parts, image) of each.
    """
    made: set[str] = set()
    n_images = 0
    for name, image in images:
        parent = name.rpartition("/")[0]
        if parent not in made:
            (folder / parent).mkdir(parents=True, exist_ok=True)
            made.add(parent)
        # The lowest level: a third larger than the highest, and several times as fast.
        image.save(f"{folder}/{name}", format="PNG", compress_level=1)
        n_images += 1
    return n_images


def write_marker(folder: Path, n_images: int, **facts: Any) -> None:
    """Record how many images a written set holds, and whatever else its reader needs."""
    text = json.dumps({"n_images": n_images, **facts})
    (folder / MARKER).write_text(text, encoding="utf-8")


def open_written(folder: Path, spec: str, layout: str) -> DataSource:
    """List a set that :func:`write_once` wrote, under its own name.

    Raises:
        DataError: images were added or removed since.
    """
    source = open_folder(absolute(folder), spec)
    n_expected = read_marker(folder)["n_images"]
    if len(source.samples) != n_expected:
        raise DataError(
            f"{folder} holds {len(source.samples):,} images, but {n_expected:,} were written there."
            f"\n  Remove it to have it written again:  rm -r {shlex.quote(str(folder))}"
        )
    return replace(source, name=folder.name, layout=layout)


def read_marker(folder: Path) -> dict[str, Any]:
    """What :func:`write_marker` recorded.

    Raises:
        DataError: the folder was not written by this package.
    """
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} is in the place of a built-in data set, but was not written by tlpipe.\n"
            "  Move it away to have the set written there."
        ) from error
    return dict(marker)
