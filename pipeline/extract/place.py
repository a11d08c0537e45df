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
from pipeline.errors import ResourceError, StoreError
from pipeline.store.key import recipe_differences, recipe_key
from pipeline.store.manifest import is_store, read_manifest
from pipeline.store.reader import open_store

_COMPARED_SAMPLES = 16

# The layout of such a source, and the field that records where its file is.
_MANIFEST = "manifest"


def store_folder(cache_dir: Path, source: DataSource, recipe: dict[str, Any]) -> Path:
    """``cache/<data source>/<backbone>-<first 8 of key>``.

    A data folder or a manifest that was moved or renamed is recognised by the content of the files,
    and keeps its store; so does a full copy. Any other data that happens to have the same name gets
    a store of its own in ``cache/<data source>-<6 digits>/``.
    """
    backbone = str(recipe["backbone"]).removeprefix("torchvision:").replace(":", "-")
    name = f"{backbone}-{recipe_key(recipe)[:8]}"
    digits = hashlib.sha256("\0".join(place_of(source).values()).encode()).hexdigest()
    folders = [source.name, *(f"{source.name}-{digits[:n]}" for n in range(6, len(digits)))]
    own = [cache_dir / folder / name for folder in folders]
    for folder in own[:2]:
        if is_store(folder) and is_place(read_manifest(folder).source, source):
            return folder
    known = dict.fromkeys((own[0], *sorted(cache_dir.glob(f"*/{name}"))))
    stores = [folder for folder in known if is_store(folder)]
    here = (folder for folder in stores if _is_here(folder, source))
    brought = (folder for folder in stores if _was_brought(folder, source))
    new = (folder for folder in own if not is_store(folder))
    return next(chain(here, brought, new))


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
        except (
            ResourceError,
            StoreError,
        ):  # not a store, or a damaged one, which is no concern of this run
            continue
        if is_place(known.source, source) and known.recipe.get("backbone") == recipe["backbone"]:
            differences = recipe_differences(_short_weights(known.recipe), _short_weights(recipe))
            if not nearest[1] or len(differences) < len(nearest[1]):
                nearest = path, differences
    return nearest


def _short_weights(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {**recipe, "weights": str(recipe.get("weights"))[:8]}


def place_of(source: DataSource) -> dict[str, str]:
    """Where the data is, as a store records it: its root, and its manifest where it has one.

    Bytes that are not UTF-8 are escaped.
    """
    place = {"root": to_id(str(source.root.resolve()))}
    if source.layout == _MANIFEST:
        place[_MANIFEST] = to_id(str(Path(source.spec).expanduser().resolve()))
    return place


def is_place(known: Mapping[str, Any], source: DataSource) -> bool:
    """Whether what a store says of its data source is where ``source`` is.

    Stores of an earlier release say nothing of the manifest's own place: its root has to do.
    """
    place = place_of(source)
    if _MANIFEST not in known and known.get("layout") == _MANIFEST and _MANIFEST in place:
        return bool(known.get("root") == place["root"])
    return all(known.get(name) == place.get(name) for name in ("root", _MANIFEST))


def is_gone(known: Mapping[str, Any]) -> bool:
    """Whether the data that a store was made from is no longer where it was."""
    places = (str(known[name]) for name in ("root", _MANIFEST) if name in known)
    return not all(os.path.exists(place) for place in places)  # noqa: PTH110 - never raises


def _is_here(folder: Path, source: DataSource) -> bool:
    """Whether the store is of data of this name at this place."""
    try:
        known = read_manifest(folder).source
    except (ResourceError, StoreError):  # a damaged store of other data is no concern of this run
        return False
    return source.name in (known.get("name"), folder.parent.name) and is_place(known, source)


def _was_brought(folder: Path, source: DataSource) -> bool:
    """Whether the store is of this data at another place, which was moved or copied here.

    Where both are there, as the folds of a cross-validation are, only a full copy is the same data:
    what two others share must not make one take over the store of the other.
    """
    try:
        known = read_manifest(folder).source
        if is_gone(known):
            return 2 * _share_of_content(folder, source) > 1
        is_named_so = source.name in (known.get("name"), folder.parent.name)
        return (
            is_named_so and _has_ids_of(folder, source) and _share_of_content(folder, source) == 1
        )
    except StoreError:
        return False


def _has_ids_of(folder: Path, source: DataSource) -> bool:
    """Whether the store lists the very samples of the data source."""
    ids = open_store(folder).table.ids
    return len(ids) == len(source.samples) and {s.id for s in source.samples} == set(ids)


def _share_of_content(folder: Path, source: DataSource) -> float:
    """Share of some files of the data source that are what the store has under their names."""
    table = open_store(folder).table
    position = {sample_id: i for i, sample_id in enumerate(table.ids)}
    step = max(1, len(source.samples) // _COMPARED_SAMPLES)
    compared = source.samples[::step]
    same = 0
    for sample in compared:
        i = position.get(sample.id)
        digest = None if i is None else _digest(sample.file)
        same += digest is not None and digest == table.digests[i].tobytes()
    return same / len(compared)


def _digest(file: str) -> bytes | None:
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # noqa: PTH116 - names may not be UTF-8
            return None
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except OSError:
        return None


def check_source_writable(cache_dir: Path, source: DataSource) -> None:
    """As :func:`check_writable`, of the folder in the cache that a source's stores are in.

    Raises:
        StoreError: a store of this source could not be made there or written to.
    """
    folder = cache_dir / source.name
    if folder.is_dir() and not any(_may_write(path, source) for path in folder.glob("*/")):
        check_writable(folder)


def _may_write(path: Path, source: DataSource) -> bool:
    """Whether a run may do without a new folder beside this one, which it may write to.

    Beside a store of other data of this name, the store may come to be in another folder.
    """
    try:
        is_of_others = not is_place(read_manifest(path).source, source)
    except StoreError:
        return False
    return is_of_others or os.access(path, os.W_OK)


def check_writable(folder: Path) -> None:
    """Say that nothing can be written before anything expensive is done.

    Args:
        folder: the cache, or a folder in it.

    Raises:
        StoreError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The cache folder {folder} cannot be made ({error.strerror}).\n"
            "  Give another with --cache."
        ) from error
    if not os.access(folder, os.W_OK):
        raise StoreError(
            f"The cache folder {folder} cannot be written to.\n"
            "  Give another with --cache, or change its permissions."
        )
