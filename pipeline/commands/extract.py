"""``tlpipe extract``: images -> features, once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
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
from pipeline.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SKIPPED, ResourceError
from pipeline.extract.settings import DECODERS, ENGINES

if TYPE_CHECKING:
    from pipeline.extract.estimate import Estimate
    from pipeline.extract.extractor import ExtractReport

DEFAULT_BACKBONE = "efficientnet_lite0"
SHOWN_FAILURES = 20


def batch_size_of(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    """A positive number of images; None for "auto"."""
    if value == "auto":
        return None
    if not (value.isascii() and value.isdigit()) or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of images.")
    return int(value)


def device_names(text: str) -> tuple[str, ...]:
    """The devices that a user named: ``0,1`` are GPUs, ``all`` is every GPU there is."""
    if text.strip() == "all":
        import torch

        return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) or ("cuda",)
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise click.BadParameter(f"{text!r} names no device. Known: auto, cpu, cuda, cuda:N, mps.")
    return tuple(f"cuda:{name}" if name.isdigit() else name for name in names)


@click.command()
@click.argument("data")
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    default=[DEFAULT_BACKBONE],
    show_default=True,
    help="Frozen network; `tlpipe backbones` lists them. Name several to decode each image once.",
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
@click.option(
    "--views",
    "n_views",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="Views of each image to store: the plain one, which heads use, then crops and flips.",
)
@click.option(
    "--decode",
    type=click.Choice(DECODERS),
    default="cpu",
    show_default=True,
    help="cpu: exact; fast: large JPEG files at a part of their size; gpu, hybrid: on the GPU.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="What runs the network; auto takes the fastest that gives the same features.",
)
@click.option(
    "--device",
    "--devices",
    "device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda, cuda:N or mps; several as cuda:0,cuda:1 or 0,1; all GPUs with all.",
)
@click.option(
    "--batch-size",
    callback=batch_size_of,
    metavar="auto|N",
    default="auto",
    show_default=True,
    help="Images in a batch; auto suits the device, and is halved where memory runs out.",
)
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
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what would be embedded, how fast and into how many bytes; make no store.",
)
@output_options
def command(
    data: str,
    backbones: tuple[str, ...],
    weights: str,
    layers: str,
    pooling: str,
    image_size: int | None,
    precision: str,
    storage: str,
    n_views: int,
    decode: str,
    engine: str,
    device: str,
    batch_size: int | None,
    n_threads: int | None,
    limit: int | None,
    test_fraction: float,
    seed: int,
    root: Path | None,
    cache_dir: Path,
    verify: str,
    dry_run: bool,
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
      tlpipe extract photos/ --backbone resnet50 --backbone timm:vit_small_patch16_224
      tlpipe extract photos/ --dry-run
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.data import open_source
    from pipeline.extract.place import check_writable

    if not dry_run:
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

    from pipeline.extract.extractor import extract_all
    from pipeline.extract.interrupt import graceful_interrupt
    from pipeline.extract.recall import Request
    from pipeline.extract.settings import Settings

    requests = [Request(backbone, weights, image_size, seed) for backbone in backbones]
    devices = device_names(device)
    settings = Settings(
        layers=tuple(name.strip() for name in layers.split(",") if name.strip()),
        pooling=pooling,
        precision=precision,
        storage=storage,
        n_views=n_views,
        decode=decode,
        engine=engine,
        device=devices[0],
        devices=devices if len(devices) > 1 else (),
        batch_size=batch_size,
        n_threads=n_threads,
    )
    on_note = _noting(console)
    if dry_run:
        from pipeline.extract.estimate import estimate

        found = estimate(
            source,
            requests,
            settings,
            cache_dir=cache_dir,
            limit=limit,
            verify_content=verify == "content",
            on_note=on_note,
        )
        _print_estimate(console, found)
        return EXIT_DONE if found.has_room else ResourceError.exit_code
    with (
        Progress(f"Embedding {source.name}", quiet=quiet) as progress,
        graceful_interrupt(console.note) as should_stop,
    ):
        reports = extract_all(
            source,
            requests,
            settings,
            cache_dir=cache_dir,
            limit=limit,
            verify_content=verify == "content",
            on_plan=progress.start,
            on_progress=progress.advance,
            on_note=on_note,
            should_stop=should_stop,
        )
    for report in reports:
        if len(reports) > 1:
            console.note(f"\n{report.store}")
        _print(console, report)
    if any(report.n_decoded for report in reports):
        _print_timings(console, reports[0])
    documents = [_document(report) for report in reports]
    console.document(documents[0] if len(documents) == 1 else {"stores": documents})
    if any(report.interrupted for report in reports):
        console.note(f"\nInterrupted. Go on with:\n  {_command_line()}")
        return EXIT_INTERRUPTED
    console.next_steps(_next_steps(reports[0].n_labels, shlex.quote(str(reports[0].store))))
    for report in reports:
        console.result(str(report.store))
    return EXIT_SKIPPED if any(report.failures for report in reports) else EXIT_DONE


def _noting(console: Console) -> Callable[[str], None]:
    return lambda text: console.note(f"Note: {printable(text)}")


def _print_estimate(console: Console, found: Estimate) -> None:
    """Say what would be done."""
    for store in found.stores:
        console.result(str(store.store))
        console.result(
            f"  samples    {store.n_samples:,}: {store.n_cached:,} found in the store, "
            f"{store.n_todo:,} to embed"
        )
        if store.n_removed:
            console.result(f"  leave      {store.n_removed:,} would leave the store's list")
        if engine := found.engines.get(str(store.store)):
            console.result(f"  engine     {engine}")
    room = "" if found.has_room else ": TOO LITTLE"
    console.result(
        f"disk         {format_bytes(found.bytes_needed)} at most, of "
        f"{format_bytes(found.free_bytes)} free{room}"
    )
    if found.n_tried:
        console.result(
            f"speed        {found.images_per_second:,.0f} images/s, measured on {found.n_tried:,}"
        )
        start = format_seconds(found.timings.loading + found.timings.choosing)
        console.result(
            f"time         {format_seconds(found.seconds)}, and {start} until the first image"
        )
        if found.bottleneck:
            console.note(found.bottleneck)
    for sample_id, reason in list(found.failures.items())[:SHOWN_FAILURES]:
        console.note(f"Would be skipped: {printable(sample_id)}: {reason}")
    console.document(
        {
            "dry_run": True,
            "stores": [
                {
                    "store": str(store.store),
                    "n_samples": store.n_samples,
                    "n_cached": store.n_cached,
                    "n_todo": store.n_todo,
                    "n_removed": store.n_removed,
                    "bytes_needed": store.bytes_needed,
                    "engine": found.engines.get(str(store.store)),
                }
                for store in found.stores
            ],
            "bytes_needed": found.bytes_needed,
            "free_bytes": found.free_bytes,
            "has_room": found.has_room,
            "n_tried": found.n_tried,
            "images_per_second": round(found.images_per_second, 2),
            "seconds": round(found.seconds, 1),
            "start_seconds": round(found.timings.loading + found.timings.choosing, 1),
            "failures": found.failures,
            "bottleneck": found.bottleneck,
        }
    )


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
    if not report.n_decoded and not report.failures:
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
    console.note(f"Store: {format_bytes(read_manifest(report.store).size_bytes)}")


def _document(report: ExtractReport) -> dict[str, Any]:
    """What `--json` prints of a store."""
    from pipeline.store.manifest import read_manifest

    manifest = read_manifest(report.store)
    return {
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
        "engine": manifest.provenance.get("engine"),
        "size_bytes": manifest.size_bytes,
        "interrupted": report.interrupted,
    }


def _print_timings(console: Console, report: ExtractReport) -> None:
    """Say where the time went."""
    from pipeline.data.names import counted

    timings = report.timings
    stages = {
        "loading": timings.loading,
        "checking the engine": timings.choosing,
        "waiting for images": timings.waiting,
        "copying": timings.copying,
        "network": timings.network,
        "waiting for the disk": timings.stalled,
    }
    parts = [f"{name} {format_seconds(time)}" for name, time in stages.items() if time >= 0.05]
    console.note(
        f"Time: {', '.join(parts)}; beside it, in {counted(timings.n_threads, 'thread')}, reading "
        f"{format_seconds(timings.reading)} and decoding {format_seconds(timings.decoding)}."
    )
    if timings.bottleneck():
        console.note(timings.bottleneck())


def _command_line() -> str:
    """The command as the user typed it."""
    return shlex.join(["tlpipe", *sys.argv[1:]])
