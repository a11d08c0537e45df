"""``tlpipe compact``: few full shards instead of many small ones, without torch."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from pipeline.commands.console import Console, Progress, format_bytes, output_options
from pipeline.errors import EXIT_DONE


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@output_options
def command(store: Path, as_json: bool, quiet: bool) -> int:
    """Merge the small shards of STORE and drop rows that no sample uses.

    An interrupted or growing extraction leaves small shards, which are slower to read; images that
    changed or left the data source leave rows that are never read again, but found should the image
    come back. Features stay equal bit by bit, and readers that have the store open through tlpipe
    go on reading; programs that hold features.h5 open in plain h5py must open it again, or they are
    shown NaN. Until the new shards are in use the old ones stay, so there must be room for both;
    stopped at any moment, the store is as it was or as it should be.

    \b
    Examples:
      tlpipe compact cache/photos/resnet50-1f3a9c02
      tlpipe compact cache/photos/resnet50-1f3a9c02 --json
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.store.compact import compact_store

    with Progress(f"Compacting {store.name}", quiet=quiet) as progress:

        def on_plan(n_rows: int, n_todo: int) -> None:
            if n_todo:
                progress.start(n_rows, n_todo)

        report = compact_store(store, on_plan=on_plan, on_progress=progress.advance)
    before, after = report.before, report.after
    console.document(
        {
            "store": str(store),
            "n_rewritten": report.n_rewritten,
            "before": vars(before),
            "after": vars(after),
        }
    )
    if report.n_rewritten:
        console.table(
            ["", "shards", "rows", "size"],
            [
                [when, f"{size.n_shards:,}", f"{size.n_rows:,}", format_bytes(size.size_bytes)]
                for when, size in (("before", before), ("after", after))
            ],
        )
    else:
        console.note(
            f"Nothing to do: {after.n_shards:,} shard(s) with {after.n_rows:,} rows, all in use."
        )
    console.next_steps([f"tlpipe verify {shlex.quote(str(store))}"])
    console.result(str(store))
    return EXIT_DONE
