"""``tlpipe ls``: the stores and runs that are here, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pipeline.commands.console import (
    Console,
    cache_option,
    format_bytes,
    output_options,
    runs_option,
)
from pipeline.errors import EXIT_DONE, ResourceError, StoreError


@click.command()
@cache_option
@runs_option
@output_options
def command(cache_dir: Path, runs_dir: Path, as_json: bool, quiet: bool) -> int:
    """List the feature stores of the cache and the runs.

    \b
    Examples:
      tlpipe ls
      tlpipe ls --cache /data/cache --json
    """
    console = Console(as_json=as_json, quiet=quiet)
    stores = list(_stores(cache_dir, console))
    runs = list(_runs(runs_dir, console))
    console.document({"stores": stores, "runs": runs})
    if stores:
        console.table(
            ["store", "pixels", "layers", "pooling", "samples", "size"],
            [
                [
                    s["path"],
                    s["input"],
                    str(len(s["layers"])),
                    s["pooling"],
                    f"{s['n_with_features']:,} of {s['n_samples']:,}",
                    format_bytes(s["size_bytes"]),
                ]
                for s in stores
            ],
        )
    if runs:
        console.table(
            ["run", "head", "split", "top-1"],
            [[r["path"], r["head"], r["split"], r["top1"]] for r in runs],
        )
    if not stores and not runs:
        console.note(f"No store in {cache_dir}/ and no run in {runs_dir}/ yet.")
        console.next_steps(["tlpipe demo", "tlpipe extract FOLDER"])
    return EXIT_DONE


def _stores(cache_dir: Path, console: Console) -> Iterator[dict[str, Any]]:
    from pipeline.store import open_store
    from pipeline.store.manifest import BACKUP_FILE, MANIFEST_FILE
    from pipeline.store.unpack import UNFINISHED_SUFFIX

    names = (MANIFEST_FILE, BACKUP_FILE)
    for path in sorted({p.parent for name in names for p in cache_dir.glob(f"*/*/{name}")}):
        if path.name.endswith(UNFINISHED_SUFFIX):
            console.note(f"Warning: {path} is what an unfinished tlpipe unpack left so far.")
            continue
        try:
            store = open_store(path)
        except (ResourceError, StoreError) as error:
            console.note(f"Warning: {error}")
            continue
        yield {
            "path": str(path),
            "backbone": str(store.recipe.get("backbone", "")),
            "input": _pixels(store.recipe.get("preprocess")),
            "layers": list(store.layers),
            "pooling": str(store.recipe.get("pooling", "")),
            "n_samples": len(store.table),
            "n_with_features": len(store),
            "size_bytes": store.manifest.size_bytes,
        }


def _pixels(preprocess: Any) -> str:
    """Height and width of the input; whatever else a store's recipe says of it as it is."""
    if not isinstance(preprocess, dict):
        return str(preprocess or "")
    return f"{preprocess.get('height')}×{preprocess.get('width')}"


def _runs(runs_dir: Path, console: Console) -> Iterator[dict[str, Any]]:
    from pipeline.runs.folder import RUN_FILE, read_run

    for path in sorted(runs_dir.glob(f"*/*/{RUN_FILE}")):
        try:
            run = read_run(path.parent)
        except (ResourceError, StoreError) as error:
            console.note(f"Warning: {error}")
            continue
        split = run["scored_on"]
        top1 = run["metrics"].get(split, {}).get("top1")
        yield {
            "path": str(path.parent),
            "head": run["head"],
            "split": split,
            "top1": _score(top1, len(run.get("tasks", []))) if top1 else "",
        }


def _score(score: dict[str, float], n_tasks: int) -> str:
    if n_tasks:
        return f"{score['value']:.3f} (mean of {n_tasks} labels)"
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
