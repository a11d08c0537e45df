"""A head with all it needs to classify raw features: scaling before it, temperature after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError
from pipeline.heads import head_class, multitask_class
from pipeline.heads.base import Head, softmax
from pipeline.heads.scaling import Scaler, scaler_from_arrays
from pipeline.heads.tasks import Task, task_slices

Array = NDArray[Any]


@dataclass(frozen=True)
class HeadModel:
    """A fitted model from features to class probabilities.

    Attributes:
        scaler: fitted scaling.
        head: fitted estimator; its ``classes_`` are indices into ``classes``.
        temperature: the scores are divided by it before the softmax.
        classes: names of the classes; one that the head never saw gets probability zero. Of
            several tasks, the classes of all of them in turn.
        tasks: the label columns, where there are several; then the head is a
            :class:`pipeline.heads.multitask.MultiTaskMLP`.
    """

    scaler: Scaler
    head: Head
    temperature: float
    classes: tuple[str, ...]
    tasks: tuple[Task, ...] = ()

    def logits(self, X: Array) -> NDArray[np.float64]:
        """Scores (n_samples, n_classes) of raw features (n_samples, n_features)."""
        scores = np.full((len(X), len(self.classes)), -np.inf)
        if len(X):
            scores[:, self.head.classes_] = self.head.logits(self.scaler(X))
        return scores

    def predict_proba(self, X: Array) -> NDArray[np.float64]:
        """Probabilities (n_samples, n_classes) of raw features (n_samples, n_features).

        Those of each task sum to one.
        """
        scores = self.logits(X) / self.temperature
        if not self.tasks:
            return softmax(scores)
        parts = task_slices([len(task.classes) for task in self.tasks])
        return np.concatenate([softmax(scores[:, part]) for part in parts], axis=1)

    def predict(self, X: Array) -> list[str]:
        """The likeliest class of each sample, of a model of one label column.

        Raises:
            ValueError: there are several.
        """
        if self.tasks:
            raise ValueError("The model has several label columns; predict_proba has all of them")
        return [self.classes[code] for code in self.predict_proba(X).argmax(axis=1)]

    def to_arrays(self) -> dict[str, Array]:
        """Everything that was learned but the temperature, as plain arrays."""
        return {f"head.{name}": array for name, array in self.head.to_arrays().items()} | {
            f"scaling.{name}": array for name, array in self.scaler.to_arrays().items()
        }

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Array],
        *,
        head: str,
        params: Mapping[str, Any],
        scaling: str,
        widths: Sequence[int],
        temperature: float,
        classes: Sequence[str],
        tasks: Sequence[Task] = (),
    ) -> Self:
        """Rebuild a saved model from its arrays and its card's fields.

        Raises:
            UnknownNameError: no head is called ``head``.
            StoreError: arrays and fields do not fit each other.
        """
        estimator = multitask_class(head) if tasks else head_class(head)
        rebuilt = estimator.from_arrays(params, _under("head.", arrays))
        codes = rebuilt.classes_
        if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= len(classes):
            raise CorruptStoreError(
                f"The model's head knows classes {codes[:5]}…, but {len(classes)} are named."
            )
        sizes = [len(task.classes) for task in tasks]
        if tasks and (rebuilt.get_params()["n_classes"] != sizes or len(codes) != sum(sizes)):
            raise CorruptStoreError(
                f"The model's head has {len(codes)} outputs in parts of "
                f"{rebuilt.get_params()['n_classes']}, but {sizes} classes are named."
            )
        if rebuilt.n_features_in_ != sum(widths):
            raise CorruptStoreError(
                f"The model's head takes {rebuilt.n_features_in_} features, "
                f"but its inputs have {sum(widths)}."
            )
        scaler = scaler_from_arrays(scaling, widths, _under("scaling.", arrays))
        return cls(scaler, rebuilt, temperature, tuple(classes), tuple(tasks))


def _under(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
