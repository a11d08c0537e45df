"""Files that are wholly there or not there at all, whatever stops the process or the machine."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import ResourceError, StoreError

TEMPORARY_SUFFIX = ".tmp"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Put ``data`` at ``path``: written aside, fsynced, renamed over, the folder fsynced.

    Raises:
        ResourceError: the disk is full or fails.
        StoreError: the folder cannot be written to.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to fill; when the block ends well it is fsynced and put in its place.

    Raises:
        ResourceError: the disk is full or fails, also within the block.
        StoreError: the folder cannot be written to.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


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
            "  What was committed before is kept. Free some space, then run the same command again."
        )
    if error.errno in _FORBIDDEN:
        return StoreError(
            f"{path.parent} cannot be written to ({reason}).\n"
            "  Give another folder, or change its permissions."
        )
    return ResourceError(
        f"Writing {path} failed ({reason}).\n"
        "  Everything committed so far is kept. Check the disk, then run the same command again."
    )
