"""A disk that fills up at any moment: exit 5, one clear message, nothing lost, resumes."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline.store import open_store
from tests.soak import SOAK
from tests.soak._photos import PIXELS, assert_bit_equal, extract_words
from tests.soak._runs import Ended, ForkServer
from tests.soak._watch import Watcher

TMPFS_BYTES = 1_000_000


def assert_says_what_is_wrong(ended: Ended, *codes: int) -> None:
    """One message, no traceback, and one of these exit codes if it is a failure."""
    assert "Traceback" not in ended.err, ended.err
    if ended.code not in (0, 3):
        assert ended.code in codes, ended.err
        assert ended.err.count("Error: ") == 1, ended.err


@pytest.mark.parametrize("rounds", [12, pytest.param(300, marks=SOAK)])
def test_no_file_can_grow_any_more(server, photos, reference, tmp_path, rounds, capsys):
    """RLIMIT_FSIZE: writes fail with EFBIG at a random number of bytes."""
    rng = np.random.default_rng(0)
    files = reference.store.path.rglob("*")
    largest = max(path.stat().st_size for path in files if path.is_file())
    n_full = n_acknowledged = 0
    for k in range(rounds):
        folder = tmp_path / str(k)
        folder.mkdir()
        words = extract_words(photos.root, PIXELS, folder)
        watcher = Watcher(folder / reference.place, reference)
        # Small limits are met by store.json and the lock, large ones by the features.
        limit = int(math.exp(rng.uniform(0, math.log(largest)))) - 1
        seconds = float(rng.choice([0.02, 0.1, 3600]))
        run = server.start(*words, cwd=folder, max_file_bytes=limit, commit_seconds=seconds)
        ended = watcher.watch_to_end(run)
        assert_says_what_is_wrong(ended, 5)
        if ended.code == 5:
            n_full += 1
            assert "No room to write" in ended.err
            assert "run the same command again" in ended.err
        n_acknowledged += len(watcher.rows)
        assert server.start(*words, cwd=folder).wait().code == 3
        watcher.check()
        assert_bit_equal(open_store(watcher.folder), reference.store)
        shutil.rmtree(folder)
    with capsys.disabled():
        print(
            f"\nFile size limits: {rounds} rounds, {n_full} of them ran out; "
            f"{n_acknowledged:,} rows acknowledged, 0 rows lost"
        )
    assert n_full > rounds / 2


@pytest.fixture
def small_disk(shim, tmp_path):
    """A fork server that has a small file system of its own, and where to see it from here."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size={TMPFS_BYTES} tmpfs "{disk}"'
    own_namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*own_namespace, "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a file system cannot be mounted here, not even in a namespace of its own")
    with ForkServer(shim, [*own_namespace, "sh", "-c", f'{mount} && exec "$@"', "sh"]) as server:
        yield server, disk, Path(f"/proc/{server.pid}/root{disk}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_small_disk_fills_up(small_disk, photos, reference, capsys):
    """ENOSPC from a real file system; a file that takes the room shrinks bit by bit."""
    server, disk, seen_disk = small_disk
    rng = np.random.default_rng(0)
    n_full = n_acknowledged = 0
    for k in range(20):
        words = extract_words(photos.root, PIXELS, disk / str(k))
        watcher = Watcher(seen_disk / str(k) / reference.place, reference)
        for n_free in [*sorted(rng.integers(0, 300_000, size=5).tolist()), TMPFS_BYTES]:
            leave_free(seen_disk, n_free)
            seconds = float(rng.choice([0.02, 0.1, 3600]))
            run = server.start(*words, cwd=disk, commit_seconds=seconds)
            ended = watcher.watch_to_end(run)
            assert_says_what_is_wrong(ended, 5)
            n_full += ended.code == 5
        assert ended.code == 3
        n_acknowledged += len(watcher.rows)
        assert_bit_equal(open_store(watcher.folder), reference.store)
        shutil.rmtree(seen_disk / str(k))
    with capsys.disabled():
        print(
            f"\nSmall disk: {n_full} runs ran out of room; "
            f"{n_acknowledged:,} rows acknowledged, 0 rows lost"
        )
    assert n_full > 20


def leave_free(disk: Path, n_free: int) -> None:
    """Fill a disk with one file until about so many bytes are free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    n_bytes = max(0, shutil.disk_usage(disk).free - n_free)
    filler.write_bytes(bytes(n_bytes))
