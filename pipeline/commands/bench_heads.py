"""``tlpipe bench-heads``: every kind of head against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.commands.console import Console, output_options
from pipeline.commands.sweep import run_plan
from pipeline.commands.sweep_options import (
    data_options,
    label_option,
    plan_options,
    stores_argument,
)
from pipeline.errors import EXIT_DONE
from pipeline.heads import HEADS


@click.command()
@stores_argument
@click.option(
    "--head",
    "heads",
    default=",".join(HEADS),
    show_default=True,
    help="Comma-separated heads to compare.",
)
@click.option(
    "--grid",
    default="default",
    show_default=True,
    help="Settings of each head: default, or quick for a few.",
)
@plan_options
@label_option
@data_options
@output_options
def command(stores: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> int:
    """Compare every kind of head on the features of STORE, each with a sweep of its own.

    One table and one page: accuracy with its interval against seconds, memory and size of the
    model, and which head to take. The validation samples choose, also between the heads; the test
    split only scores.

    \b
    Examples:
      tlpipe bench-heads cache/photos/resnet50-1f3a9c02
      tlpipe bench-heads cache/photos/resnet50-1f3a9c02 --time-budget 5m --repeats 3
    """
    run_plan(Console(as_json=as_json, quiet=quiet), stores, "bench-heads", **options)
    return EXIT_DONE
