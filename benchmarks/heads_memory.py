"""`tlpipe fit-head --memory-limit` on a store several times as large: peak memory, time, optimum.

The store is made of random features: a centre for each class, and noise whose axes differ a
hundredfold in variance. Each fit is a process of its own; its peak is what the system reports of
it. The optimum is compared on a store small enough to be fitted in memory as well.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from _bench import TLPIPE, checked, print_header, print_table, run

SETTINGS = {"logreg": "C=1e-4,1e-3,1e-2,1e-1,1,10", "ridge": "alpha=1e5,1e4,1e3,1e2,10,1"}


def make_features(first: int, n: int, n_features: int, n_classes: int) -> Any:
    """(n, n_features) float16 of samples ``first`` to ``first + n``; the class is i % n_classes."""
    import numpy as np

    fixed = np.random.default_rng(0)
    centres = fixed.normal(size=(n_classes, n_features)).astype(np.float32)
    loud = np.geomspace(10, 0.1, n_features).astype(np.float32)
    rng = np.random.default_rng([1, first])
    noise = rng.standard_normal((n, n_features), np.float32) * loud
    # Neighbouring features go together, as those of a network do.
    noise[:, 1:] += 0.7 * noise[:, :-1]
    codes = np.arange(first, first + n) % n_classes
    return (1 + 0.02 * centres[codes] + noise).astype(np.float16)


def write_store(folder: Path, n_samples: int, n_features: int, n_classes: int) -> None:
    """A store with a fifth of the samples to test."""
    import numpy as np

    from pipeline.store.manifest import LayerInfo
    from pipeline.store.table import LabelColumn, LogEntry, SampleTable, Status
    from pipeline.store.writer import StoreWriter

    names = [f"class-{k:04d}" for k in range(n_classes)]
    codes = np.arange(n_samples, dtype=np.int32) % n_classes
    ids = [f"{names[code]}/{i:07d}.jpg" for i, code in enumerate(codes.tolist())]
    nowhere = np.full(n_samples, -1, np.int64)
    splits = np.where(np.arange(n_samples) // n_classes % 5 == 4, 3, 1).astype(np.uint8)
    table = SampleTable.pending(
        ids, nowhere, nowhere.copy(), splits, {"label": LabelColumn(names, codes)}
    )
    layers = {"penultimate": LayerInfo((n_features,), "float16")}
    source = {"name": "synthetic", "spec": "synthetic", "root": "/nowhere", "layout": "classes",
              "split_origin": "given"}  # fmt: skip
    with StoreWriter(folder, {"schema": 1, "backbone": "none"}, layers, source) as writer:
        writer.begin(table)
        for start in range(0, n_samples, 8192):
            block = make_features(start, min(8192, n_samples - start), n_features, n_classes)
            for i, row in enumerate(block, start):
                digest = hashlib.sha256(ids[i].encode()).digest()
                writer.add(LogEntry(ids[i], Status.OK, digest, 1, 1), {"penultimate": row[None]})
        writer.finish()


def in_child(function: str, *words: object) -> str:
    """What a function of this file prints, in a process of its own: this one must stay small."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import heads_memory; "
    call = f"heads_memory.{function}({', '.join(map(repr, words))})"
    return checked(run([sys.executable, "-c", code + call])).output


def make(folder: str, n_samples: int, n_features: int, n_classes: int) -> None:
    write_store(Path(folder), n_samples, n_features, n_classes)


def compare(folder: str) -> None:
    """Print head, setting and the relative difference of the objectives."""
    import numpy as np

    from pipeline.heads import make_head
    from pipeline.heads.streaming.fit import MemoryPlan, StreamedFit
    from pipeline.sweep.prepare import plan
    from pipeline.sweep.stream import _parts

    data = plan(folder)
    parts = _parts(data)
    for name, parameter, values in (
        ("logreg", "C", [1e-4, 1e-2, 1.0]),
        ("ridge", "alpha", [1e4, 1e2, 1.0]),
    ):
        settings = [{parameter: value} for value in values]
        if name == "logreg":
            settings = [setting | {"max_iter": 100} for setting in settings]
        sizes = (data.inputs.features.shape[1], len(data.known), parts.n_parts, len(values))
        memory = MemoryPlan.of(name, *sizes, 4e8)
        fit = StreamedFit(
            name, data.inputs.features, parts, "standardise", data.inputs.widths, settings, memory
        )
        scaler = fit.scaler(range(parts.n_parts))
        X = scaler(data.inputs.X[data.protocol.refit])
        y = data.codes[data.protocol.refit]
        for found in fit.fit(range(len(values)), [0], scaler):
            held = make_head(name, **settings[found.setting]).fit(X, y)
            streamed, expected = (
                objective(name, head, X.astype(np.float64), y) for head in (found.head, held)
            )
            setting = f"{parameter}={values[found.setting]:g}"
            print(f"{name}|{setting}|{streamed / expected - 1:+.1e}|{found.head.converged_}")


def objective(name: str, head: Any, X: Any, y: Any) -> float:
    """What the head minimises, in float64."""
    import numpy as np
    from scipy.special import logsumexp

    coef, intercept = head.coef_.astype(np.float64), head.intercept_.astype(np.float64)
    scores = X @ coef.T + intercept
    if name == "ridge":
        targets = np.where(y[:, None] == np.arange(scores.shape[1]), 1.0, -1.0)
        return float(np.square(scores - targets).sum() + head.alpha * np.square(coef).sum())
    losses = logsumexp(scores, axis=1) - scores[np.arange(len(y)), y]
    return float(head.C * losses.sum() + 0.5 * np.square(coef).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=2048, help="values a sample")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--limit", type=float, default=1.0, help="memory limit, GB")
    parser.add_argument("--heads", default="ridge,logreg")
    parser.add_argument("--small", type=int, default=10_000, help="samples of the small store")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        small, large = str(Path(name) / "small"), str(Path(name) / "large")
        in_child("make", small, options.small, options.features, options.classes)
        in_child("make", large, options.samples, options.features, options.classes)
        size = 2e-9 * options.samples * options.features
        print_header(
            f"Heads on {options.samples:,} x {options.features:,} float16 features, {size:.2f} GB, "
            f"{size / options.limit:.1f} times the limit of {options.limit:g} GB"
        )
        rows = []
        for head in options.heads.split(","):
            done = checked(
                run(
                    [*TLPIPE, "fit-head", large, "--head", head, "--param", SETTINGS[head],
                     "--memory-limit", f"{options.limit}GB", "--json", "--out", name]
                )
            )  # fmt: skip
            document = done.document
            note = next(note for note in document["notes"] if "streamed" in note)
            rows.append(
                [
                    head,
                    f"{done.peak_megabytes / 1e3:.2f}",
                    "yes" if done.peak_megabytes / 1e3 < options.limit else "NO",
                    f"{done.seconds:.0f}",
                    note.split(" in ")[1].split(" over")[0],
                    f"{document['metrics']['test']['top1']['value']:.4f}",
                ]
            )
        print_table(["head", "peak, GB", "under", "seconds", "read in", "top-1"], rows)
        print(f"\nObjective against the fit in memory, {options.small:,} samples (relative):")
        print_table(
            ["head", "setting", "difference", "converged"],
            [line.split("|") for line in in_child("compare", small).splitlines()],
        )


if __name__ == "__main__":
    main()
