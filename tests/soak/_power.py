"""What a disk holds after a power loss, from the trace of what a process did.

A file system may keep back whatever was not fsynced. What a file holds is sure once the file was
fsynced after its last write; that it has its name, or has lost it, is sure once its folder was.
Of everything else any part may be on the disk or not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.soak._faults import Fault

FOLDER = -1
"""Stands for a folder where the number of a file is expected."""


@dataclass(frozen=True)
class Call:
    """One call that changes the disk.

    Attributes:
        number: from 1.
        operation: "create", "write", "fsync"…
        path: of the file or folder.
        to: its new path, of a "rename".
        synced: a copy of what the file held, of an "fsync" of a file.
    """

    number: int
    operation: str
    path: Path
    to: Path
    synced: Path | None


def read_trace(fault: Fault) -> list[Call]:
    """What a process with the action TRACE did, in order."""
    calls = []
    for line in Path(f"{fault.report}.trace").read_text().splitlines():
        number, operation, path, to = line.split("\t")
        copy = Path(f"{fault.report}.synced") / number
        synced = copy if copy.exists() else None
        calls.append(Call(int(number), operation, Path(path), Path(to), synced))
    return calls


class Disk:
    """A folder on a disk: how processes see it, and what of it is sure to outlast a power loss.

    Args:
        root: the folder; that itself is sure to be there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[Path, int] = {root: FOLDER}
        self._sure: dict[Path, int] = {root: FOLDER}
        self._content: dict[int, Path | None] = {}

    def apply(self, call: Call) -> None:
        """Do as the call did."""
        if call.operation == "mkdir":
            self._seen.setdefault(call.path, FOLDER)
        elif call.operation == "create":
            self._content[self._seen.setdefault(call.path, call.number)] = None
        elif call.operation in ("write", "truncate") and call.path in self._seen:
            self._content[self._seen[call.path]] = None
        elif call.operation == "rename":
            self._seen[call.to] = self._seen.pop(call.path)
        elif call.operation == "unlink":
            self._seen.pop(call.path, None)
        elif call.operation == "fsync" and self._seen[call.path] != FOLDER:
            self._content[self._seen[call.path]] = call.synced
        elif call.operation == "fsync":
            self._sure = {p: n for p, n in self._sure.items() if p.parent != call.path}
            self._sure |= {p: n for p, n in self._seen.items() if p.parent == call.path}

    def after_power_loss(self, target: Path, keep: float, rng: np.random.Generator) -> None:
        """Make ``target`` what may be found afterwards.

        Args:
            target: a new folder.
            keep: the share of the names that were not sure, but are kept all the same.
            rng: decides which ones.
        """
        target.mkdir()
        for path, number in sorted(self._names(keep, rng)):
            copy = target / path.relative_to(self.root)
            if not copy.parent.exists():
                continue
            if number == FOLDER:
                copy.mkdir(exist_ok=True)
            elif (content := self._content[number]) is not None:
                shutil.copyfile(content, copy)
            else:
                copy.write_bytes(bytes(int(rng.integers(100))))

    def _names(self, keep: float, rng: np.random.Generator) -> Iterator[tuple[Path, int]]:
        for path in self._seen.keys() | self._sure.keys():
            side = self._seen if rng.random() < keep else self._sure
            if path in side:
                yield path, side[path]
