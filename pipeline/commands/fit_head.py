"""``tlpipe fit-head``: features -> a head, scored on held-out images."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.console import (
    Console,
    format_seconds,
    output_options,
    printable,
)
from pipeline.commands.sweep_options import (
    data_options,
    split_commas,
    stores_argument,
    tell_trial,
)
from pipeline.errors import EXIT_DONE, UsageError

if TYPE_CHECKING:
    from pipeline.sweep.fit import HeadRun

_METRICS = {
    "top1": "top-1 [95 %]",
    "top5": "top-5",
    "macro_f1": "macro-F1",
    "mean_per_class_accuracy": "per-class",
    "nll": "NLL",
    "ece": "ECE",
}


@click.command()
@stores_argument
@click.option(
    "--head",
    default="logreg",
    show_default=True,
    help="logreg, linear, svm, mlp, ridge, knn or prototype.",
)
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUES",
    help="A value, or values to choose from: C=0.1, k=1,5,20, hidden=512x256, C=1e-4:1e4:30.",
)
@click.option(
    "--layers",
    help="Comma-separated layers; all for every one.  [default: penultimate, or all]",
)
@click.option(
    "--scaling",
    help="standardise, l2 or none.  [default: what suits the head]",
)
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Of the whole process, such as 2GB: features that do not fit are read block by block.",
)
@data_options
@output_options
def command(
    stores: tuple[Path, ...],
    head: str,
    params: tuple[str, ...],
    layers: str | None,
    scaling: str | None,
    memory_limit: str | None,
    label: str | None,
    groups: str | None,
    metric: str,
    seed: int,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Fit a classifier head on the features of STORE and score it.

    A few settings of the head are compared on the val split or, where there is none, on a part
    of train; the best is fitted on both, and the test split is scored once. Several stores of the
    same images are joined, their features side by side.

    \b
    Examples:
      tlpipe fit-head cache/photos/resnet50-1f3a9c02
      tlpipe fit-head cache/photos/resnet50-1f3a9c02 --head svm --layers all
      tlpipe fit-head cache/photos/resnet50-1f3a9c02 --head mlp --param hidden=512x256
      tlpipe fit-head cache/photos/resnet50-1f3a9c02 cache/photos/vit_base-77e0b1aa
      tlpipe fit-head cache/photos/resnet50-1f3a9c02 --memory-limit 2GB
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.sweep.fit import fit_head
    from pipeline.sweep.space import check_settings, grid_of, params_of, parse_param

    values = params_of([head], [parse_param(text) for text in params])[head]
    settings = grid_of(head, "quick", values)
    if values:
        check_settings(head, settings)
    run = fit_head(
        stores,
        head=head,
        layers=split_commas(layers) or None,
        label=label,
        groups=groups,
        scaling=scaling,
        settings=settings,
        metric=metric,
        seed=seed,
        memory_limit=parse_size(memory_limit),
        on_trial=lambda trial: tell_trial(console, trial, metric),
    )
    path = run.save(out, command=shlex.join(["tlpipe", *sys.argv[1:]]))
    console.document({"path": str(path)} | run.to_dict())
    _print_run(console, run)
    shown = shlex.quote(str(path))
    console.next_steps([f"tlpipe predict {shown} image.jpg", f"tlpipe inspect {shown}"])
    console.result(str(path))
    return EXIT_DONE


def _print_run(console: Console, run: HeadRun) -> None:
    from pipeline.heads import describe_setting

    for note in run.notes:
        console.note(printable(note))
    shown = [name for name in _METRICS if any(name in scores for scores in run.scores.values())]
    rows = []
    for split, scores in run.scores.items():
        cells = [f"{scores[name].value:.3f}" for name in shown]
        cells[0] = str(scores["top1"])
        rows.append([_split_words(run, split), *cells])
    if rows:
        console.table(["scored on", *(_METRICS[name] for name in shown)], rows)
    n_failed = sum(bool(trial.failure) for trial in run.trials)
    console.result(
        f"{run.head}, {describe_setting(run.best.setting)}, chosen by {run.chosen_by} among "
        f"{len(run.trials)}" + (f" ({n_failed} failed)" if n_failed else "")
    )
    console.result(
        f"{sum(run.n_samples.values()):,} samples, {len(run.classes)} classes, "
        f"{run.model.head.n_features_in_:,} features, {format_seconds(run.seconds['total'])}"
    )


def parse_size(text: str | None) -> float | None:
    """``"2GB"`` -> 2e9 bytes.

    Raises:
        UsageError: it is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMG]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UsageError(f"--memory-limit {text!r}: expected a size such as 800MB or 2GB.")
    power = " KMG".index(match[2].upper() or " ")
    return float(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _split_words(run: HeadRun, split: str) -> str:
    if split == "test":
        return f"test ({run.n_samples['test']:,})"
    return "validation (chose the setting)"
