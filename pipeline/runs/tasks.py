"""What a run found out about one of its label columns."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.heads.metrics import Score, confusion_matrix, evaluate
from pipeline.heads.tasks import NO_LABEL, Task
from pipeline.runs.folder import safe_name
from pipeline.runs.predictions import Predictions

Array = NDArray[Any]

MEAN_NOTE = (
    "The metrics of the run are means over its labels, without an interval; those of each label "
    "have one."
)


@dataclass(frozen=True)
class TaskResult:
    """What a run found out about one label column.

    Attributes:
        task: the column and the classes that can be predicted.
        scored_on: "test", or "val" where there is no test split; "" where nothing could be scored.
        scores: metrics of "test" and "val", as far as there are.
        confusion: (n_classes, n_classes) of ``scored_on``, true class by row.
        score_classes: the classes of ``confusion``: the task's, then those only test has.
        predictions: of the samples of ``scored_on`` that have a label in this column.
        n_samples: samples with a label in this column, by split.
        data_digest: what the run would have had as ``data_digest``, had it learned this column
            alone; "" where nobody worked it out.
    """

    task: Task
    scored_on: str
    scores: dict[str, dict[str, Score]]
    confusion: NDArray[np.int64]
    score_classes: tuple[str, ...]
    predictions: Predictions
    n_samples: dict[str, int]
    data_digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **self.task.to_dict(),
            "scored_on": self.scored_on,
            "metrics": {
                split: {name: score.to_dict() for name, score in scores.items()}
                for split, scores in self.scores.items()
            },
            "n_samples": self.n_samples,
            **({"data_digest": self.data_digest} if self.data_digest else {}),
        }

    def write_predictions(self, folder: Path) -> None:
        """Write ``predictions-<label>.csv``."""
        self.predictions.write(folder / task_file(self.task.label))


def task_file(label: str) -> str:
    """Name of the file with a task's predictions; no two labels share one."""
    name = safe_name(label)
    if name != label:
        name += f"-{hashlib.sha256(label.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return f"predictions-{name}.csv"


def mean_scores(results: Sequence[TaskResult]) -> dict[str, dict[str, Score]]:
    """Means over the tasks, of the splits and metrics that all of them have.

    A mean of intervals would be none, so low and high are the value.
    """
    first, *others = (result.scores for result in results)
    means: dict[str, dict[str, Score]] = {}
    for split in (split for split in first if all(split in other for other in others)):
        parts = [result.scores[split] for result in results]
        names = [name for name in parts[0] if all(name in part for part in parts)]
        values = {name: float(np.mean([part[name].value for part in parts])) for name in names}
        means[split] = {name: Score(value, value, value) for name, value in values.items()}
    return means


def score_task(
    task: Task,
    unseen: tuple[str, ...],
    codes: NDArray[np.int64],
    parts: Mapping[str, tuple[NDArray[np.intp], NDArray[np.float64]]],
    *,
    ids: Array,
    splits: Array,
    seed: int,
) -> TaskResult:
    """Score one task's probabilities on the samples that have a label in it.

    Args:
        task: its column and classes.
        unseen: classes that only test has.
        codes: (n_samples,) of all samples; NO_LABEL without a label, from len(task.classes) on
            for the unseen ones.
        parts: "test" and "val" as far as there are, in the order in which they are preferred:
            (n_rows,) rows and their (n_rows, n_classes) probabilities.
        ids: (n_samples,) of all samples.
        splits: (n_samples,) of all samples.
        seed: of the intervals.
    """
    n_classes = len(task.classes) + len(unseen)
    labelled: dict[str, tuple[NDArray[np.intp], NDArray[np.float64]]] = {}
    for split, (rows, probabilities) in parts.items():
        has_label = codes[rows] != NO_LABEL
        if has_label.any():
            padding = ((0, 0), (0, n_classes - probabilities.shape[1]))
            labelled[split] = rows[has_label], np.pad(probabilities[has_label], padding)
    scored_on = next(iter(labelled), "")
    nothing = np.array([], np.intp), np.zeros((0, n_classes))
    rows, probabilities = labelled.get(scored_on, nothing)
    predicted = probabilities.argmax(axis=1)
    names = np.array((*task.classes, *unseen), dtype=object)
    values, counts = np.unique(splits[codes != NO_LABEL], return_counts=True)
    return TaskResult(
        task=task,
        scored_on=scored_on,
        scores={
            split: evaluate(codes[some], found, seed=seed)
            for split, (some, found) in labelled.items()
        },
        confusion=confusion_matrix(codes[rows], predicted, n_classes),
        score_classes=(*task.classes, *unseen),
        predictions=Predictions(
            ids=ids[rows],
            splits=splits[rows],
            labels=names[codes[rows]],
            predicted=names[predicted],
            probability=probabilities[np.arange(len(rows)), predicted],
        ),
        n_samples={str(split): int(n) for split, n in zip(values, counts, strict=True)},
    )
