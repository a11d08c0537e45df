"""A store of a million samples, and a rerun over a hundred thousand files.

The features of the large store are random numbers and there are no images to them; it is written
through the same writer as any other. The files are tiny but real, and are extracted once before
the rerun is measured, so they are in the system's cache. Every time is that of a fresh process.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _bench import ROOT, TLPIPE, print_header, print_table, spread
from PIL import Image

OPEN = """
import json, sys, time
from pipeline.store import open_store
times = {}
started = time.perf_counter()
store = open_store(sys.argv[1])
times["open"] = time.perf_counter() - started
ids, labels = store.ids(), store.labels()
times["ids"] = time.perf_counter() - started
assert len(ids) == len(labels) == int(sys.argv[2])
print(json.dumps(times))
"""

RERUN = """
import os, sys, time
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
import pipeline.backbones, pipeline.backbones.pixels, pipeline.commands.extract, pipeline.data
import pipeline.extract.extractor
from pipeline.commands import main
started = time.perf_counter()
sys.argv[0] = "tlpipe"
try:
    main()
finally:
    print(time.perf_counter() - started, file=sys.stderr)
"""


def write_store(folder: Path, n_samples: int, n_features: int) -> None:
    """A store of ``n_samples`` samples in a thousand classes with random features."""
    from pipeline.store.manifest import LayerInfo
    from pipeline.store.table import LabelColumn, LogEntry, SampleTable, Status
    from pipeline.store.writer import StoreWriter

    names = [f"class-{k:03d}" for k in range(1000)]
    ids = [f"{names[i % 1000]}/{i:07d}.jpg" for i in range(n_samples)]
    codes = np.arange(n_samples, dtype=np.int32) % 1000
    nowhere = np.full(n_samples, -1, np.int64)
    splits = np.where(codes % 5 == 0, 3, 1).astype(np.uint8)
    table = SampleTable.pending(
        ids, nowhere, nowhere.copy(), splits, {"label": LabelColumn(names, codes)}
    )
    rng = np.random.default_rng(0)
    layers = {"penultimate": LayerInfo((n_features,), "float16")}
    source = {"name": "synthetic", "spec": "synthetic", "root": "/nowhere", "layout": "classes",
              "split_origin": "made"}  # fmt: skip
    with StoreWriter(folder, {"schema": 1, "backbone": "none"}, layers, source) as writer:
        writer.begin(table)
        for sample_id in ids:
            digest = hashlib.sha256(sample_id.encode()).digest()
            features = rng.random((1, n_features), np.float32).astype(np.float16)
            writer.add(LogEntry(sample_id, Status.OK, digest, 1, 1), {"penultimate": features})
        writer.finish()


def write_files(folder: Path, n_files: int) -> None:
    """Tiny PNG files of ten classes, no two the same."""
    rng = np.random.default_rng(0)
    for k in range(10):
        (folder / f"class-{k}").mkdir(parents=True)
    for i in range(n_files):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
        (folder / f"class-{i % 10}" / f"{i:06d}.png").write_bytes(file.getvalue())


def seconds_of(action: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """A fresh process; its output."""
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done


def measure_store(folder: Path, n_samples: int, n_features: int, repeats: int) -> list[list[str]]:
    """Rows of the table about a store of ``n_samples`` samples."""
    store = str(folder / "cache" / "synthetic" / str(n_samples))
    writing = seconds_of(lambda: write_store(Path(store), n_samples, n_features))
    opening = [
        json.loads(run([sys.executable, "-c", OPEN, store, str(n_samples)]).stdout)
        for _ in range(repeats)
    ]
    inspecting = [seconds_of(lambda: run([*TLPIPE, "inspect", store])) for _ in range(repeats)]
    what = f"{n_samples:,} samples"
    return [
        [what, "written by StoreWriter", f"{writing:.2f}", ""],
        [what, "opened (after imports)", spread([one["open"] for one in opening]), "< 2"],
        [what, "opened, all ids and labels read", spread([one["ids"] for one in opening]), ""],
        [what, "tlpipe inspect", spread(inspecting), "< 1"],
    ]


def measure_rerun(folder: Path, n_files: int, repeats: int) -> list[list[str]]:
    """Rows of the table about a rerun over ``n_files`` files that are embedded already."""
    data = folder / f"files-{n_files}"
    write_files(data, n_files)
    words = ["extract", str(data), "--backbone", "pixels:4", "--cache", str(folder / "cache")]
    first = seconds_of(lambda: run([*TLPIPE, *words]))
    whole = [seconds_of(lambda: run([*TLPIPE, *words])) for _ in range(repeats)]
    inner = [
        float(run([sys.executable, "-c", RERUN, *words]).stderr.splitlines()[-1])
        for _ in range(repeats)
    ]
    what = f"{n_files:,} files"
    return [
        [what, "extracted with pixels:4", f"{first:.2f}", ""],
        [what, "tlpipe extract again", spread(whole), "< 5"],
        [what, "of it after imports", spread(inner), ""],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=64, help="values a sample")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        # A hundredth beside it shows what grows with the number, and what does not.
        for n_samples in (options.samples // 100, options.samples):
            rows += measure_store(folder, n_samples, options.features, options.repeats)
        for n_files in (options.files // 100, options.files):
            rows += measure_rerun(folder, n_files, options.repeats)
    print_header("Large stores, seconds: median (least–most)")
    print_table(["what", "measured", "seconds", "target"], rows)


if __name__ == "__main__":
    main()
