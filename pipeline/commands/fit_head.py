"""``tlpipe fit-head``: features -> a head, scored on held-out images."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import (
    Console,
    format_seconds,
    output_options,
    printable,
)
from pipeline.commands.sweep_options import (
    data_options,
    labels_option,
    memory_option,
    parse_size,
    split_commas,
    stores_argument,
    tell_trial,
)
from pipeline.errors import EXIT_DONE, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.heads.metrics import Score
    from pipeline.sweep.fit import HeadRun
    from pipeline.sweep.multitask import MultiTaskRun

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
    help="standardise, l2 or none; auto tries what may suit.  [default: what suits the head]",
)
@memory_option
@labels_option
@click.option(
    "--task-weights",
    default="equal",
    show_default=True,
    help="Of the losses of several label columns: equal, or uncertainty, which learns them.",
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
    labels: tuple[str, ...],
    task_weights: str,
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

    Several --label columns are learned at once by --head mlp, with hidden layers that they share; a
    sample without a label in one of them counts in the others, and the mean over the columns
    chooses.

    \b
    Examples:
      tlpipe fit-head cache/photos/resnet50-1f3a9c02
      tlpipe fit-head cache/photos/resnet50-1f3a9c02 --head svm --layers all
      tlpipe fit-head cache/photos/resnet50-1f3a9c02 --head mlp --param hidden=512x256
      tlpipe fit-head cache/photos/resnet50-1f3a9c02 cache/photos/vit_base-77e0b1aa
      tlpipe fit-head cache/photos/resnet50-1f3a9c02 --memory-limit 2GB
      tlpipe fit-head cache/photos/resnet50-1f3a9c02 --head mlp --label species --label age
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.sweep.fit import fit_head
    from pipeline.sweep.multitask import fit_multitask
    from pipeline.sweep.space import check_settings, grid_of, params_of, parse_param

    values = params_of([head], [parse_param(text) for text in params])[head]
    settings = grid_of(head, "quick", values)
    if values:
        check_settings(head, settings)
    options: dict[str, Any] = {
        "head": head,
        "layers": split_commas(layers) or None,
        "groups": groups,
        "scaling": scaling,
        "settings": settings,
        "metric": metric,
        "seed": seed,
        "memory_limit": parse_size(memory_limit),
        "on_trial": lambda trial: tell_trial(
            console, trial, metric, with_scaling=scaling == "auto"
        ),
    }
    run: HeadRun | MultiTaskRun
    if len(labels) > 1:
        run = fit_multitask(stores, labels, task_weights=task_weights, **options)
    elif task_weights != "equal":
        raise UsageError(
            f"--task-weights {task_weights} weighs several label columns, but one is learned.\n"
            "  Give --label once for each of them, or leave the option out."
        )
    else:
        run = fit_head(stores, label=next(iter(labels), None), **options)
    path = run.save(out, command=shlex.join(["tlpipe", *sys.argv[1:]]))
    console.document({"path": str(path)} | run.to_dict())
    _print_run(console, run)
    shown = shlex.quote(str(path))
    console.next_steps([f"tlpipe predict {shown} image.jpg", f"tlpipe inspect {shown}"])
    console.result(str(path))
    return EXIT_DONE


def _print_run(console: Console, run: HeadRun | MultiTaskRun) -> None:
    from pipeline.sweep.trials import described

    for note in run.notes:
        console.note(printable(note))
    lines = list(_lines(run))
    shown = [name for name in _METRICS if any(name in scores for *_, scores in lines)]
    rows = []
    for words, scores in lines:
        cells = [f"{scores[name].value:.3f}" if name in scores else "–" for name in shown]
        cells[0] = str(scores["top1"])
        rows.append([printable(words), *cells])
    if rows:
        console.table(["scored on", *(_METRICS[name] for name in shown)], rows)
    n_failed = sum(bool(trial.failure) for trial in run.trials)
    console.result(
        f"{run.head}, {described(run.best.candidate, run.trials)}, chosen by {run.chosen_by} among "
        f"{len(run.trials)}" + (f" ({n_failed} failed)" if n_failed else "")
    )
    console.result(
        f"{sum(run.n_samples.values()):,} samples, {len(run.model.classes)} classes, "
        f"{run.model.head.n_features_in_:,} features, {format_seconds(run.seconds['total'])}"
    )


def _lines(run: HeadRun | MultiTaskRun) -> Iterator[tuple[str, dict[str, Score]]]:
    """What was scored, in words, with its scores; of several labels, a line each."""
    from pipeline.sweep.head_run import HeadRun

    parts = [("", run)] if isinstance(run, HeadRun) else [(t.task.label, t) for t in run.tasks]
    for label, part in parts:
        for split, scores in part.scores.items():
            n_test = f"test ({part.n_samples.get('test', 0):,})"
            words = n_test if split == "test" else "validation (chose the setting)"
            yield f"{label}, {words}" if label else words, scores
