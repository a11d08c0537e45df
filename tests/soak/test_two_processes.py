"""Several processes on one store: one writer at a time, and any number of readers."""

from __future__ import annotations

import re
import signal
import socket
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.store import open_store
from tests.soak import SOAK
from tests.soak._photos import PIXELS, assert_bit_equal, extract_words
from tests.soak._watch import Watcher


@pytest.fixture
def words(photos, tmp_path):
    return extract_words(photos.root, PIXELS, tmp_path / "cache")


@pytest.fixture
def watcher(reference, tmp_path):
    return Watcher(tmp_path / "cache" / reference.place, reference)


@pytest.fixture
def held(server, words, watcher, tmp_path):
    """A run in the middle of its work, made to stand still there."""
    run = server.start(*words, cwd=tmp_path, commit_seconds=0.02)
    assert watcher.watch(run, until_rows=1) is None
    run.signal(signal.SIGSTOP)
    yield run
    run.kill()


def test_the_second_writer_names_the_first_and_leaves_it_alone(
    server, words, watcher, held, reference, tmp_path
):
    second = server.start(*words, cwd=tmp_path).wait()
    assert second.code == 6
    assert second.err.count("Error: ") == 1
    (found,) = re.findall(r"process (\d+) on (\S+) since (\S+)\.", second.err)
    assert found[:2] == (str(held.pid), socket.gethostname())
    age = datetime.now(UTC) - datetime.fromisoformat(found[2])
    assert timedelta(seconds=-1) < age < timedelta(minutes=5)
    watcher.check()

    held.signal(signal.SIGCONT)
    assert watcher.watch_to_end(held).code == 3
    assert_bit_equal(open_store(watcher.folder), reference.store)


def test_the_lock_of_a_killed_holder_is_free(server, words, watcher, held, reference, tmp_path):
    held.kill()
    ended = watcher.watch_to_end(server.start(*words, cwd=tmp_path))
    assert ended.code == 3, ended.err
    assert_bit_equal(open_store(watcher.folder), reference.store)


def test_a_reader_never_waits_for_a_writer(watcher, held):
    n_looks = watcher.n_looks
    for _ in range(5):
        watcher.check()
    assert watcher.n_looks == n_looks + 5


def test_a_reader_sees_the_store_grow_and_never_shrink(server, words, watcher, tmp_path):
    """That each row is the right one, and that none goes, the watcher checks at every look."""
    run = server.start(*words, cwd=tmp_path, commit_seconds=0.01)
    sizes = []
    while (ended := run.poll()) is None:
        sizes.append(watcher.look())
    assert ended.code == 3
    watcher.check()
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3


@pytest.mark.parametrize("rounds", [2, pytest.param(60, marks=SOAK)])
def test_two_that_start_together(server, words, watcher, reference, tmp_path, rounds):
    """Also on a new store, where both find nothing at first."""
    for k in range(rounds):
        cache = tmp_path / str(k) / "cache"
        mine = [str(cache) if word == str(tmp_path / "cache") else word for word in words]
        watcher = Watcher(cache / reference.place, reference)
        runs = [server.start(*mine, cwd=tmp_path, commit_seconds=0.1) for _ in range(2)]
        ended = [watcher.watch_to_end(run) for run in runs]
        assert {one.code for one in ended} <= {3, 6}, [one.err for one in ended]
        assert 3 in {one.code for one in ended}
        assert not any("Traceback" in one.err for one in ended)
        assert_bit_equal(open_store(watcher.folder), reference.store)
