"""What a killed training is taken up from: tensors and plain values in one file.

The file is written aside and renamed, so it is whole at every moment, and read with
``weights_only=True``, so reading it runs no code. A lock keeps other trainings out.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shlex
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import EXIT_INTERRUPTED, LockedError, StoreError, TlpipeError
from pipeline.runs.folder import CHECKPOINT_FILE, METRICS_FILE, TRAINING_PREFIX
from pipeline.store.durable import replacing
from pipeline.store.lock import WriterLock

_VERSION = 2


class StoppedError(TlpipeError):
    """The user stopped the training; a checkpoint holds all of it."""

    exit_code = EXIT_INTERRUPTED


class Checkpoint:
    """The folder of an unfinished training.

    Args:
        parent: folder of the runs.
        facts: all that decides the result; another training has another folder.

    Attributes:
        beside: values that are written with every state.
    """

    def __init__(self, parent: Path, facts: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = parent / f"{TRAINING_PREFIX}{digest[:12]}"
        self.path = self.folder / CHECKPOINT_FILE
        self.beside: dict[str, Any] = {}
        self._lock = WriterLock(self.folder)

    def acquire(self) -> None:
        """Keep other trainings with the same facts out until :meth:`release`.

        Raises:
            LockedError: another process is at it.
            StoreError: the folder cannot be made, or its file system has no locks.
        """
        check_writable(self.folder)
        self._lock.acquire()

    def release(self) -> None:
        """Let others in; a folder that holds no state is removed."""
        if not self.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def exists(self) -> bool:
        """Whether there is something to take up."""
        return self.path.is_file()

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state``: tensors, numbers, text, and lists and dictionaries of them.

        Raises:
            ResourceError: the disk is full.
            StoreError: the folder cannot be written to.
        """
        with replacing(self.path) as temporary:
            torch.save({"version": _VERSION, **self.beside, **state}, temporary)

    def load(self) -> dict[str, Any]:
        """Read what was saved last.

        Raises:
            StoreError: it is damaged, or of another release.
        """
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
            why = (str(e) or type(e).__name__).splitlines()[0]
            raise StoreError(
                f"{self.path} is damaged ({why:.100}).\n"
                f"  Start over: rm -r {shlex.quote(str(self.folder))}, then the same command."
            ) from e
        if not isinstance(state, dict) or state.get("version") != _VERSION:
            raise StoreError(
                f"{self.path} was written by another release.\n"
                f"  Start over: rm -r {shlex.quote(str(self.folder))}, then the same command."
            )
        return state

    def write_metrics(self, curve: list[dict[str, Any]]) -> None:
        """Write a line an epoch, for whoever wants to watch."""
        with replacing(self.folder / METRICS_FILE) as temporary:
            write_metrics(temporary, curve)

    def drop(self) -> None:
        """Forget the training, and go on keeping others out."""
        self.path.unlink(missing_ok=True)
        (self.folder / METRICS_FILE).unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget the training, unless another process is at it."""
        if self.folder.is_dir():
            with suppress(LockedError):
                self.acquire()
                self.drop()
                self.release()


def check_writable(folder: Path) -> None:
    """Make a folder where there is none, before anything that takes long.

    Raises:
        StoreError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be made ({error.strerror}).\n  Give another folder with --out."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(
            f"{folder} cannot be written to (no permission).\n  Give another folder with --out."
        )


def write_metrics(path: Path, curve: list[dict[str, Any]]) -> None:
    """Write one JSON document a line and epoch."""
    path.write_text("".join(json.dumps(line) + "\n" for line in curve), encoding="ascii")
