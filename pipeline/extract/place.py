"""Which folder of the cache holds the store of a data source under a recipe."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from pipeline.data.names import to_id
from pipeline.data.samples import DataSource
from pipeline.errors import StoreError
from pipeline.store.key import recipe_key
from pipeline.store.manifest import is_store, read_manifest
from pipeline.store.reader import open_store

_COMPARED_SAMPLES = 16


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


def is_elsewhere(folder: Path, source: DataSource) -> bool:
    """Whether the store was made from another place: sizes and times then prove nothing."""
    return is_store(folder) and read_manifest(folder).source.get("root") != root_text(source)


def _was_renamed(folder: Path, source: DataSource) -> bool:
    """Whether the store is of this data source under a name that no longer exists."""
    try:
        root = str(read_manifest(folder).source.get("root"))
        return not Path(root).exists() and _holds(folder, source)
    except StoreError:  # a damaged store of other data is no concern of this run
        return False


def _holds(folder: Path, source: DataSource) -> bool:
    """Whether the store in ``folder`` is of this data source, by the content of some files."""
    if not is_elsewhere(folder, source):
        return True
    table = open_store(folder).table
    position = {sample_id: i for i, sample_id in enumerate(table.ids)}
    step = max(1, len(source.samples) // _COMPARED_SAMPLES)
    compared = same = 0
    for sample in source.samples[::step]:
        i = position.get(sample.id)
        digest = None if i is None else _digest(sample.file)
        compared += 1
        same += digest is not None and digest == table.digests[i].tobytes()
    return 2 * same > compared


def _digest(file: str) -> bytes | None:
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # noqa: PTH116 - names may not be UTF-8
            return None
        return hashlib.sha256(Path(file).read_bytes()).digest()
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
