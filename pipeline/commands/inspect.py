"""``tlpipe inspect``: what a store or a run holds, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, format_bytes, output_options, printable
from pipeline.errors import EXIT_DONE, StoreError

if TYPE_CHECKING:
    from pipeline.store import Store

SHOWN_CLASSES = 20


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--failures", is_flag=True, help="List every skipped sample with its reason.")
@output_options
def command(path: Path, failures: bool, as_json: bool, quiet: bool) -> int:
    """Show what the feature store or the run at PATH holds.

    For a store: layers with their shapes, samples and classes of each split, what was skipped
    and why, and the recipe that decides the features' values. For a run: the head, the setting
    that was chosen, and its scores.

    \b
    Examples:
      tlpipe inspect cache/photos/resnet50-1f3a9c02
      tlpipe inspect cache/photos/resnet50-1f3a9c02 --failures
      tlpipe inspect runs/photos/logreg-resnet50-0001 --json
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.store.manifest import is_store

    if is_store(path):
        from pipeline.store import open_store

        store = open_store(path)
        document = describe_store(store)
        console.document(document)
        if failures:
            for sample_id, reason in store.failures.items():
                console.result(f"{printable(sample_id)}: {reason}")
        else:
            _print_store(console, document)
    elif (path / "run.json").is_file():
        _inspect_run(console, path)
    else:
        raise StoreError(
            f"{path} is neither a feature store nor a run: it has no store.json or run.json.\n"
            "  List what there is:  tlpipe ls"
        )
    return EXIT_DONE


def describe_store(store: Store) -> dict[str, Any]:
    """Everything worth knowing about a store, as plain values for JSON."""
    from pipeline.store.table import SPLIT_NAMES, Status

    manifest, table = store.manifest, store.table
    splits = store.splits().tolist()
    return {
        "path": str(store.path),
        "source": manifest.source,
        "n_samples": len(table),
        "n_with_features": len(store),
        "n_pending": table.count(Status.PENDING),
        "splits": {name: splits.count(name) for name in SPLIT_NAMES if name in splits},
        "classes": {
            column: _class_counts(store.labels(column).tolist(), splits)
            for column in store.label_columns
        },
        "layers": {
            name: {"shape": list(layer.shape), "dtype": layer.dtype}
            for name, layer in manifest.layers.items()
        },
        "n_views": manifest.n_views,
        "n_shards": len(manifest.shards),
        "size_bytes": manifest.size_bytes,
        "key": manifest.key,
        "recipe": manifest.recipe,
        "failures": store.failures,
        "provenance": manifest.provenance,
    }


def _class_counts(labels: list[str | None], splits: list[str]) -> dict[str, dict[str, int]]:
    """Samples by class and split."""
    counts: dict[str, dict[str, int]] = {}
    for label, split in zip(labels, splits, strict=True):
        of_class = counts.setdefault("(none)" if label is None else label, {})
        of_class[split] = of_class.get(split, 0) + 1
    return dict(sorted(counts.items()))


def _print_store(console: Console, document: dict[str, Any]) -> None:
    source, recipe = document["source"], document["recipe"]
    facts = [
        ("data source", f"{source.get('spec')} ({source.get('layout')})"),
        ("samples", _sample_summary(document)),
        ("splits", _split_summary(document)),
        ("backbone", f"{recipe.get('backbone')}, weights {str(recipe.get('weights'))[:12]}"),
        ("input", _input_summary(recipe)),
        ("precision", f"{recipe.get('precision')}, stored as {recipe.get('storage')}"),
        ("views", str(document["n_views"])),
        ("size", f"{format_bytes(document['size_bytes'])} in {document['n_shards']} shard(s)"),
        ("key", document["key"]),
    ]
    console.result(document["path"])
    for name, value in facts:
        console.result(f"  {name:<12} {printable(value)}")
    console.table(
        ["layer", "shape", "dtype"],
        [
            [name, " × ".join(map(str, layer["shape"])), layer["dtype"]]
            for name, layer in document["layers"].items()
        ],
    )
    for column, classes in document["classes"].items():
        splits = list(document["splits"])
        rows = [
            [printable(label), *(f"{counts.get(split, 0):,}" for split in splits)]
            for label, counts in list(classes.items())[:SHOWN_CLASSES]
        ]
        if len(classes) > SHOWN_CLASSES:
            rows.append([f"… {len(classes) - SHOWN_CLASSES} more classes", *("" for _ in splits)])
        console.table(
            [f"{column} ({len(classes)})", *(split or "no split" for split in splits)], rows
        )
    if document["failures"]:
        console.result(f"Skipped ({len(document['failures'])}):")
        for sample_id, reason in list(document["failures"].items())[:SHOWN_CLASSES]:
            console.result(f"  {printable(sample_id)}: {reason}")
        if len(document["failures"]) > SHOWN_CLASSES:
            console.result(f"  … all of them:  tlpipe inspect {document['path']} --failures")


def _input_summary(recipe: dict[str, Any]) -> str:
    preprocess = recipe.get("preprocess", {})
    size = f"{preprocess.get('height')}×{preprocess.get('width')} px"
    resize = f"resized to {preprocess.get('resize')}, {preprocess.get('interpolation')}"
    return f"{size}, {resize}; pooling {recipe.get('pooling')}"


def _sample_summary(document: dict[str, Any]) -> str:
    parts = [f"{document['n_with_features']:,} with features"]
    if document["failures"]:
        parts.append(f"{len(document['failures']):,} skipped")
    if document["n_pending"]:
        parts.append(f"{document['n_pending']:,} not embedded yet")
    return f"{document['n_samples']:,}: " + ", ".join(parts)


def _split_summary(document: dict[str, Any]) -> str:
    counts = [f"{name or 'none'} {n:,}" for name, n in document["splits"].items()]
    origin = document["source"].get("split_origin", "")
    return ", ".join(counts) + (f" ({origin})" if origin else "")


def _inspect_run(console: Console, path: Path) -> None:
    from pipeline.runs.folder import read_run

    run = read_run(path)
    console.document({"path": str(path), **run})
    n_samples = ", ".join(f"{name} {n:,}" for name, n in run["n_samples"].items() if n)
    facts = [
        ("head", f"{run['head']}, {_setting(run['setting'])}"),
        ("chosen by", f"{run['chosen_by']}, among {len(run['trials'])} settings"),
        ("scaling", run["scaling"]),
        ("features", ", ".join(run["stores"])),
        ("layers", ", ".join(name for layers in run["layers"] for name in layers)),
        ("label", f"{run['label']}, {len(run['classes'])} classes"),
        ("samples", f"{n_samples} ({run['split_origin']})"),
        ("converged", "yes" if run["converged"] else "no"),
        ("seconds", str(run["seconds"]["total"])),
        ("command", run.get("command", "")),
    ]
    console.result(str(path))
    for name, value in facts:
        console.result(f"  {name:<12} {printable(value)}")
    metrics = run["metrics"]
    console.table(
        ["metric", *metrics],
        [
            [name, *(_score(scores[name]) for scores in metrics.values())]
            for name in next(iter(metrics.values()), {})
        ],
    )
    for note in run["notes"]:
        console.result(printable(note))


def _setting(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def _score(score: dict[str, float]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
