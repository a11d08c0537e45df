"""A writer killed with SIGKILL at any instant loses nothing that it acknowledged."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pipeline.store import open_store

from .conftest import entry_of, features_of, make_writer, table_of

ROOT = Path(__file__).parents[2]
N_SAMPLES = 400

WRITER = f"""
import sys
from pathlib import Path
from tests.store.conftest import entry_of, features_of, make_writer, table_of

ids = [f"a/{{i:04d}}" for i in range({N_SAMPLES})]
with make_writer(Path(sys.argv[1]), shard_rows=3) as writer:
    known = writer.table if writer.table is not None else table_of(ids)
    writer.begin(known)
    todo = [i for i, status in zip(ids, known.statuses.tolist(), strict=True) if status != 1]
    print("ready", flush=True)
    for k, sample_id in enumerate(todo, start=1):
        writer.add(entry_of(sample_id), features_of(sample_id))
        if k % 3 == 0:
            print(sample_id, flush=True)
    writer.finish()
    print("finished", flush=True)
"""


def run_until_killed(folder: Path, seconds: float) -> list[str]:
    """Start a writer, kill it ``seconds`` after it is ready; what it printed since."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.kill()
    printed, _ = process.communicate()
    return printed.splitlines()


def test_nothing_acknowledged_is_lost(tmp_path):
    folder = tmp_path / "store"
    ids = [f"a/{i:04d}" for i in range(N_SAMPLES)]
    rng = random.Random(0)
    acknowledged: set[str] = set()
    rounds = 0
    while rounds < 30:
        rounds += 1
        printed = run_until_killed(folder, rng.uniform(0, 0.2))
        if "finished" in printed:
            break
        acknowledged |= set(printed)
        store = open_store(folder)
        assert acknowledged <= set(store.ids())
        np.asarray(store.features())
    assert rounds > 3, "the writer has to be killed a few times for this to mean anything"
    with make_writer(folder) as writer:  # the lock of the killed writer is free
        writer.begin(writer.table)
        missing = [i for i, ok in zip(ids, writer.table.statuses.tolist(), strict=True) if ok != 1]
        for sample_id in missing:
            writer.add(entry_of(sample_id), features_of(sample_id))
        writer.finish()
    with make_writer(tmp_path / "whole") as writer:
        writer.begin(table_of(ids))
        for sample_id in ids:
            writer.add(entry_of(sample_id), features_of(sample_id))
        writer.finish()
    resumed, whole = open_store(folder), open_store(tmp_path / "whole")
    assert resumed.ids() == whole.ids() == ids
    assert np.asarray(resumed.features()).tobytes() == np.asarray(whole.features()).tobytes()
    print(f"{rounds} rounds, {len(acknowledged)} acknowledged, 0 lost")
