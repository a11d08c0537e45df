"""Every way a command can end badly, and its exit code.

    TlpipeError                1  failed
    ├── UsageError             2  a name, an option or a path that is not there
    │   └── UnknownNameError      one of a known list was meant: offers close matches
    ├── DataError              4  the data source cannot be used
    │   ├── EmptySourceError      no image in it
    │   ├── ManifestError         a manifest that cannot be read as one
    │   ├── TooFewSamplesError    too few classes or samples for what was asked
    │   └── ImageError            one image that cannot be decoded (the sample is skipped)
    ├── StoreError             4  the feature store cannot be used
    │   ├── StoreFormatError      not a store, or a version this release does not read
    │   ├── CorruptStoreError     bytes differ from what was recorded
    │   └── MismatchError         features or weights of another recipe
    ├── WeightsError           4  a weights file that does not fit, or is not here
    ├── ResourceError          5  out of disk, memory or GPU
    └── LockedError            6  another process is writing

    0 done · 3 done, but some samples were skipped · 130 interrupted

An error's text says what was found, what was expected and the command that mends it.
A bug is not a ``TlpipeError`` and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_SKIPPED = 3
EXIT_INTERRUPTED = 130


class TlpipeError(Exception):
    """A failure that a user can understand and mend."""

    exit_code = 1


class UsageError(TlpipeError):
    """Something was named that does not exist or does not fit together."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name is not in the list it was meant from.

    Args:
        kind: what the name stands for, such as "backbone".
        name: what was given.
        known: every valid name; the close ones are offered, or all if they are few.
        remedy: one more line, such as the command that lists them all.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        known = list(known)
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        if close:
            hint = f"Did you mean: {', '.join(close)}?"
        elif 0 < len(known) <= 20:
            hint = f"Known: {', '.join(known)}."
        else:
            hint = ""
        lines = [f"Unknown {kind} {name!r}."]
        lines += [f"  {line}" for line in (hint, remedy) if line]
        super().__init__("\n".join(lines))


class DataError(TlpipeError):
    """The data source cannot be used as it is."""

    exit_code = 4


class EmptySourceError(DataError):
    """There is no image in the data source."""


class ManifestError(DataError):
    """A manifest file cannot be read as one."""


class TooFewSamplesError(DataError):
    """There are too few classes or samples for what was asked."""


class ImageError(DataError):
    """One image cannot be decoded; the message is the reason shown beside its id."""


class StoreError(TlpipeError):
    """The feature store cannot be used as it is."""

    exit_code = 4


class StoreFormatError(StoreError):
    """Not a feature store, or of a version that this release does not read."""


class CorruptStoreError(StoreError):
    """A file of the store does not hold the bytes that were recorded."""


class MismatchError(StoreError):
    """Features, weights or a head belong to another recipe."""


class WeightsError(TlpipeError):
    """Weights are not here, or do not fit the network."""

    exit_code = 4


class ResourceError(TlpipeError):
    """Out of disk space, memory or GPU."""

    exit_code = 5


class LockedError(TlpipeError):
    """Another process is writing to the store."""

    exit_code = 6
