"""Several label columns that one model learns at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NO_LABEL = -1
"""Code of a sample that has no label in a task; it counts nowhere in that task."""

TASK_WEIGHTS = ("equal", "uncertainty")
"""How the losses of the tasks become one.

``equal`` is their mean. ``uncertainty`` is the sum of exp(-s_t) L_t + s_t / 2 with a learned s_t
for each (Kendall, Gal and Cipolla, "Multi-task learning using uncertainty to weigh losses", 2018).
"""


@dataclass(frozen=True)
class Task:
    """One label column.

    Attributes:
        label: its name.
        classes: those that can be predicted, in the order of the outputs.
    """

    label: str
    classes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"label": self.label, "classes": list(self.classes)}


def task_slices(n_classes: Sequence[int]) -> list[slice]:
    """Columns of each task where the outputs of all tasks lie side by side.

    Args:
        n_classes: of each task.
    """
    slices, start = [], 0
    for count in n_classes:
        slices.append(slice(start, start + count))
        start += count
    return slices


def strata(columns: Mapping[str, Array]) -> Array:
    """What samples are stratified by: the first column's label, else the next one's.

    Args:
        columns: (n_samples,) labels of each column, None where there is none.

    Returns:
        (n_samples,); None for a sample without any label.
    """
    (_, first), *others = columns.items()
    found = np.array(first, dtype=object)
    for name, labels in others:
        for i in [row for row, label in enumerate(found) if label is None]:
            found[i] = None if labels[i] is None else f"{name}={labels[i]}"
    return found


def encode_labels(
    labels: Array, learned: NDArray[np.intp], tested: NDArray[np.intp]
) -> tuple[NDArray[np.int64], tuple[str, ...], tuple[str, ...]]:
    """Class codes of a label column.

    Args:
        labels: (n_samples,), None where there is none.
        learned: rows that are fitted on or choose.
        tested: rows that are only scored.

    Returns:
        (n_samples,) codes, NO_LABEL without a label; the classes that are learned, sorted; the
        classes that only ``tested`` has, sorted, whose codes follow.
    """
    known = set(labels[learned]) - {None}
    unseen = set(labels[tested]) - {None} - known
    names = (*sorted(known), *sorted(unseen))
    index = {name: code for code, name in enumerate(names)} | {None: NO_LABEL}
    codes = np.fromiter((index[name] for name in labels), np.int64, len(labels))
    return codes, names[: len(known)], names[len(known) :]
