"""Power that fails at any moment: what was committed is on the disk, and the rest does no harm.

A kill leaves everything that a process has written; a power loss takes back what was not fsynced.
One run is traced; for many moments in it, and several guesses at what the file system had kept
back until then, the disk is made as it would be found, and the next run has to go on from there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import TlpipeError
from pipeline.store import open_store
from tests.soak import SOAK
from tests.soak._faults import Action, Calls, Fault
from tests.soak._photos import PIXELS, Reference, assert_bit_equal, extract_words
from tests.soak._power import Call, Disk, read_trace
from tests.soak._watch import Watcher

KEPT = (0.0, 1.0, 0.5)
"""Nothing that was not fsynced, all of it, or any half of it."""


@pytest.fixture
def trace(server, few, tmp_path) -> list[Call]:
    """Every call of a run that commits each row by itself."""
    if not server.can_fail:
        pytest.skip("there is no C compiler to build faulty_io.c with")
    cache = tmp_path / "cache"
    cache.mkdir()
    fault = Fault(tmp_path / "report", cache, Calls.WRITES, action=Action.TRACE)
    words = extract_words(few.root, PIXELS, cache)
    ended = server.start(*words, cwd=tmp_path, commit_seconds=0.0, fault=fault).wait()
    assert ended.code == 3, ended.err
    calls = read_trace(fault)
    assert {call.operation for call in calls} >= {"create", "write", "fsync", "rename", "mkdir"}
    return calls


def starts_a_shard(call: Call) -> bool:
    """The writer has gone on: what it committed before, it relies on."""
    return call.operation == "create" and call.path.parent.name == "shards"


@pytest.mark.parametrize("step", [70, pytest.param(1, marks=SOAK)])
def test_power_fails_at_any_moment(server, few, few_reference, tmp_path, trace, step, capsys):
    rng = np.random.default_rng(0)
    cache = tmp_path / "cache"
    store = cache / few_reference.place
    words = extract_words(few.root, PIXELS, cache)
    disk = Disk(cache)
    acknowledged: dict[str, str] = {}
    n_losses = 0
    problems = []
    for call in trace:
        if starts_a_shard(call):
            acknowledged = rows_seen_in(disk, store, few_reference, rng)
        disk.apply(call)
        if call.number % step:
            continue
        for keep in KEPT:
            shutil.rmtree(cache)
            disk.after_power_loss(cache, keep, rng)
            watcher = Watcher(store, few_reference)
            watcher.rows = dict(acknowledged)
            n_losses += 1
            try:
                watcher.check()
                ended = server.start(*words, cwd=tmp_path).wait()
                assert ended.code == 3, ended.err
                watcher.check()
                assert_bit_equal(open_store(store), few_reference.store)
            except (AssertionError, TlpipeError) as error:
                problems.append(f"after {call}, with {keep} of the rest kept: {error}")
    with capsys.disabled():
        print(f"\nPower losses: {n_losses}, {len(problems)} of them with a problem")
    assert not problems, "\n\n".join(problems)
    assert len(acknowledged) > 3


def rows_seen_in(
    disk: Disk, store: Path, reference: Reference, rng: np.random.Generator
) -> dict[str, str]:
    """What a reader sees in the store now, with the power on: digest by id."""
    shutil.rmtree(disk.root)
    disk.after_power_loss(disk.root, 1.0, rng)
    watcher = Watcher(store, reference)
    watcher.look()
    return watcher.rows
