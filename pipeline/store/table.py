"""The samples table: what is known of every sample of the data source, column by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 32
NO_DIGEST = bytes(DIGEST_BYTES)
SPLIT_NAMES = ("", "train", "val", "test")


class Status(IntEnum):
    """Where a sample stands."""

    PENDING = 0
    OK = 1
    FAILED = 2


@dataclass(frozen=True)
class LabelColumn:
    """One label column.

    Attributes:
        categories: the labels that occur, sorted.
        codes: (n_samples,) int32, index into ``categories``; -1 where the label is missing.
    """

    categories: list[str]
    codes: NDArray[np.int32]

    @classmethod
    def of(cls, labels: Sequence[str | None]) -> LabelColumn:
        """Encode ``labels``; None is a missing label."""
        categories = sorted({label for label in labels if label is not None})
        index: dict[str | None, int] = {label: code for code, label in enumerate(categories)}
        index[None] = -1
        codes = np.fromiter((index[label] for label in labels), np.int32, count=len(labels))
        return cls(categories, codes)

    def decode(self, rows: NDArray[np.intp] | slice = slice(None)) -> NDArray[np.object_]:
        """(n,) labels as str, None where missing."""
        names = np.array([*self.categories, None], dtype=object)
        return names[self.codes[rows]]


@dataclass(frozen=True, slots=True)
class LogEntry:
    """What became of one sample.

    Attributes:
        id: the sample.
        status: OK or FAILED.
        digest: sha256 of the file's bytes, 32 bytes; zeros where they could not be read.
        size_bytes: file size when it was read.
        mtime_ns: modification time when it was read.
        shard: number of the shard that holds its features; -1 for none.
        row: row in that shard; -1 for none.
        reason: why it failed, or what was noted; "" for nothing.
    """

    id: str
    status: Status
    digest: bytes = NO_DIGEST
    size_bytes: int = -1
    mtime_ns: int = -1
    shard: int = -1
    row: int = -1
    reason: str = ""


@dataclass
class SampleTable:
    """Columns over ``n_samples`` samples, in the data source's order.

    Attributes:
        ids: sample ids.
        digests: (n_samples, 32) uint8, sha256 of the file's bytes; zeros while unknown.
        sizes: (n_samples,) int64, file size in bytes.
        mtimes: (n_samples,) int64, modification time in nanoseconds.
        splits: (n_samples,) uint8, index into ``SPLIT_NAMES``.
        statuses: (n_samples,) uint8, a :class:`Status`.
        shards: (n_samples,) int32, number of the shard that holds the features; -1 for none.
        rows: (n_samples,) int32, row in that shard; -1 for none.
        labels: label columns by name.
        reasons: why a sample failed, or what was noted while decoding it, by sample index.
    """

    ids: Sequence[str]
    digests: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    mtimes: NDArray[np.int64]
    splits: NDArray[np.uint8]
    statuses: NDArray[np.uint8]
    shards: NDArray[np.int32]
    rows: NDArray[np.int32]
    labels: dict[str, LabelColumn] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def pending(
        cls,
        ids: Sequence[str],
        sizes: NDArray[np.int64],
        mtimes: NDArray[np.int64],
        splits: NDArray[np.uint8],
        labels: dict[str, LabelColumn],
    ) -> SampleTable:
        """A table of samples of which nothing has been embedded."""
        n = len(ids)
        return cls(
            ids=ids,
            digests=np.zeros((n, DIGEST_BYTES), np.uint8),
            sizes=sizes,
            mtimes=mtimes,
            splits=splits,
            statuses=np.zeros(n, np.uint8),
            shards=np.full(n, -1, np.int32),
            rows=np.full(n, -1, np.int32),
            labels=labels,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ready(self) -> NDArray[np.intp]:
        """(n,) indices of the samples that have features."""
        return np.flatnonzero(self.statuses == Status.OK)

    def entry(self, i: int) -> LogEntry:
        """What is known of sample ``i``."""
        return LogEntry(
            self.ids[i],
            Status(self.statuses[i]),
            self.digests[i].tobytes(),
            int(self.sizes[i]),
            int(self.mtimes[i]),
            int(self.shards[i]),
            int(self.rows[i]),
            self.reasons.get(i, ""),
        )

    def count(self, status: Status) -> int:
        """How many samples have this status."""
        return int(np.count_nonzero(self.statuses == status))

    def equals(self, other: SampleTable) -> bool:
        """Whether every column holds the same."""
        return all(
            _same(getattr(self, column.name), getattr(other, column.name))
            for column in fields(self)
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, LabelColumn):
        return a.categories == b.categories and np.array_equal(a.codes, b.codes)
    if isinstance(a, Sequence):  # ids: strings that may not be decoded yet
        return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))
    return bool(a == b)
