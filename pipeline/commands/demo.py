"""``tlpipe demo``: the whole flow on a small built-in data set, without a download."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import (
    Console,
    Progress,
    cache_option,
    format_seconds,
    output_options,
    runs_option,
)
from pipeline.errors import EXIT_DONE

if TYPE_CHECKING:
    from pipeline.data import DataSource
    from pipeline.extract.extractor import ExtractReport

HEADS = ("logreg", "ridge", "svm", "knn", "prototype")
IMAGE_SIZE = 96  # digits are 8 × 8: enlarging them further costs time and shows nothing more
N_PREDICTED = 5


@click.command()
@cache_option
@runs_option
@output_options
def command(cache_dir: Path, runs_dir: Path, as_json: bool, quiet: bool) -> int:
    """Embed 1,797 handwritten digits, fit heads on the features, classify some test images.

    The images are scikit-learn's; the network is EfficientNet-Lite0 with its ImageNet weights,
    which come inside a package: nothing is downloaded. Raw pixels are the baseline. The last lines
    are a page that opens in a browser, with all of it in one table and plots, and a run to try.

    \b
    Examples:
      tlpipe demo
      tlpipe demo --cache /tmp/demo-cache --runs /tmp/demo-runs
    """
    console = Console(as_json=as_json, quiet=quiet)
    started = time.perf_counter()
    from pipeline.data import open_source

    source = open_source("digits", cache_dir=cache_dir)
    console.note(f"{len(source.samples):,} images in {source.root}; {source.split_origin}")
    network = _extract(source, "efficientnet_lite0", ("all",), cache_dir, quiet)
    pixels = _extract(source, "pixels:8", ("penultimate",), cache_dir, quiet)

    rows: list[dict[str, Any]] = []
    runs: list[Path] = []
    for name, report, layers in (
        ("pixels", pixels, ["penultimate"]),
        ("last layer", network, ["penultimate"]),
        ("all layers", network, ["all"]),
    ):
        for head in HEADS:
            row, path = _fit(name, report, layers, head, runs_dir / source.name)
            console.note(f"  {name}, {head}: {row['top1']:.3f} in {format_seconds(row['seconds'])}")
            rows.append(row)
            runs.append(path)
    # Not the best of the table: that would be a choice by the test split.
    run = runs[-len(HEADS)]
    _print_table(console, rows)

    test = [sample for sample in source.samples if sample.split == "test"]
    shown = test[:: len(test) // N_PREDICTED][:N_PREDICTED]
    predictions = _predict(console, run, [sample.file for sample in shown])
    page = _write_page(runs, runs_dir / source.name)
    console.document(
        {
            "rows": rows,
            "predictions": predictions,
            "run": str(run),
            "page": str(page),
            "seconds": round(time.perf_counter() - started, 1),
        }
    )
    console.result(f"\nAll of it took {format_seconds(time.perf_counter() - started)}.")
    console.next_steps(
        [
            f"tlpipe inspect {shlex.quote(str(run))}",
            f"tlpipe predict {shlex.quote(str(run))} {shlex.quote(shown[0].file)}",
            "tlpipe extract path/to/your/images --layers all",
            "tlpipe fit-head cache/…",
        ]
    )
    console.result(f"page: {page}")
    console.result(str(run))
    return EXIT_DONE


def _extract(
    source: DataSource, backbone: str, layers: tuple[str, ...], cache_dir: Path, quiet: bool
) -> ExtractReport:
    from pipeline.backbones import load_backbone
    from pipeline.extract.extractor import Settings, extract

    image_size = None if backbone.startswith("pixels") else IMAGE_SIZE
    with Progress(f"Embedding with {backbone}", quiet=quiet) as progress:
        return extract(
            source,
            load_backbone(backbone, image_size=image_size),
            Settings(layers=layers),
            cache_dir=cache_dir,
            on_plan=progress.start,
            on_progress=progress.advance,
        )


def _fit(
    name: str, report: ExtractReport, layers: list[str], head: str, out: Path
) -> tuple[dict[str, Any], Path]:
    """Fit one head; what the table shows of it, and its run."""
    from pipeline.sweep.fit import fit_head

    run = fit_head(report.store, head=head, layers=layers)
    top1 = run.metrics["top1"]
    row = {
        "features": name,
        "head": head,
        "top1": top1.value,
        "low": top1.low,
        "high": top1.high,
        "extract_seconds": round(report.seconds, 2),
        "seconds": run.seconds["total"],
        "n_settings": len(run.trials),
    }
    return row, run.save(out, command="tlpipe demo")


def _write_page(runs: list[Path], out: Path) -> Path:
    """The heads against each other, as `compare` shows them."""
    from pipeline.commands.compare import PAGE_FILE, save_comparison
    from pipeline.runs.comparison import compare_runs

    path, _ = save_comparison(compare_runs(runs).to_dict() | {"data": "digits"}, out)
    return path / PAGE_FILE


def _print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    console.table(
        ["features", "head", "test top-1 [95 %]", "extract", "fit", "settings"],
        [
            [
                row["features"],
                row["head"],
                f"{row['top1']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
                format_seconds(row["extract_seconds"]),
                format_seconds(row["seconds"]),
                str(row["n_settings"]),
            ]
            for row in rows
        ],
    )


def _predict(console: Console, run: Path, files: list[str]) -> list[dict[str, Any]]:
    from pipeline.commands.predict import classify
    from pipeline.runs.bundle import load_bundle

    predictions, _ = classify(load_bundle(run), files)
    console.table(
        ["test image", "class", "probability"],
        [[one.image, one.classes[0], f"{one.probabilities[0]:.3f}"] for one in predictions],
    )
    return [vars(one) for one in predictions]
