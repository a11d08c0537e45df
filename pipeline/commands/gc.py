"""``tlpipe gc``: what in the cache is left over, unreachable or old, without torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.console import (
    Console,
    cache_option,
    format_bytes,
    output_options,
    printable,
    runs_option,
)
from pipeline.errors import EXIT_DONE, StoreError

if TYPE_CHECKING:
    from pipeline.commands.garbage import Found, RunUse


@click.command()
@cache_option
@runs_option
@click.option(
    "--older-than",
    type=click.IntRange(min=1),
    metavar="DAYS",
    help="Also stores, unfinished trainings and comparisons that nothing used for so long.",
)
@click.option("--delete", is_flag=True, help="Delete what is found, instead of listing it.")
@output_options
def command(
    cache_dir: Path,
    runs_dir: Path,
    older_than: int | None,
    delete: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Find what in the cache is left over, unreachable or old; delete it with --delete.

    Found are files that killed processes left behind, damaged files that `tlpipe verify` set aside,
    stores whose data root is gone, written-out data sets that no store is made of, and stopped
    trainings and comparisons in --runs. Kept are stores that a run in --runs was fitted on, and
    trainings and comparisons that can be gone on with (but for --older-than), stores that are being
    written or are damaged, and whatever tlpipe has not made itself. Nothing is deleted without
    --delete.

    \b
    Examples:
      tlpipe gc
      tlpipe gc --older-than 90
      tlpipe gc --older-than 90 --delete
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.commands.garbage import (
        Rules,
        collect,
        collect_comparisons,
        collect_trainings,
    )

    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        console.note(text)

    found = []
    rules = Rules(tuple(_run_uses(runs_dir, note)), older_than)
    if cache_dir.is_dir():
        found = collect(cache_dir, rules, delete=delete, note=note)
    else:
        note(f"There is no cache in {cache_dir} yet.")
    found += collect_trainings(runs_dir, rules, delete=delete, note=note)
    found += collect_comparisons(runs_dir, rules, delete=delete, note=note)
    garbage = [one for one in found if one.delete is not None]
    others = [one for one in found if one.delete is None]
    size_bytes = sum(one.size_bytes for one in garbage)
    console.document(
        {
            "cache": str(cache_dir),
            "garbage": [_document(one) for one in garbage],
            "size_bytes": size_bytes,
            "deleted": delete,
            "kept": [{**_document(one), "remedy": one.remedy} for one in others],
            "notes": notes,
        }
    )
    if garbage:
        console.table(
            ["deleted" if delete else "garbage", "why", "size"],
            [[str(one.path), printable(one.why), format_bytes(one.size_bytes)] for one in garbage],
        )
    if others:
        console.table(
            ["kept", "why", "size", "what to do"],
            [
                [str(one.path), printable(one.why), format_bytes(one.size_bytes), one.remedy]
                for one in others
            ],
        )
    if not garbage:
        console.result(f"Nothing to delete in {cache_dir}.")
    elif delete:
        console.result(f"Freed {format_bytes(size_bytes)}.")
    else:
        console.result(f"{format_bytes(size_bytes)} to free. Nothing was deleted.")
        console.next_steps([shlex.join(["tlpipe", *sys.argv[1:], "--delete"])])
    return EXIT_DONE


def _document(one: Found) -> dict[str, object]:
    return {
        "path": str(one.path),
        "kind": one.kind,
        "why": one.why,
        "size_bytes": one.size_bytes,
    }


def _run_uses(runs_dir: Path, note: Callable[[str], None]) -> Iterator[RunUse]:
    """The stores of every run."""
    from pipeline.commands.garbage import RunUse
    from pipeline.runs.folder import RUN_FILE, read_run

    for path in sorted(runs_dir.glob(f"*/*/{RUN_FILE}")):
        try:
            stores = read_run(path.parent).get("stores", [])
            yield RunUse(path.parent, tuple(map(str, stores)), path.stat().st_mtime)
        except (StoreError, OSError) as error:
            note(f"Warning: it is not known which stores this run uses: {error}")
