"""One writer at a time, by an operating-system lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import filelock

from pipeline.errors import LockedError, StoreError
from pipeline.store.durable import write_error
from pipeline.store.key import open_regular

LOCK_FILE = "store.lock"
HOLDER_FILE = "writer.json"
SHARD_FOLDER = "shards"
QUARANTINE_FOLDER = "quarantine"

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class WriterLock:
    """The right to write to one store; taken by :meth:`acquire`, given back by :meth:`release`.

    The lock itself is the kernel's, so a killed holder never blocks anyone. ``writer.json`` only
    says who holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A soft lock would outlive a killed holder: where the kernel has none, acquire() says so.
        self._lock = filelock.FileLock(folder / LOCK_FILE, fallback_to_soft=False)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            LockedError: another process has it; the message names the process.
            StoreError: the folder cannot be written to, or its file system has no locks.
        """
        self._refuse_links()
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise LockedError(
                f"{self._folder} is being written by {self._holder()}.\n"
                "  Wait until it is done, or stop that process; reading is possible at any time."
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise write_error(self._folder / LOCK_FILE, error) from error
            raise StoreError(
                f"The file system of {self._folder} has no file locks, so two writers could not "
                "be kept apart.\n  Keep the store on a local disk: --cache FOLDER."
            ) from error
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with contextlib.suppress(OSError):  # only says who; the lock itself is held
            path = self._folder / HOLDER_FILE
            path.unlink(missing_ok=True)  # a link that somebody left there would lead elsewhere
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w") as file:
                file.write(json.dumps(holder))

    def _refuse_links(self) -> None:
        """A store may come from a stranger, and what it links to may be ours."""
        for name in (SHARD_FOLDER, QUARANTINE_FOLDER):
            if (self._folder / name).is_symlink():
                raise StoreError(
                    f"{self._folder / name} is a link to another folder: nothing is written there."
                    "\n  Put the folder itself in its place. Reading is possible as it is."
                )

    def release(self) -> None:
        """Give the lock back."""
        with contextlib.suppress(OSError):
            (self._folder / HOLDER_FILE).unlink(missing_ok=True)
        self._lock.release()

    def _holder(self) -> str:
        try:
            with open_regular(self._folder / HOLDER_FILE) as file:
                holder = json.load(file)
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
