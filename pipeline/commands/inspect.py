"""``tlpipe inspect``: what a store or a run holds, without torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, format_bytes, output_options, printable
from pipeline.errors import EXIT_DONE, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.store import SampleTable, Store

SHOWN_CLASSES = 20
NO_LABEL = "(none)"


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--failures", is_flag=True, help="List every skipped sample with its reason.")
@output_options
def command(path: Path, failures: bool, as_json: bool, quiet: bool) -> int:
    """Show what the feature store or the run at PATH holds.

    For a store: layers with their shapes, what each column of labels or metadata holds in each
    split, what was skipped and why, and the recipe that decides the features' values. For a run:
    the head or the network, what was chosen, and its scores.

    \b
    Examples:
      tlpipe inspect cache/photos/resnet50-1f3a9c02
      tlpipe inspect cache/photos/resnet50-1f3a9c02 --failures
      tlpipe inspect runs/photos/logreg-resnet50-0001 --json
    """
    console = Console(as_json=as_json, quiet=quiet)
    from pipeline.store.manifest import is_store

    if is_store(path) or path.is_file():
        from pipeline.store import open_store

        store = open_store(path)
        document = describe_store(store, None if as_json else SHOWN_CLASSES)
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


def describe_store(store: Store, max_classes: int | None = None) -> dict[str, Any]:
    """Everything worth knowing about a store, as plain values for JSON.

    Args:
        store: the store.
        max_classes: how many classes of a column to count; None for all. There may be as many as
            samples, where a column holds metadata.
    """
    import numpy as np

    from pipeline.store.table import Status

    manifest, table = store.manifest, store.table
    counts = {name: _counts(column.codes, table) for name, column in table.labels.items()}
    in_splits = _counts(np.zeros(len(table), np.int32), table).sum(axis=0)
    return {
        "path": str(store.path),
        "source": manifest.source,
        "n_samples": len(table),
        "n_with_features": len(store),
        "n_pending": table.count(Status.PENDING),
        "splits": _by_split(in_splits.tolist()),
        "classes": {
            name: _by_class(table.labels[name].categories, counts[name], max_classes)
            for name in counts
        },
        "n_classes": {name: int(n[1:].any(axis=1).sum()) for name, n in counts.items()},
        "relabelled": manifest.relabelled,
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


def _counts(codes: NDArray[np.int32], table: SampleTable) -> NDArray[np.int64]:
    """(n_labels + 1, n_splits) samples with features by label and split; row 0 has no label."""
    import numpy as np

    from pipeline.store.table import SPLIT_NAMES

    ready, n_splits = table.ready, len(SPLIT_NAMES)
    n_rows = int(codes.max(initial=-1)) + 2
    cells = (codes[ready].astype(np.int64) + 1) * n_splits + table.splits[ready]
    counts: NDArray[np.int64] = np.bincount(cells, minlength=n_rows * n_splits)
    return counts.reshape(n_rows, n_splits)


def _by_class(
    labels: Sequence[str], counts: NDArray[np.int64], max_classes: int | None
) -> dict[str, dict[str, int]]:
    """Samples by class and split, of the first classes that have any."""
    present = counts.sum(axis=1).nonzero()[0][:max_classes]
    return {
        labels[i - 1] if i else NO_LABEL: _by_split(row)
        for i, row in zip(present.tolist(), counts[present].tolist(), strict=True)
    }


def _by_split(counts: Sequence[int]) -> dict[str, int]:
    from pipeline.store.table import SPLIT_NAMES

    return {name: n for name, n in zip(SPLIT_NAMES, counts, strict=True) if n}


def _decoding(recipe: dict[str, Any]) -> str:
    """How images are decoded, where that is not as usual."""
    decoding = recipe.get("decoding")
    names = [name for name in ("fast", "gpu") if isinstance(decoding, dict) and name in decoding]
    return ", ".join(names)


def _engines(provenance: dict[str, Any]) -> str:
    """What computed the features: first to last."""
    before = provenance.get("engines")
    engines = [*(before if isinstance(before, list) else []), provenance.get("engine")]
    names = [str(engine.get("name")) for engine in engines if isinstance(engine, dict)]
    return ", then ".join(names)


def _print_store(console: Console, document: dict[str, Any]) -> None:
    source, recipe = document["source"], document["recipe"]
    relabelled = (f"{column} from {file}" for column, file in document["relabelled"].items())
    facts = [
        ("data source", f"{source.get('spec')} ({source.get('layout')})"),
        ("samples", _sample_summary(document)),
        ("splits", _split_summary(document)),
        ("backbone", f"{recipe.get('backbone')}, weights {str(recipe.get('weights'))[:12]}"),
        ("input", _input_summary(recipe)),
        ("precision", f"{recipe.get('precision')}, stored as {recipe.get('storage')}"),
        ("decoding", _decoding(recipe)),
        ("views", str(document["n_views"])),
        ("engine", _engines(document["provenance"])),
        ("size", f"{format_bytes(document['size_bytes'])} in {document['n_shards']} shard(s)"),
        ("key", document["key"]),
        ("columns", ", ".join(f"{name} ({n:,})" for name, n in document["n_classes"].items())),
        ("relabelled", ", ".join(relabelled)),
    ]
    console.result(document["path"])
    for name, value in facts:
        if value:
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
            for label, counts in classes.items()
        ]
        n_classes = document["n_classes"][column]
        n_more = n_classes - len(classes.keys() - {NO_LABEL})
        if n_more:
            rows.append([f"… {n_more:,} more", *("" for _ in splits)])
        console.table(
            [f"{printable(column)} ({n_classes:,})", *(split or "no split" for split in splits)],
            rows,
        )
    if document["failures"]:
        console.result(f"Skipped ({len(document['failures'])}):")
        for sample_id, reason in list(document["failures"].items())[:SHOWN_CLASSES]:
            console.result(f"  {printable(sample_id)}: {reason}")
        if len(document["failures"]) > SHOWN_CLASSES:
            shown = shlex.quote(document["path"])
            console.result(f"  … all of them:  tlpipe inspect {shown} --failures")


def _input_summary(recipe: dict[str, Any]) -> str:
    preprocess = recipe.get("preprocess", {})
    if not isinstance(preprocess, dict):
        return f"{preprocess}; pooling {recipe.get('pooling')}"
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
    if run.get("kind") == "compare":
        _print_comparison(console, path, run)
        return
    facts = _network_facts(run) if run.get("kind") == "finetune" else _head_facts(run)
    console.result(str(path))
    for name, value in facts:
        console.result(f"  {name:<12} {printable(value)}")
    if "tasks" in run:
        _print_tasks(console, run["tasks"])
    else:
        metrics = run["metrics"]
        console.table(
            ["metric", *metrics],
            [
                [name, *(_score(scores[name]) for scores in metrics.values())]
                for name in next(iter(metrics.values()), {})
            ],
        )
    if run.get("kind") == "sweep":
        _print_heads(console, run)
    for note in run["notes"]:
        console.result(printable(note))


def _print_tasks(console: Console, tasks: Sequence[dict[str, Any]]) -> None:
    """A line of scores for each label column."""
    scored = [task["metrics"].get(task["scored_on"], {}) for task in tasks]
    names = list(dict.fromkeys(name for scores in scored for name in scores))
    rows = [
        [
            printable(task["label"]),
            task["scored_on"] or "nothing",
            *(_score(scores[name]) if name in scores else "–" for name in names),
        ]
        for task, scores in zip(tasks, scored, strict=True)
    ]
    console.table(["label", "scored on", *names], rows)


def _labels(run: dict[str, Any]) -> str:
    """The label columns, with how many classes each has, and of several the weight of its loss."""
    tasks = run.get("tasks", [run])
    words = [f"{task['label']}, {len(task['classes'])} classes" for task in tasks]
    if "tasks" in run:
        weights = run["task_weights"]
        words = [f"{text}, weight {w:.2f}" for text, w in zip(words, weights, strict=True)]
    return "; ".join(words)


def _network_facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What is told of a fine-tuned network, before its scores."""
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in run["seconds"].items())
    backbone, trials = run["backbone"], len(run["lr_trials"])
    return [
        ("backbone", f"{backbone['name']}, weights {backbone['weights']}"),
        ("policy", f"{run['policy']}, {run['n_trained']:,} of {run['n_parameters']:,} parameters"),
        ("head", f"started from {run['head_start']}"),
        ("epochs", f"{run['epochs']}, of which {run['best_epoch']} made what was kept"),
        ("lr", f"{run['lr']:g}" + (f", found in {trials} trials" if trials else "")),
        ("chosen by", run["chosen_by"]),
        ("label", _labels(run)),
        ("samples", f"{_split_counts(run)} ({run['split_origin']})"),
        ("seconds", seconds),
        ("command", run.get("command", "")),
    ]


def _split_counts(run: dict[str, Any]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in run["n_samples"].items() if n)


def _head_facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """What is told of a head, before its scores."""
    return [
        ("head", f"{run['head']}, {_setting(run['setting'])}"),
        ("chosen by", f"{run['chosen_by']}, among {len(run['trials'])} settings"),
        ("scaling", run["scaling"]),
        ("features", ", ".join(run["stores"])),
        ("layers", ", ".join(name for layers in run["layers"] for name in layers)),
        ("label", _labels(run)),
        ("samples", f"{_split_counts(run)} ({run['split_origin']})"),
        ("converged", "yes" if run["converged"] else "no"),
        ("seconds", str(run["seconds"]["total"])),
        ("command", run.get("command", "")),
    ]


def _print_comparison(console: Console, path: Path, run: dict[str, Any]) -> None:
    """The table of a comparison, and its verdict."""
    from pipeline.report.compare import compare_table

    console.result(str(path))
    columns, rows = compare_table(run)
    console.table(columns, [[printable(cell) for cell in row] for row in rows])
    for text in (run["verdict"], *run["notes"]):
        console.result(printable(text))


def _print_heads(console: Console, run: dict[str, Any]) -> None:
    """The table of a sweep, and what it recommends."""
    from pipeline.report.heads import table_of

    columns, rows = table_of(run)
    console.table(columns, [[printable(cell) for cell in row] for row in rows])
    console.result(f"{run['head']} is recommended: {printable(run['why'])}.")


def _setting(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def _score(score: dict[str, float]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
