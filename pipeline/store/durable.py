"""Files that are wholly there or not there at all, whatever stops the process or the machine."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pipeline.errors import ResourceError, StoreError

TEMPORARY_SUFFIX = ".tmp"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def write_durably(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``: written aside, fsynced, renamed over, the folder fsynced.

    Raises:
        ResourceError: the disk is full or fails.
        StoreError: the folder cannot be written to.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power loss; nothing where folders have no fsync."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, error: OSError) -> ResourceError | StoreError:
    """What a failed write means to a user."""
    if error.errno in _FULL:
        return ResourceError(
            f"No room to write {path} ({error.strerror}).\n"
            "  Everything committed so far is kept. Free some space, then run the same command "
            "again: it goes on where it stopped."
        )
    if error.errno in _FORBIDDEN:
        return StoreError(
            f"{path.parent} cannot be written to ({error.strerror}).\n"
            "  Give another folder with --cache, or change its permissions."
        )
    return ResourceError(
        f"Writing {path} failed ({error.strerror}).\n"
        "  Everything committed so far is kept. Check the disk, then run the same command again."
    )
