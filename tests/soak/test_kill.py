"""`tlpipe extract`, killed with SIGKILL at random instants and resumed, loses nothing.

A reader looks at the store through every run. What it saw counts as acknowledged: after each kill
the store must open and verify, and hold all of it. Once a run gets to its end, the store must be
bit-equal to one that was made without a disturbance; then images come, go and change, or a new
store is begun, and the killing goes on.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pipeline.store import open_store
from tests.soak import SOAK
from tests.soak._photos import (
    NETWORK,
    PIXELS,
    Photos,
    Reference,
    assert_bit_equal,
    extract_words,
    make_photos,
    make_reference,
    noise,
)
from tests.soak._runs import HANG_SECONDS, ROOT, ForkServer
from tests.soak._watch import LOOK_SECONDS, Watcher

COMMIT_SECONDS = (0.02, 0.05, 0.1)


@dataclass
class Tally:
    """What a soak has been through."""

    rounds: int = 0
    n_acknowledged: int = 0
    n_lost: int = 0
    n_grown: int = 0
    n_looks: int = 0
    n_finished: int = 0

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds ({self.n_grown} of them acknowledged rows before the kill), "
            f"{self.n_finished} data sets finished, {self.n_looks:,} looks by a reader; "
            f"{self.n_acknowledged:,} rows acknowledged, {self.n_lost} rows lost"
        )


@dataclass(frozen=True)
class Kill:
    """When to kill: so many seconds after a reader has seen so many rows."""

    after_rows: int
    seconds: float


@dataclass
class Soak:
    """A data set that changes now and then, and stores of it that are killed all the time."""

    server: ForkServer
    folder: Path
    backbone: tuple[str, ...]
    photos: Photos
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    tally: Tally = field(default_factory=Tally)
    n_fresh_processes: int = 0
    _n_caches: int = 0

    def run(self, rounds: int) -> Tally:
        """Kill ``rounds`` times; the last store is finished, too."""
        cache, watcher = self._new_cache(), None
        while self.tally.rounds < rounds:
            reference = make_reference(self.server, self.photos, self.backbone, self._new_cache())
            if watcher is None:
                watcher = Watcher(cache / reference.place)
            watcher.learn(reference)
            self._kill_until_finished(cache, watcher, reference, rounds)
            if self.rng.random() < 0.4:
                cache, watcher = self._new_cache(), None
            self._change()
        return self.tally

    def _kill_until_finished(
        self, cache: Path, watcher: Watcher, reference: Reference, rounds: int
    ) -> None:
        words = extract_words(self.photos.root, self.backbone, cache)
        was_seen = set(watcher.rows)
        is_finished = False
        while not is_finished and self.tally.rounds < rounds:
            n_before, n_looks = len(watcher.rows), watcher.n_looks
            kill = self._choose_kill(len(watcher.rows), reference)
            if self.tally.rounds < self.n_fresh_processes:
                code = self._run_fresh(words, watcher, kill)
            else:
                code = self._run_forked(words, watcher, kill)
            self.tally.n_looks += watcher.n_looks - n_looks
            watcher.check()
            is_finished = code != -signal.SIGKILL
            if is_finished:
                assert code == (3 if self.photos.broken else 0)
            else:
                self.tally.rounds += 1
                self.tally.n_grown += len(watcher.rows) > n_before
        if not is_finished:
            ended = self.server.start(*words, cwd=self.folder).wait()
            assert ended.code == (3 if self.photos.broken else 0), ended.err
        assert_bit_equal(open_store(watcher.folder), reference.store)
        self.tally.n_finished += 1
        self.tally.n_acknowledged += len(watcher.rows.keys() - was_seen)
        self.tally.n_lost += len(watcher.rows.keys() - reference.digests.keys())

    def _choose_kill(self, n_rows: int, reference: Reference) -> Kill:
        """Half of the kills come at any time, half when rows have been acknowledged."""
        if self.rng.random() < 0.5:
            return Kill(0, float(self.rng.uniform(0, 0.8 * reference.seconds)))
        n_left = len(reference.digests) - n_rows
        after_rows = n_rows + 1 + int(n_left * self.rng.uniform(0, 0.3))
        return Kill(after_rows, float(self.rng.uniform(0, 0.02)))

    def _run_forked(self, words: list[str], watcher: Watcher, kill: Kill) -> int:
        """Look at the store until a run ends or is killed; its exit code."""
        commit_seconds = float(self.rng.choice(COMMIT_SECONDS))
        run = self.server.start(*words, cwd=self.folder, commit_seconds=commit_seconds)
        if kill.after_rows:
            watcher.watch(run, until_rows=kill.after_rows)
        timer = threading.Timer(kill.seconds, run.signal, [signal.SIGKILL])
        timer.start()
        try:
            ended = watcher.watch(run)
        finally:
            timer.cancel()
            timer.join()
        assert ended is not None
        return ended.code

    def _run_fresh(self, words: list[str], watcher: Watcher, kill: Kill) -> int:
        """The same with a process of its own, killed only once it has begun to embed."""
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), *words],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        with process.stderr:
            while "to do" not in (line := process.stderr.readline()) and line:
                pass
            deadline = time.monotonic() + kill.seconds
            while process.poll() is None and time.monotonic() < deadline:
                watcher.look()
                time.sleep(LOOK_SECONDS)
            process.kill()
            return process.wait(HANG_SECONDS)

    def _change(self) -> None:
        """A tenth of the images each is removed, changed, broken or new."""
        ids = self.rng.permutation(np.array(self.photos.ids, object)).tolist()
        n = len(ids) // 10
        for sample_id in ids[:n]:
            self.photos = self.photos.minus(sample_id)
        for sample_id in ids[n : 2 * n]:
            self.photos = self.photos.plus(sample_id, noise(self.rng))
        self.photos = self.photos.plus(ids[2 * n], b"no image any more", is_broken=True)
        for _ in range(n):
            sample_id = f"cat/new-{self.rng.integers(1 << 40)}.png"
            self.photos = self.photos.plus(sample_id, noise(self.rng))

    def _new_cache(self) -> Path:
        self._n_caches += 1
        folder = self.folder / str(self._n_caches) / "cache"
        folder.mkdir(parents=True)
        return folder


@pytest.fixture
def soak(server, tmp_path, capsys):
    """Kill runs with a backbone so many times, and print what came of it."""

    def run(
        name: str, backbone: tuple[str, ...], n_images: int, rounds: int, n_fresh_processes: int = 0
    ) -> None:
        photos = make_photos(tmp_path / "photos", n_images)
        soak = Soak(server, tmp_path, backbone, photos, n_fresh_processes=n_fresh_processes)
        tally = soak.run(rounds)
        with capsys.disabled():
            print(f"\nSIGKILL, {name}: {tally}")
        assert tally.rounds == rounds
        assert tally.n_lost == 0
        assert tally.n_acknowledged > 0
        assert tally.n_grown >= rounds // 10, "the kills came too early to mean anything"

    return run


@pytest.mark.parametrize(
    ("n_images", "rounds"), [(150, 25), pytest.param(1000, 250, marks=SOAK)], ids=["25", "250"]
)
def test_killed_without_a_network(soak, n_images, rounds):
    soak("raw pixels", PIXELS, n_images, rounds)


@pytest.mark.parametrize(
    ("n_images", "rounds", "n_fresh_processes"),
    [(40, 5, 0), pytest.param(300, 60, 10, marks=SOAK)],
    ids=["5", "60"],
)
def test_killed_with_a_network(soak, n_images, rounds, n_fresh_processes):
    name = f"a network, {n_fresh_processes} rounds in fresh processes"
    soak(name, NETWORK, n_images, rounds, n_fresh_processes)
