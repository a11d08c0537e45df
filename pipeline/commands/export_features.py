"""``tlpipe export-features``: features and labels for other tools."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.console import Console, format_bytes, output_options, printable
from pipeline.errors import EXIT_DONE

if TYPE_CHECKING:
    from pipeline.store.export import Selection

_SUFFIXES = {"npy": "-npy", "parquet": ".parquet", "csv": ".csv"}


@click.command()
@click.argument("store", type=click.Path(path_type=Path), metavar="STORE")
@click.option(
    "--to",
    "file_format",
    type=click.Choice(list(_SUFFIXES)),
    required=True,
    help="npy: a folder of arrays and samples.csv; parquet or csv: one table.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File, or folder for npy, to write.  [default: named after the store, here]",
)
@click.option("--layers", help="Comma-separated layers.  [default: all]")
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    help="Only this split.  [default: all samples]",
)
@output_options
def command(
    store: Path,
    file_format: str,
    output: Path | None,
    layers: str | None,
    split: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Write the features of STORE, with ids, splits and labels, for other tools.

    STORE is a feature store or a file of `tlpipe pack`. Rows stand in the store's order; samples
    that have no features are left out; of several views the plain one is written.

    \b
    npy      <layer>.npy for each layer, as stored, and samples.csv: row i is line i of it
    parquet  columns id, split, labels, and a list of float32 for each layer; for pandas, DuckDB,
             Polars, Embedding Atlas (needs pyarrow: pip install 'tlpipe[parquet]')
    csv      columns id, split, labels, f0, f1, …; texts are written as they are, so tell a
             spreadsheet to take them as text: a name that begins with = is a formula to it

    \b
    Examples:
      tlpipe export-features cache/photos/resnet50-1f3a9c02 --to parquet
      tlpipe export-features photos.h5 --to npy --layers penultimate --output arrays
      tlpipe export-features photos.h5 --to csv --split train
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.store import open_store
    from pipeline.store.export import Selection, export_csv, export_npy
    from pipeline.store.key import canonical_json

    opened = open_store(store)
    names = [name.strip() for name in layers.split(",") if name.strip()] if layers else None
    selection = Selection(opened, None if names == ["all"] else names, split)
    path = output or _default_path(store, file_format, split)
    if file_format == "npy":
        export_npy(selection, path)
    elif file_format == "csv":
        export_csv(selection, path)
    else:
        from pipeline.commands.parquet import export_parquet

        recipe = canonical_json(opened.recipe).decode()
        export_parquet(selection, path, {"tlpipe.key": opened.key, "tlpipe.recipe": recipe})
    size_bytes = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
    console.document(
        {
            "path": str(path),
            "format": file_format,
            "n_samples": len(selection),
            "layers": {name: list(layer.shape[1:]) for name, layer in selection.layers.items()},
            "columns": list(selection.columns),
            "size_bytes": size_bytes,
        }
    )
    if opened.n_views > 1:
        console.note(f"Note: of {opened.n_views} views the plain one was written.")
    for note in _notes(selection, file_format):
        console.note(printable(f"Note: {note}"))
    shapes = [
        f"{name} {' × '.join(map(str, layer.shape[1:]))}"
        for name, layer in selection.layers.items()
    ]
    console.note(
        printable(f"{len(selection):,} samples, {', '.join(shapes)}: {format_bytes(size_bytes)}")
    )
    console.next_steps(map(printable, _next_steps(selection, file_format, path)))
    console.result(str(path))
    return EXIT_DONE


def _default_path(store: Path, file_format: str, split: str | None) -> Path:
    """Here, named after the store: ``photos-resnet50-1f3a9c02-train.parquet``."""
    place = store.resolve()
    name = place.stem if place.is_file() else f"{place.parent.name}-{place.name}"
    return Path(name + (f"-{split}" if split else "") + _SUFFIXES[file_format])


def _notes(selection: Selection, file_format: str) -> Iterator[str]:
    maps = [name for name, layer in selection.layers.items() if layer.ndim > 2]
    if maps and file_format != "npy":
        yield f"the maps of {', '.join(maps)} are written flattened; --to npy keeps their shape."
    texts = {text for column in selection.columns.values() for text in column if text}
    n_formulas = sum(text.startswith(("=", "+", "-", "@")) for text in texts)
    if n_formulas and file_format != "parquet":
        yield (
            f"{n_formulas:,} ids or labels begin with = + - or @. They are written as they are; "
            "a spreadsheet must import them as text."
        )


def _next_steps(selection: Selection, file_format: str, path: Path) -> list[str]:
    """Commands that show what was written."""
    from pipeline.store.export import npy_name

    layer, shown = next(iter(selection.layers)), shlex.quote(str(path))
    if file_format == "csv":
        return [f"cut -d, -f1-{len(selection.columns) + 3} {shown} | head"]
    if file_format == "npy":
        file = json.dumps(str(path / npy_name(layer)))
        return [f"python -c {shlex.quote(f'import numpy; print(numpy.load({file}).shape)')}"]
    code = f"import pyarrow.parquet as pq; print(pq.read_table({json.dumps(str(path))}))"
    return [
        f"python -c {shlex.quote(code)}",
        f"embedding-atlas {shown} --vector {shlex.quote(layer)}",
    ]
