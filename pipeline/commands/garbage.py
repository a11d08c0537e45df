"""What in a cache, or among runs, is left over, unreachable or old, and how each of it is deleted.

Only what is recognised as made by this package is ever named, let alone deleted: a folder of
another kind is passed over, and so is every link, which might lead out of the cache.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.data.names import counted, to_id
from pipeline.data.written import MARKER
from pipeline.errors import StoreError, TlpipeError
from pipeline.runs.folder import (
    CHECKPOINT_FILE,
    COMPARISON_PREFIX,
    METRICS_FILE,
    TRAINING_PREFIX,
)
from pipeline.store.compact import count_unused_rows
from pipeline.store.durable import TEMPORARY_SUFFIX, write_error
from pipeline.store.leftovers import (
    QUARANTINE_FOLDER,
    finish_deleting,
    foreign,
    is_half_deleted,
    leftovers,
    quarantined,
    remove_folder,
    sweep,
)
from pipeline.store.lock import HOLDER_FILE, LOCK_FILE, WriterLock
from pipeline.store.manifest import BACKUP_FILE, MANIFEST_FILE, is_store, read_manifest
from pipeline.store.reader import Store, open_store
from pipeline.store.state import SHARD_FOLDER, check_size, shard_path
from pipeline.store.unpack import UNFINISHED_SUFFIX

DATA_FOLDER = "data"
DAY_SECONDS = 86_400

# A data set is written before the store that will use it: so young, it may be waiting for one.
NEW_SET_SECONDS = 3600

_HALF_WRITTEN_SUFFIX = ".writing"


@dataclass(frozen=True)
class Found:
    """Something in the cache that is not as it should be, or not needed.

    Attributes:
        path: a store, a data set, or what is left of one.
        kind: what it is, in a word or two.
        why: what is the matter, for people.
        size_bytes: the room that it takes.
        remedy: the command that mends it, for what gc does not delete; "" for none.
        delete: deletes it; None for what gc does not delete.
    """

    path: Path
    kind: str
    why: str
    size_bytes: int
    remedy: str = ""
    delete: Callable[[], None] | None = None


@dataclass(frozen=True)
class RunUse:
    """The stores that a run was fitted on.

    Attributes:
        path: the run.
        stores: their paths, as they were given; relative to whatever folder that was in.
        used_at: when the run was written, in seconds since 1970.
    """

    path: Path
    stores: tuple[str, ...]
    used_at: float

    def uses(self, store: Path) -> bool:
        """Whether a store is one of them, by the last two names of its path."""
        given = (Path(name).parts[-2:] for name in self.stores)
        return any(parts and store.absolute().parts[-len(parts) :] == parts for parts in given)


@dataclass(frozen=True)
class Rules:
    """What decides whether a store is kept.

    Attributes:
        runs: the runs that may use it.
        max_age_days: stores, trainings and comparisons that were last used before are garbage;
            None for no such age.
    """

    runs: Sequence[RunUse] = ()
    max_age_days: int | None = None


def collect(
    cache: Path, rules: Rules, *, delete: bool = False, note: Callable[[str], None]
) -> list[Found]:
    """Everything in a cache that is garbage, or could be mended.

    Args:
        cache: the cache's folder.
        rules: what decides whether a store is kept.
        delete: delete the garbage, each while its lock is held.
        note: is told what was passed over, and why.

    Raises:
        StoreError: something cannot be deleted; what was deleted before is gone.
    """
    found: list[Found] = []
    for parent in _folders(cache, note):
        for folder in _folders(parent, note):
            try:
                found += _collect_folder(folder, rules, delete, note)
            except OSError as error:
                note(f"{folder} was passed over: {error.strerror or error}")
            if delete and not folder.exists():
                with suppress(OSError):  # it is not empty
                    parent.rmdir()
    return found + _collect_data_sets(cache, delete, note)


def collect_trainings(
    runs: Path, rules: Rules, *, delete: bool = False, note: Callable[[str], None]
) -> list[Found]:
    """Trainings that were stopped, in a folder of runs and in the folders in it.

    One that can be gone on with is garbage only when it is older than ``rules`` allow. One that
    a process is at is no find.

    Args:
        runs: the runs' folder.
        rules: what decides whether one is kept.
        delete: delete the garbage, each while its lock is held.
        note: is told what was passed over, and why.

    Raises:
        StoreError: something cannot be deleted; what was deleted before is gone.
    """
    names = (f"{TRAINING_PREFIX}*", f".{TRAINING_PREFIX}*")  # the latter are half deleted
    folders = [path for name in names for path in (*runs.glob(name), *runs.glob(f"*/{name}"))]
    found: list[Found] = []
    for folder in sorted(folders):
        if folder.is_symlink() or not folder.is_dir():
            continue
        lock = WriterLock(folder)
        try:
            lock.acquire()
        except TlpipeError as error:  # in use, or no right to write
            note(f"Passed over: {error}")
            continue
        try:
            one = _examine_training(folder, rules)
            if delete and one.delete is not None:
                one.delete()
            found.append(one)
        except OSError as error:
            note(f"{folder} was passed over: {error.strerror or error}")
        finally:
            lock.release()
    return found


def _examine_training(folder: Path, rules: Rules) -> Found:
    """A training that no process is at."""
    if is_half_deleted(folder):
        why = "an earlier tlpipe gc was stopped while deleting it"
        return _folder_found(folder, "half-deleted", why, partial(finish_deleting, folder))
    names = {path.name.removesuffix(TEMPORARY_SUFFIX) for path in folder.iterdir()}
    others = names - {CHECKPOINT_FILE, METRICS_FILE, LOCK_FILE, HOLDER_FILE}
    remedy = f"rm -r {_quoted(folder)}"
    if others:
        why = f"a training that was stopped; kept for {min(others)}, which is not ours"
        return _folder_found(folder, "unfinished training", why, remedy=remedy)
    delete = partial(remove_folder, folder)
    if CHECKPOINT_FILE not in names:
        why = "a training that was stopped before it kept anything"
        return _folder_found(folder, "half-made", why, delete)
    age_days = (time.time() - (folder / CHECKPOINT_FILE).stat().st_mtime) / DAY_SECONDS
    why = f"a training that was stopped {counted(int(age_days), 'day')} ago"
    if rules.max_age_days is not None and age_days > rules.max_age_days:
        return _folder_found(folder, "old training", why, delete)
    why += "; its command goes on with --resume"
    return _folder_found(folder, "unfinished training", why, remedy=remedy)


def collect_comparisons(
    runs: Path, rules: Rules, *, delete: bool = False, note: Callable[[str], None]
) -> list[Found]:
    """What stopped comparisons have written down, in a folder of runs and in the folders in it.

    It is garbage only when it is older than ``rules`` allow: until then the same command goes on
    with it. One that is going on loses nothing but that, and writes it anew.

    Args:
        runs: the runs' folder.
        rules: what decides whether one is kept.
        delete: delete the garbage.
        note: is told what was passed over, and why.

    Raises:
        StoreError: something cannot be deleted; what was deleted before is gone.
    """
    name = f"{COMPARISON_PREFIX}*.json"
    found: list[Found] = []
    for path in sorted((*runs.glob(name), *runs.glob(f"*/{name}"))):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            age_days = (time.time() - path.stat().st_mtime) / DAY_SECONDS
            size_bytes = path.stat().st_size
        except OSError as error:
            note(f"{path} was passed over: {error.strerror or error}")
            continue
        why = f"a comparison that was left unfinished {counted(int(age_days), 'day')} ago"
        if rules.max_age_days is None or age_days <= rules.max_age_days:
            why, remedy = f"{why}; its command goes on with it", f"rm {_quoted(path)}"
            found.append(Found(path, "unfinished comparison", why, size_bytes, remedy))
            continue
        one = Found(path, "old comparison", why, size_bytes, delete=partial(_delete_files, [path]))
        if delete and one.delete is not None:
            one.delete()
        found.append(one)
    return found


def _folders(parent: Path, note: Callable[[str], None]) -> list[Path]:
    """The folders in ``parent``, without links."""
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError as error:
        note(f"{parent} was passed over: {error.strerror or error}")
        return []


# Stores


def _collect_folder(
    folder: Path, rules: Rules, delete: bool, note: Callable[[str], None]
) -> list[Found]:
    """What is found in one folder, which may be no store at all."""
    found = _examine(folder, rules)
    if not found or (_none_deleted(found) and not (folder / LOCK_FILE).exists()):
        return found
    lock = WriterLock(folder)
    try:
        lock.acquire()
    except TlpipeError as error:  # in use, no right to write, or no room
        note(f"Passed over: {error}")
        return []
    try:
        found = _examine(folder, rules)  # what a writer is about to name looks like garbage
        for one in found:
            if delete and one.delete is not None:
                one.delete()
        return found
    finally:
        lock.release()


def _examine(folder: Path, rules: Rules) -> list[Found]:
    if is_half_deleted(folder):
        why = "an earlier tlpipe gc was stopped while deleting it"
        return [_folder_found(folder, "half-deleted", why, partial(finish_deleting, folder))]
    if folder.name.endswith(UNFINISHED_SUFFIX) and not foreign(folder):
        why = "a tlpipe unpack that was stopped; the same command would go on with it"
        return [_folder_found(folder, "half-unpacked", why, partial(remove_folder, folder))]
    try:
        if not is_store(folder):
            return _examine_without_manifest(folder)
        store = open_store(folder)
        for shard in store.manifest.shards:
            check_size(shard_path(folder, shard), shard)
    except StoreError as error:
        why = str(error).splitlines()[0].replace(f"{folder}{os.sep}", "")
        return [_folder_found(folder, "damaged", why, remedy=f"tlpipe verify {_quoted(folder)}")]
    whole = _examine_whole(store, rules)
    return [*whole, *_examine_parts(store)] if _none_deleted(whole) else whole


def _examine_without_manifest(folder: Path) -> list[Found]:
    """A store that was never finished, one that lost its manifest, or no store."""
    shards = folder / SHARD_FOLDER
    is_ours = (folder / LOCK_FILE).exists() or (folder / BACKUP_FILE).exists()
    has_content = (folder / BACKUP_FILE).exists() or any(shards.glob("*.h5"))
    if is_ours and has_content:
        remedy = f"tlpipe verify {_quoted(folder)} --repair"
        return [_folder_found(folder, "damaged", f"it has no {MANIFEST_FILE}", remedy=remedy)]
    if (is_ours or shards.is_dir()) and not has_content and not foreign(folder):
        why = "a store that was begun, but nothing was written to it"
        return [_folder_found(folder, "half-made", why, partial(remove_folder, folder))]
    return []


def _examine_whole(store: Store, rules: Rules) -> list[Found]:
    """Whether the whole store is old or unreachable, and if so why it is kept all the same."""
    folder = store.path
    uses = [run for run in rules.runs if run.uses(folder)]
    written_at = (folder / MANIFEST_FILE).stat().st_mtime
    age_days = (time.time() - max([written_at, *(run.used_at for run in uses)])) / DAY_SECONDS
    root = _root(store)
    state = _state_of_root(root)
    is_old = rules.max_age_days is not None and age_days > rules.max_age_days
    if is_old:
        why = f"last used {counted(int(age_days), 'day')} ago"
    elif state == "gone":
        why = f"its data root {root} is gone"
    elif state == "unreachable":
        why = f"its data root {root} cannot be reached: on a disk or a machine that is not here?"
        return [_folder_found(folder, "unreachable", why, remedy=f"rm -r {_quoted(folder)}")]
    else:
        return []
    kind = "old" if is_old else "unreachable"
    others = foreign(folder)
    if others:
        return [_folder_found(folder, kind, f"{why}; kept for {others[0].name}, which is not ours")]
    if uses and not is_old:
        return [_folder_found(folder, kind, f"{why}; kept for {uses[-1].path}, which uses it")]
    return [_folder_found(folder, kind, why, partial(remove_folder, folder))]


def _root(store: Store) -> str:
    """The data root; "" for a built-in set, which is written out again whenever it is needed."""
    layout = str(store.source.get("layout", ""))
    is_builtin = layout in ("digits", "fashion-mnist") or layout.startswith("torchvision:")
    return "" if is_builtin else str(store.source.get("root", ""))


def _state_of_root(root: str) -> str:
    """Whether it is "here", "gone", or "unreachable", where nothing proves that it is gone.

    A folder was deleted or moved if others are still beside it. Where there are none, a disk may
    not be mounted, or the store may come from another machine.
    """
    path = Path(root)
    if not path.is_absolute():
        return "here"
    try:
        beside = {to_id(name) for name in os.listdir(path.parent)}  # noqa: PTH208 - may not be UTF-8
    except OSError:
        return "unreachable"
    if path.name in beside or path == path.parent:
        return "here"
    return "gone" if beside else "unreachable"


def _examine_parts(store: Store) -> list[Found]:
    """What in a store's folder is not, or no longer, part of it."""
    folder, found = store.path, []
    left = [] if (folder / SHARD_FOLDER).is_symlink() else leftovers(folder, store.manifest)
    if left:
        why = f"{counted(len(left), 'file')} that a killed writer left behind"
        delete = partial(sweep, folder, store.manifest)
        found.append(Found(folder, "left over", why, _file_bytes(left), delete=delete))
    aside = [] if (folder / QUARANTINE_FOLDER).is_symlink() else quarantined(folder)
    if aside:
        why = f"{counted(len(aside), 'damaged file')} that tlpipe verify --repair set aside"
        delete = partial(_delete_files, aside)
        found.append(Found(folder, "quarantine", why, _file_bytes(aside), delete=delete))
    n_unused = count_unused_rows(store)
    if n_unused:
        n_rows = sum(shard.n for shard in store.manifest.shards)
        size_bytes = n_unused * store.manifest.row_bytes()
        of_rows = f"{n_unused:,} of {counted(n_rows, 'row')}"
        limit = store.source.get("limit")
        if limit is None:
            why, remedy = f"{of_rows} are used by no sample", f"tlpipe compact {_quoted(folder)}"
            found.append(Found(folder, "unused rows", why, size_bytes, remedy))
        else:
            why = f"{of_rows} are hidden by --limit {limit}, until an extraction without it"
            found.append(Found(folder, "hidden rows", why, size_bytes))
    return found


def _delete_files(paths: Sequence[Path]) -> None:
    """Delete files of one folder, and the folder once it is empty."""
    folder = paths[0].parent
    try:
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with suppress(OSError):
        folder.rmdir()


# Data sets that were written out


def _collect_data_sets(cache: Path, delete: bool, note: Callable[[str], None]) -> list[Found]:
    found = []
    for one in _examine_data_sets(cache, note):
        name = one.path.name.removeprefix(".").removesuffix(_HALF_WRITTEN_SUFFIX)
        try:
            with FileLock(one.path.with_name(f".{name}.lock"), timeout=0):
                if delete and one.delete is not None:
                    one.delete()
            found.append(one)
        except Timeout:
            note(f"Passed over: {one.path} is being written.")
        except OSError as error:
            note(f"Passed over: {one.path} cannot be locked: {error.strerror or error}")
    return found


def _examine_data_sets(cache: Path, note: Callable[[str], None]) -> list[Found]:
    """Sets below ``data/`` that no store is made of, or that were never finished."""
    found = []
    data = cache / DATA_FOLDER
    folders = _folders(data, note) if data.is_dir() else []
    downloads = data / "torchvision"
    for folder in [*folders, *(_folders(downloads, note) if downloads in folders else [])]:
        if folder.name.startswith(".") and folder.name.endswith(_HALF_WRITTEN_SUFFIX):
            why = "a data set whose writing was stopped"
            delete = partial(finish_deleting, folder)
            found.append(_folder_found(folder, "half-written", why, delete))
    written = [folder for folder in folders if _was_written(folder)]
    used = _used_names(cache, note) if written else set()
    for folder in written:
        if used is not None and folder.name not in used:
            why = "a data set that no store is made of; it is written again when it is needed"
            delete = partial(remove_folder, folder)
            found.append(_folder_found(folder, "data set", why, delete))
    return found


def _was_written(folder: Path) -> bool:
    """Whether a data set was written here, and not just now for a store that is yet to come."""
    try:
        return time.time() - (folder / MARKER).lstat().st_mtime > NEW_SET_SECONDS
    except OSError:
        return False


def _used_names(cache: Path, note: Callable[[str], None]) -> set[str] | None:
    """Names of the data sources of all stores; None where not all stores can be read."""
    try:
        return {
            str(read_manifest(path.parent).source.get("name"))
            for path in cache.glob(f"*/*/{MANIFEST_FILE}")
        }
    except StoreError as error:
        first_line = str(error).splitlines()[0]
        note(f"Passed over: {cache / DATA_FOLDER}, as long as a store cannot be read: {first_line}")
        return None


# Shared


def _none_deleted(found: list[Found]) -> bool:
    return all(one.delete is None for one in found)


def _folder_found(
    folder: Path,
    kind: str,
    why: str,
    delete: Callable[[], None] | None = None,
    *,
    remedy: str = "",
) -> Found:
    """A whole folder that was found."""
    files = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    return Found(folder, kind, why, _file_bytes(files), remedy, delete)


def _file_bytes(paths: Iterable[Path]) -> int:
    return sum(path.lstat().st_size for path in paths)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
