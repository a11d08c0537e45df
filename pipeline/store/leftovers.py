"""What lies in a store's folder and is not part of the store, and how a folder is removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.store.durable import TEMPORARY_SUFFIX, sync_folder, write_durably, write_error
from pipeline.store.key import open_regular
from pipeline.store.lock import HOLDER_FILE, LOCK_FILE, SHARD_FOLDER
from pipeline.store.lock import QUARANTINE_FOLDER as QUARANTINE_FOLDER
from pipeline.store.manifest import BACKUP_FILE, MANIFEST_FILE, Manifest
from pipeline.store.view import VIEW_FILE

DELETING_SUFFIX = ".deleting"

_TEMPORARY = re.escape(TEMPORARY_SUFFIX)
_SHARD = re.compile(rf"[0-9]{{6,}}\.h5({_TEMPORARY})?")
_SAMPLES = re.compile(rf"samples-[0-9]{{6,}}\.h5({_TEMPORARY})?")
_SINGLE_FILES = (MANIFEST_FILE, BACKUP_FILE, VIEW_FILE)
_HALF_WRITTEN = {name + TEMPORARY_SUFFIX for name in _SINGLE_FILES}
_OURS = {*_SINGLE_FILES, *_HALF_WRITTEN, LOCK_FILE, HOLDER_FILE}


def leftovers(folder: Path, manifest: Manifest | None) -> list[Path]:
    """Files of a store's kind that ``store.json`` does not name: what a killed writer left behind.

    Args:
        folder: the store.
        manifest: what ``store.json`` holds; None where there is none.
    """
    shards = set() if manifest is None else {shard.file for shard in manifest.shards}
    samples = None if manifest is None or manifest.samples is None else manifest.samples.file
    found = [
        path
        for path in _files(folder / SHARD_FOLDER)
        if _SHARD.fullmatch(path.name) and path.name not in shards
    ]
    found += [
        path
        for path in _files(folder)
        if path.name in _HALF_WRITTEN or (_SAMPLES.fullmatch(path.name) and path.name != samples)
    ]
    return sorted(found)


def sweep(folder: Path, manifest: Manifest | None) -> None:
    """Remove all :func:`leftovers`; only the holder of the writer's lock may.

    Raises:
        ResourceError: the disk is full or fails.
        StoreError: the folder cannot be written to.
    """
    try:
        if manifest is not None:
            _renew_backup(folder)
        for path in leftovers(folder, manifest):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(folder / SHARD_FOLDER, error) from error


def _renew_backup(folder: Path) -> None:
    """A writer killed right after its commit left a backup that names what is about to go."""
    current = _content(folder / MANIFEST_FILE)
    if current and _content(folder / BACKUP_FILE) != current:
        write_durably(folder / BACKUP_FILE, current)


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError:
        return b""


def quarantined(folder: Path) -> list[Path]:
    """Files that ``tlpipe verify --repair`` set aside."""
    return sorted(_files(folder / QUARANTINE_FOLDER))


def foreign(folder: Path) -> list[Path]:
    """What lies in a store's folder and was not put there by this package."""
    found = []
    for path in folder.iterdir():
        if path.name == SHARD_FOLDER and _is_folder(path):
            found += [p for p in path.iterdir() if p.is_dir() or not _SHARD.fullmatch(p.name)]
        elif path.name == QUARANTINE_FOLDER and _is_folder(path):
            found += [p for p in path.iterdir() if p.is_dir()]
        elif path.is_dir() or not (path.name in _OURS or _SAMPLES.fullmatch(path.name)):
            found.append(path)
    return sorted(found)


def remove_folder(folder: Path) -> None:
    """Delete a folder that is wholly there until, in one instant, it is gone.

    It is renamed first: one that is only half deleted when the process is killed could be taken
    for a damaged store. :func:`is_half_deleted` knows what is left then.

    Raises:
        ResourceError: the disk fails.
        StoreError: the folder does not allow it.
    """
    aside = folder.with_name(f".{folder.name}{DELETING_SUFFIX}")
    try:
        if aside.exists():
            _remove_tree(aside)
        folder.rename(aside)
        sync_folder(folder.parent)
        # What is left of a store is none, for whoever looks into hidden folders.
        for name in (MANIFEST_FILE, BACKUP_FILE):
            (aside / name).unlink(missing_ok=True)
        _remove_tree(aside)
    except OSError as error:
        raise write_error(folder, error) from error


def is_half_deleted(folder: Path) -> bool:
    """Whether a process was killed while it deleted this."""
    return folder.name.startswith(".") and folder.name.endswith(DELETING_SUFFIX)


def finish_deleting(folder: Path) -> None:
    """Delete what is left of a folder that :func:`is_half_deleted`.

    Raises:
        ResourceError: the disk fails.
        StoreError: the folder does not allow it.
    """
    try:
        _remove_tree(folder)
    except OSError as error:
        raise write_error(folder, error) from error


def _remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # another process may be deleting it too
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _is_folder(path: Path) -> bool:
    """Whether it is a folder itself, and no link to one, which might lie anywhere."""
    return path.is_dir() and not path.is_symlink()


def _files(folder: Path) -> Iterator[Path]:
    """Everything but folders: also links, wherever they lead, and pipes."""
    with suppress(FileNotFoundError, NotADirectoryError):
        yield from (path for path in folder.iterdir() if path.is_symlink() or not path.is_dir())
