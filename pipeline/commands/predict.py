"""``tlpipe predict``: head -> classes of new images."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands.console import Console, Progress, output_options, printable
from pipeline.errors import EXIT_DONE, EXIT_SKIPPED, DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.finetune.bundle import NetworkBundle
    from pipeline.heads.tasks import Task
    from pipeline.runs.bundle import Bundle


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "csv", "jsonl"]),
    default="table",
    show_default=True,
    help="How the predictions are printed.",
)
@click.option(
    "--top",
    "n_top",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Classes an image, likeliest first.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@output_options
def command(
    run: Path,
    images: tuple[str, ...],
    output_format: str,
    n_top: int,
    device: str,
    as_json: bool,
    quiet: bool,
) -> int:
    """Classify IMAGES with the head or the network of RUN; a folder stands for every image in it.

    For a head, the backbone is loaded as it was when the features were extracted, and refused if
    its weights or its preprocessing are no longer the same; a fine-tuned network brings its own.
    A run that learned several label columns gives one line an image and column. Images that cannot
    be read are listed on stderr and make the exit code 3.

    \b
    Examples:
      tlpipe predict runs/photos/logreg-resnet50-0001 new.jpg
      tlpipe predict runs/photos/logreg-resnet50-0001 inbox/ --format csv > predicted.csv
      tlpipe predict runs/photos/logreg-resnet50-0001 inbox/ --top 3
    """
    console = Console(as_json=as_json, quiet=quiet)
    files = find_images(images)
    from pipeline.runs.bundle import is_network

    with Progress("Classifying", quiet=quiet) as progress:
        if is_network(run):
            from pipeline.finetune.bundle import load_network

            network = load_network(run)
            progress.start(len(files), len(files))
            predictions, failures = classify_with_network(
                network, files, n_top=n_top, device=device, on_progress=progress.advance
            )
        else:
            from pipeline.runs.bundle import load_bundle

            bundle = load_bundle(run)
            progress.start(len(files), len(files) * len(bundle.inputs))
            predictions, failures = classify(
                bundle, files, n_top=n_top, device=device, on_progress=progress.advance
            )
    for file, reason in failures.items():
        console.note(f"Skipped {printable(file)}: {reason}")
    if not predictions:
        raise DataError(
            "None of the images can be used.\n"
            + "\n".join(f"  {printable(file)}: {why}" for file, why in list(failures.items())[:5])
        )
    if as_json:
        console.document(
            {"predictions": [one.to_dict() for one in predictions], "failures": failures}
        )
    else:
        _print(console, predictions, output_format)
    return EXIT_SKIPPED if failures else EXIT_DONE


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image in one label column.

    Attributes:
        image: the file.
        classes: likeliest first.
        probabilities: of those classes.
        task: the label column, of a run that learned several; "" of one that learned one.
    """

    image: str
    classes: list[str]
    probabilities: list[float]
    task: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        task = {"task": self.task} if self.task else {}
        return {
            "image": self.image,
            **task,
            "classes": self.classes,
            "probabilities": self.probabilities,
        }


def find_images(paths: Sequence[str]) -> list[str]:
    """Files as given, and every image below each folder, sorted.

    Raises:
        UsageError: a path does not exist, or a folder holds no image.
    """
    from pipeline.data.folders import read_tree

    files: list[str] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for _, file in read_tree(name, "", ()).images)
            if not found:
                raise UsageError(f"There is no image in {name}.")
            files += found
        elif path.exists():
            files.append(name)
        else:
            raise UsageError(f"There is no image or folder {name}.")
    return files


def classify(
    bundle: Bundle,
    files: Sequence[str],
    *,
    n_top: int = 1,
    device: str = "auto",
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[list[Prediction], dict[str, str]]:
    """Embed files as the head's features were, and classify them.

    Args:
        bundle: the fitted model.
        files: images.
        n_top: classes an image.
        device: where the backbone runs.
        on_progress: is told how many more images are done.

    Returns:
        One prediction for each image that can be read and each label column, in order; and why
        others cannot, by file.
    """
    import numpy as np

    from pipeline.data.names import to_id
    from pipeline.extract.embed import embed_files, embedder_for

    embedded = []
    for block in bundle.inputs:
        embedder = embedder_for(block.recipe, block.origin, n_files=len(files), device=device)
        embedded.append(embed_files(embedder, files, on_progress))
    failures = {i: why for one in embedded for i, why in one.failures.items()}
    failed = {to_id(files[i]): why for i, why in sorted(failures.items())}
    usable = [i for i in range(len(files)) if i not in failures]
    if not usable:
        return [], failed
    features = [
        np.concatenate(
            [one.layers[name][np.searchsorted(one.indices, usable)] for name in block.layers],
            axis=1,
        )
        for block, one in zip(bundle.inputs, embedded, strict=True)
    ]
    images = [to_id(files[i]) for i in usable]
    return _likeliest(images, bundle.tasks, bundle.predict_proba(features), n_top), failed


def classify_with_network(
    bundle: NetworkBundle,
    files: Sequence[str],
    *,
    n_top: int = 1,
    device: str = "auto",
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[list[Prediction], dict[str, str]]:
    """Classify files with a fine-tuned network; see :func:`classify`."""
    from pipeline.data.names import to_id

    rows, usable, failures = bundle.classify(files, device=device, on_progress=on_progress)
    failed = {to_id(files[i]): why for i, why in failures.items()}
    return _likeliest([to_id(files[i]) for i in usable], bundle.tasks, rows, n_top), failed


def _likeliest(
    images: Sequence[str], tasks: Sequence[Task], rows: NDArray[np.float64], n_top: int
) -> list[Prediction]:
    """The likeliest classes of each image, from its probabilities of all tasks side by side."""
    import numpy as np

    from pipeline.heads.tasks import task_slices

    parts = task_slices([len(task.classes) for task in tasks])
    predictions = []
    for image, row in zip(images, rows, strict=True):
        for task, part in zip(tasks, parts, strict=True):
            best = np.argsort(-row[part], kind="stable")[:n_top]
            likely = [round(float(row[part][k]), 6) for k in best]
            label = task.label if len(tasks) > 1 else ""
            predictions.append(Prediction(image, [task.classes[k] for k in best], likely, label))
    return predictions


def _print(console: Console, predictions: list[Prediction], output_format: str) -> None:
    columns = ["image", "task"] if predictions[0].task else ["image"]
    for rank in range(max(len(one.classes) for one in predictions)):
        mark = "" if rank == 0 else f"_{rank + 1}"
        columns += [f"class{mark}", f"probability{mark}"]
    if output_format == "jsonl":
        for one in predictions:
            console.result(json.dumps(one.to_dict(), ensure_ascii=False))
    elif output_format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(_cells(one, len(columns)) for one in predictions)
    else:
        rows = [_cells(one, len(columns)) for one in predictions]
        console.table(columns, [[printable(cell) for cell in row] for row in rows])


def _cells(one: Prediction, n_columns: int) -> list[str]:
    """A line of a table; blank where a task has fewer classes than others."""
    cells = [one.image, one.task] if one.task else [one.image]
    for name, probability in zip(one.classes, one.probabilities, strict=True):
        cells += [name, f"{probability:.4f}"]
    return cells + [""] * (n_columns - len(cells))
