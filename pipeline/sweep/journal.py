"""Trials on disk as they are done: a sweep that was killed goes on where it was."""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pipeline.errors import ResourceError, StoreError
from pipeline.sweep.trials import Candidate, Trial

_FORMAT = "tlpipe-trials"
_SYNC_SECONDS = 1.0


class Journal:
    """A file of this process's trials, one a line; taken away when the sweep is done.

    Args:
        folder: where the run will be; made where it does not exist.
        key: of the data and the code, see ``Prepared.key``.
        resume: take up the trials that other processes left on the same data.

    Attributes:
        path: the file.
        n_left: trials that unfinished sweeps left and that are not taken up.

    Raises:
        StoreError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, key: str, *, resume: bool) -> None:
        self.path = folder / f".trials-{key[:12]}-{secrets.token_hex(4)}.jsonl"
        self._key = key
        self._known: dict[tuple[int, str], Trial] = {}
        self._taken: list[Path] = []
        self._file: IO[str] | None = None
        self._synced = time.monotonic()
        self.n_left = 0
        for file in sorted(folder.glob(f".trials-{key[:12]}-*.jsonl")):
            owner, trials = self._read(file)
            # What another process found is as true while it still runs, but its file is its own.
            is_alive = _is_alive(owner)
            if resume:
                self._known |= {(seed, t.candidate.key()): t for seed, t in trials}
                self._taken += [] if is_alive else [file]
            elif not is_alive:
                self.n_left += len(trials)

    def _read(self, file: Path) -> tuple[int, list[tuple[int, Trial]]]:
        """Who wrote a file, and its trials; a last line that was not finished is left out."""
        try:
            first, *lines = file.read_text("utf-8").splitlines()
            header = json.loads(first)
            if header["format"] != _FORMAT or header["data"] != self._key:
                return 0, []
            owner = int(header["process"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, []
        trials = []
        for line in lines:
            try:
                document = json.loads(line)
                trial = Trial.from_dict(document)
                # What failed for want of memory may do better now.
                trials += [] if trial.failure else [(int(document["seed"]), trial)]
            except (ValueError, KeyError, TypeError):
                continue
        return owner, trials

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("x", encoding="utf-8")
            self._write({"format": _FORMAT, "data": self._key, "process": os.getpid()})
        except OSError as error:
            raise StoreError(
                f"Trials cannot be written to {self.path.parent} ({error.strerror}).\n"
                "  Give another folder with --out."
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            for file in (self.path, *self._taken):
                file.unlink(missing_ok=True)

    def known(self, seed: int, candidate: Candidate) -> Trial | None:
        """The trial of another process, if it got that far."""
        return self._known.get((seed, candidate.key()))

    def add(self, seed: int, trial: Trial) -> None:
        """Keep a trial.

        Raises:
            ResourceError: the disk is full.
        """
        try:
            self._write({"seed": seed, **trial.to_dict()})
        except OSError as error:
            raise ResourceError(
                f"Writing {self.path} failed ({error.strerror}).\n  Free some space, then run the "
                "same command again with --resume."
            ) from error

    def _write(self, document: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(document) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def _is_alive(process: int) -> bool:
    """Whether a process of this machine runs; on another one it counts as ended."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:
        return True
    return process > 0
