"""Networks and nearest neighbours for a whole sweep, beside scikit-learn one setting at a time.

Both sides take turns in one run, on the same features (standardised, float32). scikit-learn's total
is estimated from some of its settings. Features: four files X_train.npy, y_train.npy, X_test.npy
and y_test.npy in a folder, or without one the pixels of scikit-learn's digits, made wide by random
ReLU features.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _bench import print_header, print_table, spread
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier

from pipeline.heads.neighbours import METRICS, VoteSetting, search, vote
from pipeline.heads.solvers.mlp import MlpSetting, Training, fit_mlps, mlp_logits

Array = NDArray[Any]
WIDTHS = (32, 64, 128, 256)
BATCH_SIZE = 200  # scikit-learn's own
KS = (1, 2, 3, 5, 8, 10, 15, 20, 50, 100)


def load_features(folder: Path | None, n_train: int, n_test: int) -> tuple[Array, ...]:
    """X, y, X_test, y_test; a seeded part of the samples, standardised by the training part."""
    rng = np.random.default_rng(0)
    if folder is None:
        pixels, labels = load_digits(return_X_y=True)
        X = np.maximum(pixels / 16 @ rng.normal(size=(64, 1280)), 0)
        order = rng.permutation(len(X))
        parts = [order[:1200], order[1200:]]
        (X_train, y_train), (X_test, y_test) = ((X[rows], labels[rows]) for rows in parts)
    else:
        arrays = [np.load(folder / f"{kind}_{part}.npy", mmap_mode="r")
                  for part in ("train", "test") for kind in "Xy"]  # fmt: skip
        X_train, y_train, X_test, y_test = arrays
    train = np.sort(rng.permutation(len(X_train))[:n_train])
    test = np.sort(rng.permutation(len(X_test))[:n_test])
    X_train, X_test = X_train[train], X_test[test]
    mean, scale = X_train.mean(axis=0), X_train.std(axis=0)
    scale[scale <= 1e-6 * np.abs(mean)] = 1
    scaled = [((X - mean) / scale).astype(np.float32) for X in (X_train, X_test)]
    return (
        scaled[0], y_train[train].astype(np.int64), scaled[1], y_test[test].astype(np.int64)
    )  # fmt: skip


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, its seconds, and the processor seconds of all its threads."""
    started, started_cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - started, time.process_time() - started_cpu


def measure_mlps(
    data: tuple[Array, ...], n_epochs: int, n_members: int, n_theirs: int, repeats: int
) -> list[list[str]]:
    """Rows of the table: each precision against MLPClassifier."""
    X, y, X_test, y_test = data
    members = [
        MlpSetting((WIDTHS[i % len(WIDTHS)],), weight_decay=0.0, seed=i) for i in range(n_members)
    ]
    sampled = members[:n_theirs]  # every width as often as among all

    def theirs() -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return [
                MLPClassifier(
                    setting.hidden, alpha=0, batch_size=BATCH_SIZE, max_iter=n_epochs, tol=0,
                    n_iter_no_change=n_epochs, random_state=setting.seed,
                ).fit(X, y).score(X_test, y_test)
                for setting in sampled
            ]  # fmt: skip

    rows = []
    for precision in ("auto", "float32"):
        training = Training(n_epochs=n_epochs, batch_size=BATCH_SIZE, precision=precision)
        seconds, ratios, cpu_ratios, ours, other = [], [], [], [], []
        for _ in range(repeats):
            models, wall, cpu = timed(
                lambda training=training: fit_mlps(
                    X, y, members, n_classes=int(y.max()) + 1, training=training
                )
            )
            accuracies, their_wall, their_cpu = timed(theirs)
            seconds.append(wall)
            ratios.append(their_wall * n_members / n_theirs / wall)
            cpu_ratios.append(their_cpu * n_members / n_theirs / cpu)
            ours = list((mlp_logits(models, X_test).argmax(axis=2) == y_test).mean(axis=1))
            other = accuracies
        name = str(training.dtype).removeprefix("torch.")
        rows.append([
            f"{n_members} MLPs, {n_epochs} epochs, {name}", spread(seconds), spread(ratios),
            spread(cpu_ratios), f"{np.mean(ours):.4f} ± {np.std(ours):.4f}",
            f"{np.mean(other):.4f} ± {np.std(other):.4f}", "≥ 4",
        ])  # fmt: skip
    return rows


def measure_neighbours(
    data: tuple[Array, ...], their_ks: tuple[int, ...], repeats: int
) -> list[list[str]]:
    """One row: every k by both metrics against KNeighborsClassifier."""
    X, y, X_test, y_test = data
    n_classes = int(y.max()) + 1
    settings = [VoteSetting(k, metric, temperature=None) for metric in METRICS for k in KS]

    def ours() -> list[float]:
        tables = vote(search(X, X_test, max(KS)), y, settings, n_classes=n_classes)
        return [float((table.argmax(axis=1) == y_test).mean()) for table in tables]

    def theirs() -> list[float]:
        return [
            KNeighborsClassifier(k, metric=metric, algorithm="brute")
            .fit(X, y)
            .score(X_test, y_test)
            for metric in METRICS
            for k in their_ks
        ]

    seconds, ratios, cpu_ratios = [], [], []
    for _ in range(repeats):
        accuracies, wall, cpu = timed(ours)
        their_accuracies, their_wall, their_cpu = timed(theirs)
        seconds.append(wall)
        ratios.append(their_wall * len(KS) / len(their_ks) / wall)
        cpu_ratios.append(their_cpu * len(KS) / len(their_ks) / cpu)
    same = [a for a, s in zip(accuracies, settings, strict=True) if s.k in their_ks]
    return [[
        f"kNN, {len(KS)} k × {len(METRICS)} metrics", spread(seconds), spread(ratios),
        spread(cpu_ratios), f"{np.mean(same):.4f}", f"{np.mean(their_accuracies):.4f}", "≥ 8",
    ]]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, help="folder of the four files")
    parser.add_argument("--samples", type=int, default=20_000, help="training samples, at most")
    parser.add_argument("--test-samples", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sizes, for trying it out")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.test_samples, options.epochs = 1000, 300, 3
    data = load_features(options.features, options.samples, options.test_samples)
    print_header("A sweep at once, beside scikit-learn one by one: median (least–most)")
    n_theirs, their_ks = (4, (1, 100)) if options.quick else (8, (1, 5, 20, 100))
    rows = measure_neighbours(data, their_ks, options.repeats)
    rows += measure_mlps(data, options.epochs, 32, n_theirs, options.repeats)
    columns = ["sweep", "seconds", "× faster", "× less CPU time", "accuracy", "theirs", "target"]
    print_table(columns, rows)


if __name__ == "__main__":
    main()
