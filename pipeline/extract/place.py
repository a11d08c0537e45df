"""Which folder of the cache holds the store of a data source under a recipe."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.data.names import to_id
from pipeline.data.samples import DataSource
from pipeline.errors import StoreError
from pipeline.store.key import recipe_differences, recipe_key
from pipeline.store.manifest import is_store, read_manifest
from pipeline.store.reader import open_store

_COMPARED_SAMPLES = 16


def store_folder(cache_dir: Path, source: DataSource, recipe: dict[str, Any]) -> Path:
    """``cache/<data source>/<backbone>-<first 8 of key>``.

    A data folder that was moved, copied or renamed is recognised by the content of its files, and
    keeps its store. Another folder that happens to have the same name gets a store of its own in
    ``cache/<data source>-<6 digits>/``.
    """
    backbone = str(recipe["backbone"]).removeprefix("torchvision:").replace(":", "-")
    name = f"{backbone}-{recipe_key(recipe)[:8]}"
    digits = hashlib.sha256(root_text(source).encode()).hexdigest()
    folders = [source.name, *(f"{source.name}-{digits[:n]}" for n in range(6, len(digits)))]
    own = [cache_dir / folder / name for folder in folders]
    for folder in own[:2]:
        if is_store(folder) and not is_elsewhere(folder, source):
            return folder
    known = dict.fromkeys((own[0], *sorted(cache_dir.glob(f"*/{name}"))))
    ours = (folder for folder in known if is_store(folder) and _is_of(folder, source))
    new = (folder for folder in own if not is_store(folder))
    return next(chain(ours, new))


def kept_beside(folder: Path, source: DataSource, recipe: dict[str, Any]) -> tuple[Path, list[str]]:
    """The store of this data source and backbone that is nearest to a new one in ``folder``.

    Returns:
        The store, and a line for each field of the recipe in which it differs, as
        ``precision: fp32, now bf16``; no line where there is no such store.
    """
    nearest: tuple[Path, list[str]] = (folder, [])
    for path in sorted(folder.parent.glob("*/")):
        try:
            known = read_manifest(path)
        except StoreError:  # not a store, or a damaged one, which is no concern of this run
            continue
        is_ours = known.source.get("root") == root_text(source)
        if is_ours and known.recipe.get("backbone") == recipe["backbone"]:
            differences = recipe_differences(_short_weights(known.recipe), _short_weights(recipe))
            if not nearest[1] or len(differences) < len(nearest[1]):
                nearest = path, differences
    return nearest


def _short_weights(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {**recipe, "weights": str(recipe.get("weights"))[:8]}


def root_text(source: DataSource) -> str:
    """The data root as it can be written down: bytes that are not UTF-8 are escaped."""
    return to_id(str(source.root.resolve()))


def is_elsewhere(folder: Path, source: DataSource) -> bool:
    """Whether the store was made from another place: sizes and times then prove nothing."""
    return is_store(folder) and read_manifest(folder).source.get("root") != root_text(source)


def _is_of(folder: Path, source: DataSource) -> bool:
    """Whether the store is of this data, though it may be of another place or name by now."""
    try:
        known = read_manifest(folder).source
        is_named_so = source.name in (known.get("name"), folder.parent.name)
        if is_named_so and known.get("root") == root_text(source):
            return True
        is_gone = not os.path.exists(str(known.get("root")))  # noqa: PTH110 - never raises
        return (is_named_so or is_gone) and _has_content_of(folder, source)
    except StoreError:  # a damaged store of other data is no concern of this run
        return False


def _has_content_of(folder: Path, source: DataSource) -> bool:
    """Whether most of some files of the data source are what the store has under their names."""
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
