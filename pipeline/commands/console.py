"""What commands print, and where: results to stdout, everything else to stderr.

``--json`` prints exactly one JSON document on stdout; ``--quiet`` silences stderr but for errors.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def output_options(function: F) -> F:
    """Add ``--json`` and ``--quiet``; the command receives ``as_json`` and ``quiet``."""
    function = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
    )(function)
    return click.option("--quiet", is_flag=True, help="Print nothing on stderr but errors.")(
        function
    )


cache_option = click.option(
    "--cache",
    "cache_dir",
    type=click.Path(path_type=Path),
    default=Path("cache"),
    show_default=True,
    envvar="TLPIPE_CACHE",
    help="Folder of stores and written-out data sets.",
)
runs_option = click.option(
    "--runs",
    "runs_dir",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder of the fitted heads.",
)


class Console:
    """One command's voice.

    Args:
        as_json: results are collected by the caller and printed once with :meth:`document`.
        quiet: notes and progress are not shown.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Tell something in passing, on stderr."""
        if not self.quiet:
            click.echo(text, err=True)

    def result(self, text: str = "") -> None:
        """Print a line of the result on stdout; nothing where JSON was asked for."""
        if not self.as_json:
            click.echo(text)

    def document(self, value: Any) -> None:
        """Print the one JSON document of ``--json``; nothing otherwise."""
        if self.as_json:
            click.echo(json.dumps(value, indent=2, default=str))

    def next_steps(self, commands: Iterable[str]) -> None:
        """Name the next commands to try, on stderr."""
        self.note("\nNext:")
        activate = Path(sys.prefix) / "bin" / "activate"
        if shutil.which("tlpipe") is None and activate.is_file():
            self.note(f"  source {shlex.quote(os.path.relpath(activate))}")
        for command in commands:
            self.note(f"  {command}")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
        """Print aligned columns on stdout; text from data is shown as it is, never as markup.

        Cells are never folded: a path has to be copied in one piece.
        """
        if self.as_json:
            return
        from rich.box import SIMPLE_HEAD
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
        for column in columns:
            table.add_column(Text(column), no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        lines = StringIO()
        RichConsole(file=lines, width=100_000).print(table)
        click.echo("\n".join(line.rstrip() for line in lines.getvalue().splitlines()))


class Progress:
    """Progress on stderr: a bar in a terminal, a plain line every ten seconds elsewhere.

    Use as a context manager: :meth:`start` when it is known how much there is to do, then
    :meth:`advance` as samples finish.
    """

    PLAIN_INTERVAL_SECONDS = 10.0

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self.label = label
        self.quiet = quiet
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, n_samples: int, n_todo: int) -> None:
        """``n_todo`` of ``n_samples`` samples have to be done."""
        self._n_todo = n_todo
        self._n_done = 0
        self._started = self._last_line = time.monotonic()
        if self.quiet or not n_todo:
            return
        if not sys.stderr.isatty():
            click.echo(f"{self.label}: {n_todo:,} of {n_samples:,} images to do", err=True)
            return
        from rich import progress
        from rich.console import Console as RichConsole

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            console=RichConsole(file=sys.stderr),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.label, total=n_todo, rate="")

    def advance(self, n: int) -> None:
        """``n`` more samples are done."""
        self._n_done += n
        now = time.monotonic()
        rate = self._n_done / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._n_done, rate=f"{rate:.0f} images/s")
        elif not self.quiet and now - self._last_line >= self.PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            left_seconds = (self._n_todo - self._n_done) / max(rate, 1e-9)
            click.echo(
                f"{self.label}: {self._n_done:,} of {self._n_todo:,} images, "
                f"{rate:.0f} images/s, {format_seconds(left_seconds)} left",
                err=True,
            )


def format_seconds(seconds: float) -> str:
    """``75.2`` -> ``"1 min 15 s"``; tenths below ten seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_bytes(size_bytes: float) -> str:
    """``2_400_000`` -> ``"2.4 MB"`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def printable(text: str) -> str:
    """``text`` on one line, with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
