"""``tlpipe unpack``: a packed file as a feature store again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.console import Console, cache_option, format_bytes, output_options
from pipeline.errors import EXIT_DONE

if TYPE_CHECKING:
    from pipeline.store import Store


@click.command()
@click.argument("packed", type=click.Path(path_type=Path), metavar="FILE.h5")
@click.argument("folder", type=click.Path(path_type=Path), required=False, metavar="[FOLDER]")
@cache_option
@output_options
def command(packed: Path, folder: Path | None, cache_dir: Path, as_json: bool, quiet: bool) -> int:
    """Make a feature store of FILE.h5, a file of `tlpipe pack`.

    Without FOLDER it goes where `tlpipe extract` will look for it, into
    cache/<data source>/<backbone>-<key>: extracting the same data again then embeds nothing. What
    is there already is never overwritten. Interrupted, the same command goes on where it stopped.

    \b
    Examples:
      tlpipe unpack photos.h5
      tlpipe unpack photos.h5 stores/photos
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.store import open_store
    from pipeline.store.manifest import read_manifest
    from pipeline.store.unpack import unpack_store

    store = open_store(packed)
    target = folder or _place(store, cache_dir)
    unpack_store(store, target)
    manifest = read_manifest(target)
    console.document(
        {
            "store": str(target),
            "n_samples": len(store.table),
            "n_with_features": len(store),
            "n_shards": len(manifest.shards),
            "size_bytes": manifest.size_bytes,
        }
    )
    console.note(
        f"{len(store):,} samples with their features: {format_bytes(manifest.size_bytes)} "
        f"in {len(manifest.shards)} shard(s)"
    )
    shown = shlex.quote(str(target))
    fit = [f"tlpipe fit-head {shown}"] if store.label_columns else []
    console.next_steps([*fit, f"tlpipe inspect {shown}"])
    console.result(str(target))
    return EXIT_DONE


def _place(store: Store, cache_dir: Path) -> Path:
    """Where ``tlpipe extract`` looks for the store; names of a stranger's file are made safe."""
    from pipeline.data.names import safe_name

    backbone = str(store.recipe.get("backbone", "features")).removeprefix("torchvision:")
    name = f"{safe_name(backbone.replace(':', '-'))}-{store.key[:8]}"
    return cache_dir / safe_name(str(store.source.get("name", "data"))) / name
