"""Single file operations that fail, of a run that does everything in a few hundred of them.

`faulty_io.c` strikes the n-th operation, for every n: so every place where a disk can fail is
tried, not only the likely ones. Whatever fails, a run ends with a message and an exit code that
says what kind of failure it was, loses nothing, leaves a store that verifies, and the next run ends
up bit-equal to one that nothing disturbed.
"""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import TlpipeError
from pipeline.store import open_store
from tests.soak import SOAK
from tests.soak._faults import Action, Calls, Fault, Struck
from tests.soak._photos import PIXELS, Photos, Reference, assert_bit_equal, extract_words
from tests.soak._runs import Ended, ForkServer
from tests.soak._watch import Watcher


@pytest.fixture
def rig(request, server, few, few_reference, tmp_path, capsys):
    """Runs with faults."""
    if not server.can_fail:
        pytest.skip("there is no C compiler to build faulty_io.c with")
    rig = Rig(server, few, few_reference, tmp_path)
    yield rig
    with capsys.disabled():
        print(f"\n{request.node.name} {rig}")


@dataclass
class Rig:
    """Runs `tlpipe extract` with faults, each time from the same beginning.

    Attributes:
        start: a cache that every run begins with a copy of; None for an empty one.
        outcomes: how often runs ended how: (operation that was struck, exit code).
    """

    server: ForkServer
    photos: Photos
    reference: Reference
    folder: Path
    start: Path | None = None
    outcomes: Counter[tuple[str, int]] = field(default_factory=Counter)
    n_acknowledged: int = 0

    def __str__(self) -> str:
        counts = [f"{name} {code}: {n}" for (name, code), n in sorted(self.outcomes.items())]
        return (
            f"{sum(self.outcomes.values())} faults, {self.n_acknowledged:,} rows acknowledged, "
            f"0 rows lost; operation struck and exit code: {', '.join(counts)}"
        )

    @property
    def cache(self) -> Path:
        """Where the runs write."""
        return self.folder / "cache"

    def begin_half_done(self) -> None:
        """Begin every run with what is left of one that was killed in the middle."""
        fault = self.fault(Calls.WRITES)
        self.run(fault)
        middle = fault.struck().n_calls // 2
        ended, _ = self.run(self.fault(Calls.WRITES, nth=middle, action=Action.KILL))
        assert ended.code < 0
        self.start = self.folder / "start"
        shutil.copytree(self.cache, self.start)

    def fault(
        self,
        classes: Calls,
        *,
        nth: int = 0,
        lasting: bool = False,
        probability: float = 0.0,
        seed: int = 0,
        action: Action = Action.FAIL,
        error_number: int = errno.EIO,
        prefix: Path | None = None,
    ) -> Fault:
        """A fault of the files below ``prefix``; of all that belongs to stores where it is None."""
        return Fault(
            report=self.folder / "report",
            prefix=prefix or self.cache,
            classes=classes,
            nth=nth,
            lasting=lasting,
            probability=probability,
            seed=seed,
            action=action,
            error_number=error_number,
        )

    def run(
        self, fault: Fault | None, *, max_open_files: int | None = None
    ) -> tuple[Ended, Watcher]:
        """One run from the beginning, every row a commit of its own; the store is verified."""
        shutil.rmtree(self.cache, ignore_errors=True)
        if self.start is None:
            self.cache.mkdir()
        else:
            shutil.copytree(self.start, self.cache)
        watcher = Watcher(self.cache / self.reference.place, self.reference)
        watcher.look()
        run = self.server.start(
            *self.words,
            cwd=self.folder,
            commit_seconds=0.0,
            max_open_files=max_open_files,
            fault=fault,
        )
        return watcher.watch_to_end(run), watcher

    @property
    def words(self) -> list[str]:
        """The command line."""
        return extract_words(self.photos.root, PIXELS, self.cache)

    def strike(self, fault: Fault, exit_codes: Iterable[int]) -> tuple[Ended, Struck]:
        """Run with a fault, and again without; check everything.

        Args:
            fault: what goes wrong.
            exit_codes: with which it may end where it did go wrong.
        """
        ended, watcher = self.run(fault)
        struck = fault.struck()
        what = f"{struck} -> exit code {ended.code}\n{ended.err}"
        assert "Traceback" not in ended.err, what
        assert "Exception ignored" not in ended.err, what
        assert ended.code in (exit_codes if struck.n_hits else (3,)), what
        if ended.code not in (3, -9):
            assert ended.err.count("Error: ") == 1, what
        self.outcomes[struck.operation, ended.code] += struck.n_hits > 0
        self.n_acknowledged += len(watcher.rows)
        resumed = self.server.start(*self.words, cwd=self.folder).wait()
        assert resumed.code == 3, f"{what}\nthen, without a fault:\n{resumed.err}"
        watcher.check()
        assert_bit_equal(open_store(watcher.folder), self.reference.store)
        return ended, struck

    def strike_each(self, exit_codes: Iterable[int], classes: Calls, **settings) -> None:
        """Strike the first such operation, the second…, until a run has no more of them."""
        nth, n_hits = 0, 1
        problems = []
        while n_hits:
            nth += 1
            fault = self.fault(classes, nth=nth, **settings)
            try:
                self.strike(fault, exit_codes)
            except (AssertionError, TlpipeError) as error:  # say of every place whether it fails
                problems.append(f"{fault.struck()}: {error}")
            n_hits = fault.struck().n_hits
        assert not problems, f"{len(problems)} of {nth} faults:\n\n" + "\n\n".join(problems)
        assert nth > 1, "nothing was struck"

    def strike_some(
        self, n_faults: int, exit_codes: Iterable[int], classes: Calls, **settings
    ) -> None:
        """Strike so many of those operations, evenly spread."""
        counting = self.fault(classes, **settings)
        self.run(counting)
        for nth in np.linspace(1, counting.struck().n_calls, n_faults).astype(int).tolist():
            self.strike(self.fault(classes, nth=nth, **settings), exit_codes)


def test_some_failing_writes(rig):
    rig.strike_some(5, (3, 5), Calls.WRITES, error_number=errno.EIO)
    rig.strike_some(4, (3, 5), Calls.WRITES, error_number=errno.ENOSPC, lasting=True)
    rig.strike_some(3, (3, 5), Calls.WRITES, error_number=errno.EDQUOT)


def test_some_kills_between_writes(rig):
    rig.strike_some(4, (-9,), Calls.WRITES, action=Action.KILL)
    rig.strike_some(2, (-9,), Calls.WRITE, action=Action.TEAR)


def test_some_failing_reads(rig):
    rig.begin_half_done()
    rig.strike_some(5, (3, 4, 5), Calls.READS)


def test_a_manifest_that_cannot_be_seen_for_a_moment_still_names_its_shards(rig):
    """A writer that took the store for a new one would sweep everything in it."""
    rig.begin_half_done()
    manifest = rig.cache / rig.reference.place / "store.json"
    rig.strike_each((3, 4, 5), Calls.STAT, prefix=manifest)


@pytest.mark.parametrize("call", [Calls.OPEN, Calls.READ], ids=lambda call: call.name)
def test_an_image_that_cannot_be_read_is_skipped_until_it_can(rig, call):
    counting = rig.fault(call, prefix=rig.photos.root)
    rig.run(counting)
    # Folders come first when they are listed, then each image in turn.
    nth = counting.struck().n_calls - 2
    ended, struck = rig.strike(rig.fault(call, nth=nth, prefix=rig.photos.root), (3,))
    sample_id = Path(struck.path).relative_to(rig.photos.root).as_posix()
    assert f"  {sample_id}: cannot be read (Input/output error)" in ended.err


@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_no_place_for_a_store(rig, error):
    """Better no store than one that two writers can write to; as on some network drives."""
    fault = rig.fault(Calls.LOCK, nth=1, lasting=True, error_number=getattr(errno, error))
    ended, struck = rig.strike(fault, (4,))
    assert struck.n_hits > 0
    assert "has no file locks" in ended.err
    assert "--cache" in ended.err


@pytest.mark.parametrize("limits", [(3, 6), pytest.param(range(2, 24), marks=SOAK)])
def test_a_low_limit_of_open_files(rig, limits):
    codes = set()
    for limit in limits:
        ended, watcher = rig.run(None, max_open_files=limit)
        assert ended.code in (3, 4, 5), ended.err
        assert "Traceback" not in ended.err, ended.err
        codes.add(ended.code)
        assert rig.server.start(*rig.words, cwd=rig.folder).wait().code == 3
        watcher.check()
        assert_bit_equal(open_store(watcher.folder), rig.reference.store)
    assert len(codes) > 1, "none of these limits was low, or all were"


@pytest.mark.parametrize("half_done", [False, True], ids=["new store", "half done"])
class TestEach:
    pytestmark = SOAK

    @pytest.fixture(autouse=True)
    def begin(self, rig, half_done):
        if half_done:
            rig.begin_half_done()

    def test_failing_write(self, rig):
        rig.strike_each((3, 5), Calls.WRITES, error_number=errno.EIO)

    def test_full_disk(self, rig):
        rig.strike_each((3, 5), Calls.WRITES, error_number=errno.ENOSPC, lasting=True)

    def test_short_write(self, rig):
        rig.strike_each((3,), Calls.WRITE, action=Action.SHORT)
        rig.strike(rig.fault(Calls.WRITE, nth=1, lasting=True, action=Action.SHORT), (3,))

    def test_kill_between_writes(self, rig):
        rig.strike_each((-9,), Calls.WRITES, action=Action.KILL)

    def test_kill_within_a_write(self, rig):
        rig.strike_each((-9,), Calls.WRITE, action=Action.TEAR)

    def test_failing_read(self, rig):
        rig.strike_each((3, 4, 5), Calls.READS, error_number=errno.EIO)

    def test_failing_disk(self, rig):
        rig.strike_each((3, 4, 5), Calls.READS, error_number=errno.EIO, lasting=True)

    def test_forbidden_read(self, rig):
        rig.strike_each((3, 4, 5), Calls.READS, error_number=errno.EACCES)

    def test_short_read(self, rig):
        rig.strike_each((3, 4, 5), Calls.READ, action=Action.SHORT)
        rig.strike(rig.fault(Calls.READ, nth=1, lasting=True, action=Action.SHORT), (3,))

    def test_anything_at_random(self, rig):
        for seed in range(150):
            probability = (0.003, 0.02, 0.2)[seed % 3]
            calls = Calls.WRITES | Calls.READS
            rig.strike(rig.fault(calls, seed=seed, probability=probability), (3, 4, 5))
