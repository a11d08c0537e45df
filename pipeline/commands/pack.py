"""``tlpipe pack``: a feature store as one ordinary HDF5 file."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from pipeline.commands.console import Console, format_bytes, output_options
from pipeline.errors import EXIT_DONE


@click.command()
@click.argument("store", type=click.Path(path_type=Path), metavar="STORE")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.h5")
@output_options
def command(store: Path, out: Path, as_json: bool, quiet: bool) -> int:
    """Put the feature store STORE into the one HDF5 file OUT.h5.

    The file is self-describing: id, split, label/<column> and features/<layer> at its top are
    aligned, and three lines of h5py, or any other HDF5 reader, read it. Wherever tlpipe takes a
    STORE to read, it takes this file; `tlpipe unpack` makes the folder of it again. The file names
    the folder that the images were in.

    \b
    Examples:
      tlpipe pack cache/photos/resnet50-1f3a9c02 photos.h5
      tlpipe fit-head photos.h5
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.store import open_store
    from pipeline.store.pack import pack_store
    from pipeline.store.table import Status

    opened = open_store(store)
    pack_store(opened, out)
    size_bytes = out.stat().st_size
    n_failed, n_pending = (opened.table.count(s) for s in (Status.FAILED, Status.PENDING))
    console.document(
        {
            "path": str(out),
            "n_samples": len(opened.table),
            "n_with_features": len(opened),
            "n_failed": n_failed,
            "n_pending": n_pending,
            "layers": list(opened.layers),
            "size_bytes": size_bytes,
        }
    )
    console.note(f"{len(opened):,} samples with their features: {format_bytes(size_bytes)}")
    if n_failed or n_pending:
        skipped = [f"{n_failed:,} skipped"] if n_failed else []
        pending = [f"{n_pending:,} not embedded yet"] if n_pending else []
        console.note(f"Listed without features: {', '.join([*skipped, *pending])}.")
    shown = shlex.quote(str(out))
    console.next_steps([f"tlpipe inspect {shown}", f"tlpipe unpack {shown}"])
    console.result(str(out))
    return EXIT_DONE
