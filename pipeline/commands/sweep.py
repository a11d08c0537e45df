"""``tlpipe sweep``: many settings of one or more heads, the best of each scored once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, format_seconds, output_options, printable
from pipeline.commands.sweep_options import (
    data_options,
    label_option,
    parse_seconds,
    parse_size,
    plan_options,
    split_commas,
    stores_argument,
    tell_trial,
)
from pipeline.errors import EXIT_DONE

if TYPE_CHECKING:
    from pipeline.sweep.head_run import HeadRun
    from pipeline.sweep.sweep_run import SweepRun
    from pipeline.sweep.trials import Trial


_ON_THE_PAGE = ("macro-F1", "NLL", "ECE", "settings", "predict 1,000")


@click.command()
@stores_argument
@click.option(
    "--head",
    "heads",
    default="logreg",
    show_default=True,
    help="Comma-separated: logreg, linear, svm, mlp, ridge, knn, prototype.",
)
@click.option(
    "--grid",
    default="default",
    show_default=True,
    help="default, quick, clip (96 values of C) or byol (45).",
)
@plan_options
@label_option
@data_options
@output_options
def command(stores: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> int:
    """Try many settings of one or more heads on the features of STORE.

    Every setting is compared on the val split or, where there is none, on a part of train. The
    best of each head is fitted on both and scored once on the test split; the run holds the table,
    every trial, a page to look at, and the model that is recommended.

    \b
    Examples:
      tlpipe sweep cache/photos/resnet50-1f3a9c02 --grid clip
      tlpipe sweep cache/photos/resnet50-1f3a9c02 --head logreg,svm,knn --layers each --layers all
      tlpipe sweep cache/photos/resnet50-1f3a9c02 --head mlp --search random --trials 50
      tlpipe sweep cache/photos/resnet50-1f3a9c02 --param C=1e-4:1e4:30 --repeats 5
    """
    run_plan(Console(as_json=as_json, quiet=quiet), stores, "sweep", **options)
    return EXIT_DONE


def run_plan(
    console: Console,
    stores: tuple[Path, ...],
    name: str,
    *,
    heads: str,
    grid: str,
    layers: tuple[str, ...],
    scalings: str | None,
    params: tuple[str, ...],
    search: str,
    n_trials: int | None,
    time_budget: str | None,
    repeats: int,
    resume: bool,
    memory_limit: str | None,
    label: str | None,
    groups: str | None,
    metric: str,
    seed: int,
    out: Path | None,
) -> None:
    """Sweep, save the run with its page, and print the table; the options are the command's."""
    from pipeline.report.heads import heads_page
    from pipeline.sweep.space import parse_param
    from pipeline.sweep.sweep import Plan, sweep
    from pipeline.sweep.trials import described

    plan = Plan(
        heads=tuple(dict.fromkeys(split_commas(heads))),
        layers=layers,
        scalings=tuple(split_commas(scalings)),
        grid=grid,
        params=tuple(parse_param(text) for text in params),
        search=search,
        n_trials=n_trials,
        time_budget=parse_seconds(time_budget),
        metric=metric,
        repeats=repeats,
        seed=seed,
        memory_limit=parse_size(memory_limit),
    )

    def told(head: HeadRun) -> None:
        found = f"top-1 {head.metrics['top1']} on {head.scored_on}" if head.metrics else "fitted"
        console.note(
            printable(
                f"{head.head}: {described(head.best.candidate, head.trials)} "
                f"of {len(head.trials)}; {found}, {format_seconds(head.seconds['total'])}"
            )
        )

    try:
        run = sweep(
            stores,
            plan,
            label=label,
            groups=groups,
            out=out,
            resume=resume,
            on_note=console.note,
            on_trial=_Teller(console, metric),
            on_head=told,
        )
    except KeyboardInterrupt:
        again = shlex.join(["tlpipe", *sys.argv[1:], *([] if resume else ["--resume"])])
        console.note(f"\nWhat was tried is kept. To go on:  {again}")
        raise
    command = shlex.join(["tlpipe", *sys.argv[1:]])
    path = run.save(out, name=name, command=command, page=heads_page)
    console.document({"path": str(path)} | run.to_dict())
    _print_run(console, run)
    shown = shlex.quote(str(path))
    console.next_steps([f"tlpipe inspect {shown}", f"tlpipe predict {shown} image.jpg"])
    console.result(f"page: {path / 'report.html'}")
    console.result(str(path))


class _Teller:
    """Tells of trials that are the best of their head so far, and of those that failed."""

    def __init__(self, console: Console, metric: str) -> None:
        self._console = console
        self._metric = metric
        self._best: dict[str, tuple[float, float]] = {}

    def __call__(self, trial: Trial) -> None:
        head = trial.candidate.head
        if not trial.failure:
            rank = trial.rank(self._metric)
            if head in self._best and rank <= self._best[head]:
                return
            self._best[head] = rank
        tell_trial(self._console, trial, self._metric, with_head=True)


def _print_run(console: Console, run: SweepRun) -> None:
    from pipeline.report.heads import table_of

    document = run.to_dict()
    for note in document["notes"]:
        console.note(printable(note))
    for result in run.results:
        if result.run.head != document["head"]:
            for note in result.run.notes:
                console.note(printable(f"{result.run.head}: {note}"))
    for head, why in run.failures.items():
        console.note(printable(f"{head} has no result: {why}"))
    columns, rows = table_of(document)
    shown = [i for i, column in enumerate(columns) if not column.endswith(_ON_THE_PAGE)]
    console.table([columns[i] for i in shown], [[printable(row[i]) for i in shown] for row in rows])
    console.result(f"{document['head']} is recommended: {printable(document['why'])}.")
    n_trials = sum(len(result.trials) for result in run.results)
    console.result(
        f"{n_trials:,} trials, chosen by {document['chosen_by']}, "
        f"{format_seconds(run.seconds['total'])}"
    )
