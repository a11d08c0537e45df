"""Seconds an epoch of ``last:N`` from stored activations, beside ordinary ``last:N``.

Both train the same blocks of the same network on the same images with the same seed, without
augmentation, in turn and several times; ordinary training keeps its decoded images in memory. CPU
seconds, of all cores together, tell more than seconds where others use the machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from _bench import print_header, print_table, spread

from pipeline.backbones import load_backbone
from pipeline.data import open_source
from pipeline.finetune import FinetuneRun, Settings, finetune
from pipeline.finetune.fit import Watcher


class Clock:
    """Seconds and CPU seconds of each epoch with its validation."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, float]] = []

    def on_epoch(self, _: dict[str, Any]) -> None:
        """One more is done."""
        self._ends.append((time.perf_counter(), time.process_time()))

    def epochs(self) -> list[tuple[float, float]]:
        """Without the first one, which fills the memory."""
        return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self._ends[1:])]


@click.command()
@click.option("--data", default="fashion-mnist", show_default=True)
@click.option("--limit", default=2000, show_default=True, help="Samples of each split, at most.")
@click.option("--backbone", default="efficientnet_lite0", show_default=True)
@click.option("--image-size", type=int)
@click.option("--policy", default="last:1", show_default=True)
@click.option("--epochs", default=3, show_default=True)
@click.option("--repeats", default=2, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
def main(
    data: str,
    limit: int,
    backbone: str,
    image_size: int | None,
    policy: str,
    epochs: int,
    repeats: int,
    lr: float,
) -> None:
    """Print seconds an epoch, validation losses and their ratio."""
    print_header(f"{policy} of {backbone} on {data}, at most {limit:,} images a split")
    network = load_backbone(backbone, image_size=image_size)
    common: dict[str, Any] = {"policy": policy, "epochs": epochs, "lr": lr, "augment": "none"}
    epochs_of: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    runs: dict[bool, FinetuneRun] = {}
    embedding: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(data, cache_dir=Path(folder) / "data", limit=limit)
        for repeat in range(repeats):
            for cached in (False, True):
                clock = Clock()
                run = finetune(
                    source,
                    network,
                    Settings(**common, cached=cached),
                    init_head="none",
                    out=Path(folder) / "runs",
                    cache_dir=Path(folder) / f"cache-{repeat}",
                    watcher=Watcher(on_epoch=clock.on_epoch),
                )
                run.checkpoint.remove()
                epochs_of[cached] += clock.epochs()
                runs[cached] = run
                if cached:
                    embedding.append(run.seconds["load"] + run.seconds["embed"])
    rows = []
    for cached, run in runs.items():
        rows.append(
            [
                "cached" if cached else "ordinary",
                *(spread(one) for one in zip(*epochs_of[cached], strict=True)),
                f"{run.curve[-1]['val_loss']:.5f}",
                f"{run.curve[-1]['val_top1']:.4f}",
                f"{run.metrics['top1'].value:.4f}",
            ]
        )
    columns = ["training", "s an epoch", "CPU s an epoch", "val loss", "val top-1"]
    print_table([*columns, f"{runs[True].scored_on} top-1"], rows)
    ratio, cpu_ratio = (
        statistics.median(ordinary) / statistics.median(cached)
        for ordinary, cached in zip(
            zip(*epochs_of[False], strict=True), zip(*epochs_of[True], strict=True), strict=True
        )
    )
    ordinary_loss, cached_loss = (runs[cached].curve[-1]["val_loss"] for cached in (False, True))
    print(
        f"\n{runs[True].n_fit:,} images trained on. An epoch is {ratio:.1f} times as fast, "
        f"{cpu_ratio:.1f} times by CPU seconds; the last validation loss differs by "
        f"{abs(cached_loss / ordinary_loss - 1):.2%}. Loading and embedding once: "
        f"{spread(embedding, 1)} s."
    )


if __name__ == "__main__":
    main()
