"""The index of rows finds what was put in, in few bytes a row."""

import hashlib
import tracemalloc

import numpy as np

from pipeline.store import row_index
from pipeline.store.row_index import RowIndex


def digests_of(start, stop):
    return [hashlib.sha256(str(i).encode()).digest() for i in range(start, stop)]


def array_of(digests):
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def test_rows_of_all_shards_and_those_added_are_found(monkeypatch):
    monkeypatch.setattr(row_index, "_MAX_RECENT", 7)
    index = RowIndex([(1, array_of(digests_of(0, 50))), (4, array_of(digests_of(50, 60)))])
    for i, digest in enumerate(digests_of(60, 90)):
        index.add(digest, (5, i))
    places = [index.find(digest) for digest in digests_of(0, 90)]
    assert places == [
        *((1, i) for i in range(50)), *((4, i) for i in range(10)), *((5, i) for i in range(30))
    ]  # fmt: skip
    assert [index.find(digest) for digest in digests_of(90, 95)] == [None] * 5


def test_digests_that_begin_alike_are_told_apart():
    alike = [bytes(31) + bytes([i]) for i in (3, 1, 2)]
    index = RowIndex([(1, array_of(alike))])
    assert [index.find(digest) for digest in alike] == [(1, 0), (1, 1), (1, 2)]
    assert index.find(bytes(32)) is None


def test_the_last_row_of_a_digest_counts():
    (digest,) = digests_of(0, 1)
    index = RowIndex([(1, array_of([digest])), (2, array_of([digest]))])
    assert index.find(digest) == (2, 0)
    index.add(digest, (3, 7))
    assert index.find(digest) == (3, 7)


def test_an_empty_index_finds_nothing():
    index = RowIndex([])
    assert index.find(bytes(32)) is None
    assert index.find(b"") is None


def test_memory_is_that_of_the_digests():
    digests = array_of(digests_of(0, 20_000))
    tracemalloc.start()
    index = RowIndex([(1, digests)])
    size_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.find(digests[5].tobytes()) == (1, 5)
    assert size_bytes < 60 * len(digests)
