"""``tlpipe extract``: images -> features, once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import (
    Console,
    Progress,
    cache_option,
    format_bytes,
    format_seconds,
    output_options,
    printable,
)
from pipeline.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SKIPPED

if TYPE_CHECKING:
    from pipeline.extract.extractor import ExtractReport

SHOWN_FAILURES = 20


@click.command()
@click.argument("data")
@click.option(
    "--backbone",
    default="efficientnet_lite0",
    show_default=True,
    help="Frozen network; `tlpipe backbones` lists them.",
)
@click.option(
    "--weights",
    default="default",
    show_default=True,
    help="default, random, or a .safetensors or .pth file.",
)
@click.option(
    "--layers",
    default="penultimate",
    show_default=True,
    help="Comma-separated layers to store; all for every stage.",
)
@click.option(
    "--pooling",
    type=click.Choice(["avg", "max", "gem", "cls", "none"]),
    default="avg",
    show_default=True,
    help="How a stage's map becomes a vector; none keeps the map.",
)
@click.option("--image-size", type=click.IntRange(min=8), help="Side of the crop, in pixels.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Arithmetic of the network; auto is the fastest that the device has.",
)
@click.option(
    "--dtype",
    "storage",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="Type that features are stored with.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images in a batch.")
@click.option(
    "--threads", "n_threads", type=click.IntRange(min=1), help="Decoding threads; one a core."
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Use at most this many samples of each split."
)
@click.option(
    "--test-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.2,
    show_default=True,
    help="Share of each class held out for test where no split is given.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Decides made splits, --limit and random weights.",
)
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="Folder that a manifest's paths are relative to; its own by default.",
)
@cache_option
@click.option(
    "--verify",
    type=click.Choice(["stat", "content"]),
    default="stat",
    show_default=True,
    help="Trust a file's size and time, or read every byte.",
)
@output_options
def command(
    data: str,
    backbone: str,
    weights: str,
    layers: str,
    pooling: str,
    image_size: int | None,
    precision: str,
    storage: str,
    device: str,
    batch_size: int | None,
    n_threads: int | None,
    limit: int | None,
    test_fraction: float,
    seed: int,
    root: Path | None,
    cache_dir: Path,
    verify: str,
    as_json: bool,
    quiet: bool,
) -> int:
    """Embed the images of DATA with a frozen backbone into a feature store.

    DATA is a folder with a folder of images for each class, a folder with train/ and test/ of
    such, a flat folder, a .csv or .parquet manifest (path, label, split), digits, fashion-mnist
    (or fashion-mnist:FOLDER), or torchvision:NAME. Images that are embedded already are not even
    decoded; run the same command again after adding images or after an interruption.

    \b
    Examples:
      tlpipe extract photos/
      tlpipe extract photos/ --backbone resnet50 --layers all
      tlpipe extract birds.csv --root images/ --image-size 128
      tlpipe extract fashion-mnist --limit 10000
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.data import open_source
    from pipeline.extract.place import check_writable

    check_writable(cache_dir)
    source = open_source(
        data,
        cache_dir=cache_dir,
        root=root,
        limit=limit,
        seed=seed,
        test_fraction=test_fraction,
    )
    for note in source.notes:
        console.note(f"Note: {note}")

    from pipeline.extract.extractor import Settings, extract
    from pipeline.extract.interrupt import graceful_interrupt
    from pipeline.extract.recall import Request

    request = Request(backbone, weights, image_size, seed)
    settings = Settings(
        layers=tuple(name.strip() for name in layers.split(",") if name.strip()),
        pooling=pooling,
        precision=precision,
        storage=storage,
        device=device,
        batch_size=batch_size,
        n_threads=n_threads,
    )
    with (
        Progress(f"Embedding {source.name}", quiet=quiet) as progress,
        graceful_interrupt(console.note) as should_stop,
    ):
        report = extract(
            source,
            request,
            settings,
            cache_dir=cache_dir,
            limit=limit,
            verify_content=verify == "content",
            on_plan=progress.start,
            on_progress=progress.advance,
            on_note=lambda text: console.note(f"Note: {printable(text)}"),
            should_stop=should_stop,
        )
    _print(console, report)
    if report.interrupted:
        console.note(f"\nInterrupted. Go on with:\n  {_command_line()}")
        return EXIT_INTERRUPTED
    console.next_steps(_next_steps(report.n_labels, shlex.quote(str(report.store))))
    console.result(str(report.store))
    return EXIT_SKIPPED if report.failures else EXIT_DONE


def _next_steps(n_labels: dict[str, int], store: str) -> list[str]:
    """Commands that will work on this store."""
    chosen = "label" if "label" in n_labels else next(iter(n_labels), "")
    if n_labels.get(chosen, 0) < 2:
        return [f"tlpipe inspect {store}"]
    is_clear = chosen == "label" or len(n_labels) == 1
    option = "" if is_clear else f" --label {printable(shlex.quote(chosen))}"
    return [f"tlpipe fit-head {store}{option}", f"tlpipe inspect {store}"]


def _print(console: Console, report: ExtractReport) -> None:
    """Say what was done."""
    from pipeline.data.names import counted
    from pipeline.store.manifest import read_manifest

    n_found = report.n_cached + report.n_linked
    console.note(
        f"{counted(report.n_samples, 'sample')}: {n_found:,} found in the store, "
        f"{report.n_embedded:,} embedded, {len(report.failures):,} skipped "
        f"({format_seconds(report.seconds)})."
    )
    if report.read_all and report.n_linked:
        console.note(f"Every file was read: {report.n_linked:,} hold bytes that are known.")
    elif report.n_linked:
        console.note(f"{report.n_linked:,} of those found were recognised by their bytes.")
    if report.n_decoded:
        _print_timings(console, report)
    elif not report.failures:
        console.note("Nothing was decoded.")
    if report.n_removed:
        n_removed = counted(report.n_removed, "sample")
        console.note(f"{n_removed} left the data source and the store's list.")
    for note, n in report.notes.items():
        console.note(f"Note: {n:,} × {note}")
    if report.failures:
        console.note("Skipped:")
        for sample_id, reason in list(report.failures.items())[:SHOWN_FAILURES]:
            console.note(f"  {printable(sample_id)}: {reason}")
        if len(report.failures) > SHOWN_FAILURES:
            console.note(
                f"  … all of them:  tlpipe inspect {shlex.quote(str(report.store))} --failures"
            )
    size_bytes = read_manifest(report.store).size_bytes
    document: dict[str, Any] = {
        "store": str(report.store),
        "n_samples": report.n_samples,
        "n_cached": report.n_cached,
        "n_linked": report.n_linked,
        "n_embedded": report.n_embedded,
        "n_decoded": report.n_decoded,
        "n_removed": report.n_removed,
        "failures": report.failures,
        "notes": report.notes,
        "seconds": round(report.seconds, 3),
        "timings": report.timings.to_dict(),
        "bottleneck": report.timings.bottleneck(),
        "size_bytes": size_bytes,
        "interrupted": report.interrupted,
    }
    console.document(document)
    console.note(f"Store: {format_bytes(size_bytes)}")


def _print_timings(console: Console, report: ExtractReport) -> None:
    """Say where the time went."""
    timings = report.timings
    stages = ("loading", "waiting", "network", "writing")
    parts = [f"{stage} {format_seconds(getattr(timings, stage))}" for stage in stages]
    console.note(
        f"Time: {', '.join(parts)}; beside it, in {timings.n_threads} thread(s), reading "
        f"{format_seconds(timings.reading)} and decoding {format_seconds(timings.decoding)}."
    )
    if timings.bottleneck():
        console.note(timings.bottleneck())


def _command_line() -> str:
    """The command as the user typed it."""
    return shlex.join(["tlpipe", *sys.argv[1:]])
