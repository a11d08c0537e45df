"""Trials on disk as they are done: a sweep that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pipeline.errors import ResourceError, StoreError
from pipeline.sweep.trials import Candidate, Trial

_FORMAT = "tlpipe-trials"


class Journal:
    """A file of trials of the same data, one a line; taken away when the sweep is done.

    Args:
        folder: where the run will be; made where it does not exist.
        key: of the data, see ``Prepared.key``.
        resume: take up the trials that are there; else they are dropped.

    Attributes:
        path: the file.
        n_dropped: trials of an unfinished sweep that were not taken up.

    Raises:
        StoreError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, key: str, *, resume: bool) -> None:
        self.path = folder / f".trials-{key[:12]}.jsonl"
        self._key = key
        self._known: dict[tuple[int, str], Trial] = {}
        self._file: IO[str] | None = None
        known = self._read()
        self.n_dropped = 0 if resume else len(known)
        if resume:
            self._known = {(seed, t.candidate.key()): t for seed, t in known}

    def _read(self) -> list[tuple[int, Trial]]:
        """What an earlier process wrote; a last line that it did not finish is left out."""
        try:
            first, *lines = self.path.read_text("utf-8").splitlines()
            if json.loads(first) != self._header():
                return []
        except (OSError, ValueError):
            return []
        trials = []
        for line in lines:
            try:
                document = json.loads(line)
                trials.append((int(document["seed"]), Trial.from_dict(document)))
            except (ValueError, KeyError, TypeError):
                continue
        return trials

    def _header(self) -> dict[str, Any]:
        return {"format": _FORMAT, "data": self._key}

    def __enter__(self) -> Self:
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another process that still writes to the old file keeps it to itself.
            self._file = aside.open("w", encoding="utf-8")
            self._write(self._header())
            for (seed, _), trial in self._known.items():
                self._write({"seed": seed, **trial.to_dict()})
            aside.replace(self.path)
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
            self.path.unlink(missing_ok=True)

    def known(self, seed: int, candidate: Candidate) -> Trial | None:
        """The trial of an earlier process, if it got that far."""
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
