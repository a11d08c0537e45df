"""``tlpipe compare``: frozen features and fine-tuning in one table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.backbones import DEFAULT_BACKBONE
from pipeline.commands.console import (
    Console,
    Progress,
    cache_option,
    format_seconds,
    output_options,
    printable,
)
from pipeline.commands.sweep_options import label_option, parse_seconds, split_commas
from pipeline.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SKIPPED, UsageError

if TYPE_CHECKING:
    from pipeline.finetune.contest import Outcome

SHOWN_FAILURES = 20
PAGE_FILE = "report.html"


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="DATA|RUN…")
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    default=(DEFAULT_BACKBONE,),
    show_default=True,
    help="Network to compare on; may be given several times.",
)
@click.option("--weights", default="default", show_default=True, help="As for extract.")
@click.option("--image-size", type=click.IntRange(min=1), help="Side of the input, pixels.")
@click.option(
    "--head",
    "heads",
    default="logreg,linear,svm,mlp,ridge,knn,prototype",
    show_default=True,
    help="Comma-separated heads on frozen features; none for none.",
)
@click.option("--grid", default="default", show_default=True, help="Of the heads: default, quick.")
@click.option(
    "--policy",
    "policies",
    default="head,last:1,full,scratch",
    show_default=True,
    help="Comma-separated policies of fine-tuning, as for finetune; full:fresh and the like start "
    "from a fresh head; none for none.",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), default=10, show_default=True, help="Of each."
)
@click.option(
    "--budget",
    metavar="TIME",
    help="For all fine-tuning together, the same part for each: 10m, 2h.",
)
@click.option(
    "--augment",
    default="crop",
    show_default=True,
    help="none, crop, trivial (crop and TrivialAugment) or rand (crop and RandAugment).",
)
@click.option("--flip/--no-flip", default=True, show_default=True, help="Mirror one in two.")
@click.option(
    "--sizes/--no-sizes",
    default=True,
    show_default=True,
    help="Also fit the best head with 1, 2, 5, 10 … samples a class, and train full with a few.",
)
@label_option
@click.option(
    "--group-column",
    "groups",
    help="Column of samples that belong together (patients, scenes): none is ever parted.",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many samples of each split.")
@click.option("--root", type=click.Path(path_type=Path), help="Where a manifest's paths start.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of it all.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to make the runs' folders in.  [default: runs/<data source>]",
)
@cache_option
@output_options
def command(targets: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> int:
    """Is it worth unfreezing? Compare frozen features with fine-tuning on DATA, or any RUNs.

    With DATA: embed it, sweep every head, fine-tune every policy, all on the same splits and seed,
    and print one table with paired significance, costs, and a verdict in words. With RUNs: the same
    table of runs that exist; one that learned several label columns has a line for each, paired
    with the lines of that column only.

    After Ctrl-C the same command goes on. The exit code is 3 where images were skipped, or where a
    head, a policy or a fit with fewer samples failed and the others were compared.

    \b
    Examples:
      tlpipe compare photos/ --backbone resnet50 --budget 30m
      tlpipe compare digits --image-size 64 --no-flip --policy last:1,full --epochs 5
      tlpipe compare runs/photos/logreg-resnet50-0001 runs/photos/finetune-full-resnet50-0001
    """
    console = Console(as_json=as_json, quiet=quiet)
    if all((Path(target) / "run.json").is_file() for target in targets):
        return _compare_runs(console, [Path(target) for target in targets], options["out"])
    if len(targets) > 1:
        missing = [t for t in targets if not (Path(t) / "run.json").is_file()]
        raise UsageError(
            f"{missing[0]} is no run; expected one data source, or runs only.\n"
            "  List the runs there are:  tlpipe ls"
        )
    return _compare_data(console, targets[0], **options)


def _compare_runs(console: Console, paths: Sequence[Path], out: Path | None) -> int:
    from pipeline.runs.comparison import compare_runs

    found = compare_runs(paths)
    folder = out or paths[0].absolute().parent
    _save_and_print(console, found.to_dict(), _shortest(folder))
    return EXIT_DONE


def _shortest(folder: Path) -> Path:
    """Relative to here, where it is below."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _compare_data(
    console: Console,
    data: str,
    *,
    backbones: tuple[str, ...],
    weights: str,
    image_size: int | None,
    heads: str,
    grid: str,
    policies: str,
    epochs: int,
    budget: str | None,
    augment: str,
    flip: bool,
    sizes: bool,
    label: str | None,
    groups: str | None,
    limit: int | None,
    root: Path | None,
    seed: int,
    device: str,
    out: Path | None,
    cache_dir: Path,
) -> int:
    from pipeline.data import open_source
    from pipeline.extract.interrupt import graceful_interrupt
    from pipeline.finetune.checkpoint import StoppedError
    from pipeline.finetune.contest import Contest, hold_contest
    from pipeline.finetune.fit import Watcher
    from pipeline.finetune.settings import Settings

    contest = Contest(
        backbones=tuple(dict.fromkeys(backbones)),
        heads=tuple(name for name in dict.fromkeys(split_commas(heads)) if name != "none"),
        weights=weights,
        image_size=image_size,
        grid=grid,
        policies=tuple(name for name in dict.fromkeys(split_commas(policies)) if name != "none"),
        training=Settings(epochs=epochs, device=device, augment=augment, flip=flip),
        budget_seconds=parse_seconds(budget, "--budget"),
        sizes=sizes,
        label=label,
        groups=groups,
        seed=seed,
    )
    source = open_source(data, root=root, cache_dir=cache_dir, limit=limit, seed=seed)
    text = shlex.join(["tlpipe", *sys.argv[1:]])
    folder = out or Path("runs") / source.name
    go_on = f"What is done is kept. Go on with:\n  {text}"
    try:
        with (
            Progress("Embedding", quiet=console.quiet) as progress,
            graceful_interrupt(console.note) as should_stop,
        ):
            outcome = hold_contest(
                source,
                contest,
                cache_dir=cache_dir,
                out=folder,
                command=text,
                on_note=lambda note: console.note(printable(note)),
                watcher=Watcher(note=console.note, on_epoch=lambda e: _tell_epoch(console, e)),
                on_plan=progress.start,
                on_progress=progress.advance,
                should_stop=should_stop,
            )
    except StoppedError as stop:
        console.note(f"{stop}\n{go_on}")
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        console.note(f"\n{go_on}")
        raise
    document = outcome.to_dict() | {"data": data}
    _save_and_print(console, document, folder)
    console.note(f"All of it took {format_seconds(outcome.seconds)}.")
    _tell_missing(console, outcome)
    return EXIT_SKIPPED if outcome.failures or outcome.skipped else EXIT_DONE


def _tell_missing(console: Console, outcome: Outcome) -> None:
    """Which images were skipped, and what failed; the latter is never silent."""
    skipped = list(outcome.skipped.items())
    for name, why in skipped[:SHOWN_FAILURES]:
        console.note(f"Skipped {printable(name)}: {printable(why)}")
    if len(skipped) > SHOWN_FAILURES:
        console.note(f"  … and {len(skipped) - SHOWN_FAILURES:,} more, all in run.json.")
    for name, why in outcome.failures.items():
        click.echo(f"Error: {printable(name)} failed: {why}", err=True)


def _tell_epoch(console: Console, entry: dict[str, Any]) -> None:
    found = entry.get("val_top1")
    shown = "" if found is None else f"val top-1 {found:.3f}, "
    console.note(f"  epoch {entry['epoch']}: {shown}{format_seconds(entry['seconds'])}")


def _save_and_print(console: Console, document: dict[str, Any], out: Path) -> None:
    from pipeline.report.compare import compare_table, size_words

    path, document = save_comparison(document, out)
    console.document({"path": str(path)} | document)
    for note in document["notes"]:
        console.note(printable(note))
    for curve in document.get("sizes", ()):
        console.note(printable(size_words(curve)))
    columns, rows = compare_table(document)
    console.table(columns, [[printable(cell) for cell in row] for row in rows])
    console.result(printable(document["verdict"]))
    first = shlex.quote(document["lines"][0]["path"])
    console.next_steps([f"tlpipe predict {first} image.jpg", f"tlpipe inspect {first}"])
    console.result(f"page: {path / PAGE_FILE}")
    console.result(str(path))


def save_comparison(document: dict[str, Any], out: Path) -> tuple[Path, dict[str, Any]]:
    """Write a comparison and its page into a numbered folder.

    Args:
        document: what the comparison found.
        out: folder for the new folder.

    Returns:
        The new folder, and what its ``run.json`` holds.

    Raises:
        ResourceError: the disk is full.
        StoreError: the folder cannot be written to.
    """
    from pipeline.report.compare import compare_page
    from pipeline.runs.folder import (
        RUN_FILE,
        RUN_FORMAT,
        RUN_FORMAT_VERSION,
        create_run,
        write_json,
    )

    document = {
        "format": RUN_FORMAT,
        "format_version": RUN_FORMAT_VERSION,
        **document,
        "head": f"{len(document['lines'])} runs",
        "metrics": {},
        "command": shlex.join(["tlpipe", *sys.argv[1:]]),
    }

    def write(folder: Path) -> None:
        write_json(folder / RUN_FILE, document)
        (folder / PAGE_FILE).write_text(compare_page(document), encoding="utf-8")

    return create_run(out, "compare", write), document
