"""Which folder of the cache holds the store of a data source under a recipe."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pipeline.data.names import to_id
from pipeline.data.samples import DataSource
from pipeline.errors import StoreError
from pipeline.store.key import recipe_key
from pipeline.store.manifest import is_store, read_manifest
from pipeline.store.reader import open_store

_COMPARED_SAMPLES = 1000


def store_folder(cache_dir: Path, source: DataSource, recipe: dict[str, Any]) -> Path:
    """``cache/<data source>/<backbone>-<first 8 of key>``.

    A data folder that was moved, copied or renamed is recognised by its files' names and sizes,
    and keeps its store. Another folder that happens to have the same name gets a store of its own
    in ``cache/<data source>-<6 digits>/``.
    """
    backbone = str(recipe["backbone"]).removeprefix("torchvision:").replace(":", "-")
    name = f"{backbone}-{recipe_key(recipe)[:8]}"
    folder = cache_dir / source.name / name
    if not is_store(folder):
        renamed = (f for f in sorted(cache_dir.glob(f"*/{name}")) if _was_renamed(f, source))
        return next(renamed, folder)
    if _holds(folder, source):
        return folder
    digits = hashlib.sha256(root_text(source).encode()).hexdigest()[:6]
    return cache_dir / f"{source.name}-{digits}" / name


def root_text(source: DataSource) -> str:
    """The data root as it can be written down: bytes that are not UTF-8 are escaped."""
    return to_id(str(source.root.resolve()))


def _was_renamed(folder: Path, source: DataSource) -> bool:
    """Whether the store is of this data source under a name that no longer exists."""
    if not is_store(folder):
        return False
    root = str(read_manifest(folder).source.get("root"))
    return not Path(root).exists() and _holds(folder, source)


def _holds(folder: Path, source: DataSource) -> bool:
    """Whether the store in ``folder`` is of this data source."""
    if read_manifest(folder).source.get("root") == root_text(source):
        return True
    table = open_store(folder).table
    known = dict(zip(table.ids, table.sizes.tolist(), strict=True))
    compared = source.samples[:_COMPARED_SAMPLES]
    same: int = sum(known.get(sample.id) == _size_bytes(sample.file) for sample in compared)
    return 2 * same >= len(compared)


def _size_bytes(file: str) -> int | None:
    try:
        return os.stat(file).st_size  # noqa: PTH116 - names may not be UTF-8
    except OSError:
        return None


def check_writable(cache_dir: Path) -> None:
    """Say that nothing can be written before anything expensive is done.

    Raises:
        StoreError: the cache folder cannot be made or written to.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The cache folder {cache_dir} cannot be made ({error.strerror}).\n"
            "  Give another with --cache."
        ) from error
    if not os.access(cache_dir, os.W_OK):
        raise StoreError(
            f"The cache folder {cache_dir} cannot be written to.\n"
            "  Give another with --cache, or change its permissions."
        )
