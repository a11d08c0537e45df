"""Label columns that are learned together: their classes, and what is missing where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.names import counted, quoted
from pipeline.errors import TooFewSamplesError
from pipeline.heads.tasks import NO_LABEL, Task, encode_labels
from pipeline.sweep.protocol import Protocol

Array = NDArray[Any]


@dataclass(frozen=True)
class LabelColumn:
    """One of several label columns.

    Attributes:
        task: its name, and the classes that are learned, sorted.
        unseen: classes that only test has, sorted.
        codes: (n_samples,), index of each label in the classes and ``unseen``; NO_LABEL where a
            sample has none.
    """

    task: Task
    unseen: tuple[str, ...]
    codes: NDArray[np.int64]

    @classmethod
    def of(cls, name: str, labels: Array, protocol: Protocol) -> LabelColumn:
        """Classes and codes of a column.

        Args:
            name: of the column.
            labels: (n_samples,), None without one.
            protocol: who fits, who chooses, who scores.

        Raises:
            TooFewSamplesError: train has labels of fewer than two classes in it.
        """
        in_train = sorted(set(labels[protocol.train]) - {None})
        if len(in_train) < 2:
            found = f"labels of one class, {in_train[0]!r}" if in_train else "no label"
            raise TooFewSamplesError(
                f"The training samples have {found} in column {name!r}; at least two classes are "
                "needed to learn it.\n"
                "  Leave the column out, or label more samples of the train split:  tlpipe relabel"
            )
        codes, known, unseen = encode_labels(labels, protocol.refit, protocol.test)
        return cls(Task(name, known), unseen, codes)

    def notes(self, protocol: Protocol) -> list[str]:
        """What a user should know of the column before believing its scores."""
        name, codes, notes = repr(self.task.label), self.codes, []
        has_label = codes != NO_LABEL
        n_missing = int((~has_label).sum())
        if n_missing:
            notes.append(
                f"{n_missing:,} of {counted(len(codes), 'sample')} without a label in column "
                f"{name}: they count in the others."
            )
        if self.unseen:
            n_samples = int((codes[protocol.test] >= len(self.task.classes)).sum())
            notes.append(
                f"{counted(n_samples, 'test sample')} of "
                f"{counted(len(self.unseen), 'class', 'classes')} of column {name} that train does "
                f"not have ({quoted(self.unseen)}): counted as errors."
            )
        absent = set(codes[protocol.refit]) - set(codes[protocol.train]) - {NO_LABEL}
        if absent:
            classes = [self.task.classes[code] for code in sorted(absent)]
            notes.append(
                f"Only val has samples of {counted(len(absent), 'class', 'classes')} of column "
                f"{name} ({quoted(classes)})."
            )
        choose = [fold.choose for fold in protocol.folds]
        if choose and not has_label[np.concatenate(choose)].any():
            notes.append(
                f"Warning: no sample that chooses has a label in column {name}: the other columns "
                "chose alone."
            )
        if len(protocol.test) and not has_label[protocol.test].any():
            notes.append(f"Warning: no test sample has a label in column {name}.")
        return notes
