"""Faults of files: `faulty_io.c` compiled, and what it is told."""

from __future__ import annotations

import errno
import shutil
import struct
import subprocess
from dataclasses import asdict, dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("faulty_io.c")


class Calls(IntFlag):
    """Classes of file operations; the same numbers are in `faulty_io.c`."""

    CREATE = 1
    WRITE = 2
    SYNC = 4
    RENAME = 8
    UNLINK = 16
    MKDIR = 32
    CLOSE = 64
    OPEN = 128
    READ = 256
    STAT = 512
    LIST = 1024
    LOCK = 2048

    WRITES = CREATE | WRITE | SYNC | RENAME | UNLINK | MKDIR | CLOSE
    READS = OPEN | READ | STAT | LIST


class Action(IntEnum):
    """What happens to a struck call; the same numbers are in `faulty_io.c`."""

    FAIL = 1  # it fails with an error number and does nothing
    SHORT = 2  # it transfers half of the bytes and says so
    KILL = 3  # the process is killed just before it
    TEAR = 4  # it transfers half of the bytes, then the process is killed
    TRACE = 5  # nothing: every call is only written down, see _power.py


@dataclass(frozen=True)
class Fault:
    """Which file operations of a process go wrong, and how.

    Attributes:
        report: file that says afterwards what was struck.
        prefix: only files below this absolute path.
        classes: only these operations.
        nth: the n-th of them, from 1; 0 for random ones.
        lasting: every one from the n-th on, as of a disk that stays full.
        probability: of each one, where ``nth`` is 0.
        seed: of the random ones.
        action: what happens.
        error_number: with which error.
    """

    report: Path
    prefix: Path
    classes: Calls
    nth: int = 0
    lasting: bool = False
    probability: float = 0.0
    seed: int = 0
    action: Action = Action.FAIL
    error_number: int = errno.EIO

    def __post_init__(self) -> None:
        # What an earlier fault left there is not this one's.
        self.report.unlink(missing_ok=True)

    def to_json(self) -> dict[str, Any]:
        """As the fork server wants it."""
        return {**asdict(self), "report": str(self.report), "prefix": str(self.prefix)}

    def struck(self) -> Struck:
        """What has happened so far."""
        n_calls, n_hits, operation, path = struct.unpack("qq16s488s", self.report.read_bytes())
        names = (text.partition(b"\0")[0].decode(errors="replace") for text in (operation, path))
        return Struck(n_calls, n_hits, *names)


@dataclass(frozen=True)
class Struck:
    """What a fault did.

    Attributes:
        n_calls: calls that it could have struck.
        n_hits: calls that it did strike.
        operation: the first of them, such as "fsync".
        path: and its file.
    """

    n_calls: int
    n_hits: int
    operation: str
    path: str


def compile_shim(folder: Path) -> Path | None:
    """Compile `faulty_io.c` into ``folder``; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = folder / "faulty_io.so"
    words = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"]
    subprocess.run(words, check=True)
    return library
