"""Files that are wholly there or not there at all, whatever stops the process or the machine."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import ResourceError, StoreError

TEMPORARY_SUFFIX = ".tmp"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM}

_KEPT = "What was committed before is kept."


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Put ``data`` at ``path``: written aside, fsynced, renamed over, the folder fsynced.

    Raises:
        ResourceError: the disk is full or fails.
        StoreError: the folder cannot be written to.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """A file beside ``path`` to fill; when the block ends well it is fsynced and put in its place.

    Args:
        path: where it goes.
        unique: nobody holds a lock on the place: the file beside it has a name of its own, and
            what came to ``path`` in the meantime is not replaced.

    Raises:
        FileExistsError: with ``unique``, there is something at ``path``.
        ResourceError: the disk is full or fails, also within the block.
        StoreError: the folder cannot be written to.
    """
    middle = f".{secrets.token_hex(4)}" if unique else ""
    temporary = path.with_name(f"{path.name}{middle}{TEMPORARY_SUFFIX}")
    try:
        # A link that somebody left there would lead elsewhere, a pipe would keep us waiting.
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        _sync(temporary, os.O_RDWR)
        if unique:
            _place_new(temporary, path)
        else:
            temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not (unique and isinstance(error, FileExistsError)):
            raise write_error(path, error) from error
        raise


def _place_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.replace(path)
    else:
        temporary.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power loss.

    Raises:
        ResourceError: the disk is full or fails.
        StoreError: it cannot be made there.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)
    except OSError as error:
        raise write_error(folder, error) from error


def remove(path: Path) -> None:
    """Remove a file that may be gone already.

    Raises:
        ResourceError: the disk fails, or it is a folder.
        StoreError: the folder does not allow it.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power loss; nothing where folders have no fsync."""
    if os.name != "nt":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, error: OSError) -> ResourceError | StoreError:
    """What a failed write means to a user."""
    # HDF5 wraps what the system said in a text of its own.
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        return ResourceError(
            f"No room to write {path} ({reason}).\n"
            f"  {_KEPT} Free some space, then run the same command again."
        )
    if error.errno == errno.EFBIG:
        return ResourceError(
            f"No room to write {path} ({reason}): files may not grow beyond a limit.\n"
            f"  {_KEPT} Raise the limit (ulimit -f), then run the same command again."
        )
    if error.errno == errno.EROFS:
        return StoreError(
            f"{path.parent} is on a disk that can only be read.\n  Give a folder on another disk."
        )
    if error.errno in _FORBIDDEN:
        return StoreError(
            f"{path.parent} cannot be written to ({reason}).\n"
            "  Give another folder, or change its permissions."
        )
    return ResourceError(
        f"Writing {path} failed ({reason}).\n"
        f"  {_KEPT} Check the disk, then run the same command again."
    )
