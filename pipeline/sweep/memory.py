"""How much memory a piece of work takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

_STATM = Path("/proc/self/statm")
_INTERVAL_SECONDS = 0.02


@dataclass
class Peak:
    """What was seen.

    Attributes:
        size_bytes: the most that the process held beyond what it held at the start; None where the
            operating system does not say.
    """

    size_bytes: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch the resident memory of this process while the block runs, fifty times a second."""
    peak = Peak()
    if not _STATM.exists():
        yield peak
        return
    page = os.sysconf("SC_PAGE_SIZE")
    start, most, done = _pages(), 0, Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(_INTERVAL_SECONDS):
            most = max(most, _pages())

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.size_bytes = page * max(most - start, _pages() - start, 0)


def _pages() -> int:
    return int(_STATM.read_text().split()[1])
