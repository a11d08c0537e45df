"""``tlpipe relabel``: other labels, splits and columns for a store, without torch."""

from __future__ import annotations

import posixpath
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.console import Console, output_options, printable
from pipeline.errors import EXIT_DONE, ManifestError, StoreError, UsageError

if TYPE_CHECKING:
    from pipeline.store.relabel import NewColumns, RelabelReport

SHOWN_UNKNOWN = 5


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("manifest", required=False, type=click.Path(path_type=Path))
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="The images' folder as the manifest spells it, where its paths begin with one.",
)
@click.option(
    "--reset", is_flag=True, help="Let the next extract take every column from the data again."
)
@output_options
def command(
    store: Path, manifest: Path | None, root: Path | None, reset: bool, as_json: bool, quiet: bool
) -> int:
    """Change labels, splits and other columns of STORE to those in MANIFEST.

    MANIFEST is a .csv or .parquet file as `tlpipe extract` takes it: a column path (or id, as the
    store spells it), perhaps split, and any others. A column replaces the one of its name or is
    added; an empty cell is a missing label; samples that are not listed keep what they have.
    Nothing is embedded again, and the images need not be there. A later extract keeps what was
    set here, until --reset.

    \b
    Examples:
      tlpipe relabel cache/photos/resnet50-1f3a9c02 species.csv
      tlpipe relabel cache/photos/resnet50-1f3a9c02 species.csv --root photos/
      tlpipe relabel cache/photos/resnet50-1f3a9c02 --reset
    """
    console = Console(as_json=as_json, quiet=quiet)
    if (manifest is None) != reset:
        raise UsageError(
            "Give a manifest with the new columns, or --reset to take the data source's again."
        )
    if store.is_file():
        raise StoreError(
            f"{store} is one file; what can be changed is a store's folder.\n"
            f"  Make one of it:  tlpipe unpack {shlex.quote(str(store))}"
        )
    if manifest is None:
        _reset(console, store)
    else:
        _relabel(console, store, manifest, root)
    console.result(str(store))
    return EXIT_DONE


def _relabel(console: Console, store: Path, manifest: Path, root: Path | None) -> None:
    from pipeline.store.relabel import SPLIT, relabel

    new, notes = _read(store, manifest, root)
    report = relabel(store, new)
    for note in notes:
        console.note(f"Note: {printable(note)}")
    if report.n_unlisted:
        console.note(
            f"Note: {report.n_unlisted:,} samples of the store are not listed: they keep what "
            "they had."
        )
    if report.unknown:
        shown = ", ".join(repr(sample_id) for sample_id in report.unknown[:SHOWN_UNKNOWN])
        console.note(
            f"Note: {len(report.unknown):,} of the listed are not in the store: {shown}"
            + (", …" if len(report.unknown) > SHOWN_UNKNOWN else "")
        )
    console.document(
        {
            "store": str(store),
            "manifest": str(manifest),
            "columns": {name: vars(change) for name, change in report.columns.items()},
            "n_values": report.n_values,
            "splits": report.splits,
            "n_listed": report.n_listed,
            "n_unlisted": report.n_unlisted,
            "unknown": report.unknown,
        }
    )
    console.table(
        ["column", "change", "samples changed", "values"],
        [
            [
                printable(name),
                "added" if change.is_new else "replaced" if change.n_changed else "as it was",
                f"{change.n_changed:,} of {report.n_listed:,} listed",
                "" if name == SPLIT else f"{report.n_values[name]:,}",
            ]
            for name, change in report.columns.items()
        ],
    )
    if report.splits is not None:
        counts = (f"{name or 'none'} {n:,}" for name, n in report.splits.items())
        console.result(f"Splits of the listed samples: {', '.join(counts)}")
    console.next_steps(_next_steps(shlex.quote(str(store)), report))


def _read(store: Path, manifest: Path, root: Path | None) -> tuple[NewColumns, list[str]]:
    """The new columns, with their samples named as the store may name them, and notes."""
    from pipeline.data.folders import absolute
    from pipeline.data.manifest import read_rows
    from pipeline.data.names import to_id
    from pipeline.store.manifest import read_manifest
    from pipeline.store.relabel import NewColumns

    recorded = Path(str(read_manifest(store).source.get("root", "/")))
    if manifest.suffix.lower() not in (".csv", ".parquet"):
        raise UsageError(
            f"{manifest} is no manifest: expected a file that ends in .csv or .parquet."
        )
    rows = read_rows(manifest, absolute(root or recorded), keys=("path", "id"))
    ids = [sample.id for sample in rows.samples]
    if root is not None:
        prefix = to_id(posixpath.normpath(root.as_posix())) + "/"
        ids = [sample_id.removeprefix(prefix) for sample_id in ids]
        if len(set(ids)) < len(ids):
            raise ManifestError(f"{manifest} lists an image both with and without {prefix!r}.")
    labels = {
        name: [sample.labels[k] for sample in rows.samples]
        for k, name in enumerate(rows.label_columns)
    }
    splits = [sample.split for sample in rows.samples] if rows.has_split else None
    if not labels and splits is None:
        raise ManifestError(f"{manifest} has nothing to set: no column but that of the samples.")
    return NewColumns(to_id(manifest.name), ids, labels, splits), rows.notes


def _next_steps(store: str, report: RelabelReport) -> list[str]:
    """Commands that will work on this store; a column that was just set comes first."""
    columns = [name for name, n_values in report.n_values.items() if n_values > 1]
    columns.sort(key=lambda name: (name not in report.columns, name != "label"))
    learn = [
        f"tlpipe fit-head {store} --label {printable(shlex.quote(name))}" for name in columns[:1]
    ]
    return [*learn, f"tlpipe inspect {store}"]


def _reset(console: Console, store: Path) -> None:
    from pipeline.store.relabel import forget_relabelling

    forgotten = forget_relabelling(store)
    console.document({"store": str(store), "forgotten": forgotten})
    if not forgotten:
        console.note("No column was set by `tlpipe relabel`; nothing to forget.")
        return
    console.result(f"Forgotten: {', '.join(printable(name) for name in forgotten)}")
    console.note("The next `tlpipe extract` of the same data takes them from the data again.")
