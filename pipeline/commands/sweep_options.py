"""What `fit-head`, `sweep` and `bench-heads` share: options, and how trials are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.commands.console import Console, format_seconds, printable
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.sweep.trials import Trial

F = TypeVar("F", bound=Callable[..., Any])

stores_argument = click.argument(
    "stores", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="STORE…"
)


def _one_label(context: click.Context, _: click.Parameter, names: tuple[str, ...]) -> str | None:
    """The label column of a command that learns one.

    Raises:
        UsageError: several were given.
    """
    if len(names) > 1:
        options = " ".join(f"--label {name}" for name in names)
        raise UsageError(
            f"{context.info_name} learns one label column, not several ({', '.join(names)}).\n"
            f"  Learn them together:  tlpipe fit-head --head mlp {options}\n"
            f"  Or run this once a label:  --label {names[0]}"
        )
    return names[0] if names else None


label_option = click.option(
    "--label",
    multiple=True,
    callback=_one_label,
    help="Label column to learn, where the data has several.",
)

labels_option = click.option(
    "--label",
    "labels",
    multiple=True,
    help="Label column to learn, where the data has several; given several times, all at once.",
)

memory_option = click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Of the whole process, such as 2GB: features that do not fit are read block by block.",
)


def data_options(function: F) -> F:
    """Add ``--group-column``, ``--select``, ``--seed`` and ``--out``."""
    for option in (
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            help="Folder to make the run's folder in.  [default: runs/<data source>]",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Decides held-out parts, gradient steps and intervals.",
        ),
        click.option(
            "--select",
            "metric",
            default="top1",
            show_default=True,
            help="What chooses: top1, macro_f1, mean_per_class_accuracy or nll.",
        ),
        click.option(
            "--group-column",
            "groups",
            help="Column of samples that belong together (patients, scenes): none is ever parted.",
        ),
    ):
        function = option(function)
    return function


def plan_options(function: F) -> F:
    """Add what `sweep` and `bench-heads` have in common beyond :func:`data_options`."""
    for option in (
        memory_option,
        click.option(
            "--resume",
            is_flag=True,
            help="Take up the trials of a sweep of the same data that was interrupted.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Do all of it with this many seeds; the table then shows mean and interval.",
        ),
        click.option(
            "--time-budget",
            metavar="TIME",
            help="Start no new trials after this long: 90s, 10m, 2h.",
        ),
        click.option(
            "--trials",
            "n_trials",
            type=click.IntRange(min=1),
            help="Candidates of each head, where --search draws them.  [default: 30]",
        ),
        click.option(
            "--search",
            default="grid",
            show_default=True,
            help="grid, random, or optuna (needs the extra tune).",
        ),
        click.option(
            "--param",
            "params",
            multiple=True,
            metavar="NAME=VALUES",
            help="Values instead of the grid's: C=1e-4:1e4:30, k=1,5,20, mlp.hidden=256,512x256.",
        ),
        click.option(
            "--scaling",
            "scalings",
            help="Comma-separated: standardise, l2, none; auto tries what may suit each head.  "
            "[default: what suits the head]",
        ),
        click.option(
            "--layers",
            multiple=True,
            help="each, all, auto (chosen on validation), or layers with commas between them; "
            "may be given several times.  [default: penultimate, or all]",
        ),
    ):
        function = option(function)
    return function


def parse_seconds(text: str | None, option: str = "--time-budget") -> float | None:
    """``"10m"`` -> 600.0.

    Args:
        text: what was given, if anything.
        option: that it was given to.

    Raises:
        UsageError: it is no time.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(s|m|min|h)?", text.strip())
    if not match or not float(match[1]):
        raise UsageError(f"{option} {text!r}: expected a time such as 90s, 10m or 2h.")
    return float(match[1]) * {"m": 60, "min": 60, "h": 3600}.get(match[2] or "s", 1)


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


def split_commas(text: str | None) -> list[str]:
    """``"a, b"`` -> its parts; [] for None."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def tell_trial(
    console: Console,
    trial: Trial,
    metric: str,
    *,
    with_head: bool = False,
    with_scaling: bool = False,
) -> None:
    """A line about one trial, on stderr; with its head also with layers and scaling."""
    found = (
        f"failed: {trial.failure}"
        if trial.failure
        else f"{metric.replace('top1', 'top-1')} {trial.scores[metric]:.3f}"
    )
    what = trial.candidate.describe(with_layers=with_head, with_scaling=with_head or with_scaling)
    head = f"{trial.candidate.head}, " if with_head else ""
    console.note(printable(f"  {head}{what}: {found}, {format_seconds(trial.seconds)}"))
