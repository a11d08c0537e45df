"""Which row belongs to which image bytes, in 44 bytes a row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.store.table import DIGEST_BYTES

Place = tuple[int, int]
_Rows = tuple[NDArray[np.uint64], NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32]]

# So many rows may be added before they are sorted in.
_MAX_RECENT = 50_000


class RowIndex:
    """Finds the (shard number, row) of a digest.

    Args:
        shards: number and (n_rows, 32) digests of each shard, in the order in which they were
            written; the last row of a digest is the one that is found.
    """

    def __init__(self, shards: Iterable[tuple[int, NDArray[np.uint8]]]) -> None:
        numbers, rows, digests = [], [], [np.empty((0, DIGEST_BYTES), np.uint8)]
        for number, known in shards:
            numbers.append(np.full(len(known), number, np.int32))
            rows.append(np.arange(len(known), dtype=np.int32))
            digests.append(known)
        self._recent: dict[bytes, Place] = {}
        self._sorted = _sort(
            np.concatenate(digests),
            np.concatenate([np.empty(0, np.int32), *numbers]),
            np.concatenate([np.empty(0, np.int32), *rows]),
        )

    def find(self, digest: bytes) -> Place | None:
        """Where the features of these bytes are; None where there are none. Any thread may ask."""
        place = self._recent.get(digest)
        if place is not None or len(digest) != DIGEST_BYTES:
            return place
        starts, digests, numbers, rows = self._sorted
        stop = int(np.searchsorted(starts, _starts(digest)[0], "right"))
        for i in range(stop - 1, -1, -1):
            known = digests[i].tobytes()
            if known == digest:
                return int(numbers[i]), int(rows[i])
            if known[:8] != digest[:8]:
                break
        return None

    def add(self, digest: bytes, place: Place) -> None:
        """Say where the features of these bytes are from now on."""
        self._recent[digest] = place
        if len(self._recent) > _MAX_RECENT:
            self._sort_in()

    def _sort_in(self) -> None:
        _, digests, numbers, rows = self._sorted
        places = np.array(list(self._recent.values()), np.int32)
        added = np.frombuffer(b"".join(self._recent), np.uint8).reshape(-1, DIGEST_BYTES)
        # In one assignment, for other threads look at it.
        self._sorted = _sort(
            np.concatenate([digests, added]),
            np.concatenate([numbers, places[:, 0]]),
            np.concatenate([rows, places[:, 1]]),
        )
        self._recent = {}


def _sort(digests: NDArray[np.uint8], numbers: NDArray[np.int32], rows: NDArray[np.int32]) -> _Rows:
    starts = _starts(digests)
    order = np.argsort(starts, kind="stable")
    return starts[order], digests[order], numbers[order], rows[order]


def _starts(digests: bytes | NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(n,) the first eight bytes of each digest as a number."""
    rows = np.frombuffer(digests, np.uint8) if isinstance(digests, bytes) else digests
    starts = np.ascontiguousarray(rows.reshape(-1, DIGEST_BYTES)[:, :8])
    numbers: NDArray[np.uint64] = starts.view(np.uint64)[:, 0]
    return numbers
