"""A network of a few layers that learns several label columns at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted, validate_data

from pipeline.heads.base import sample_weights, softmax
from pipeline.heads.mlp import MLPHead
from pipeline.heads.solvers.mlp import Training
from pipeline.heads.tasks import NO_LABEL, task_slices

Array = NDArray[Any]


class MultiTaskMLP(MLPHead):
    """:class:`MLPHead` with shared hidden layers and a softmax for each task.

    The loss of a task is the mean cross-entropy over those samples of a batch that have a label in
    it; the losses of the tasks are weighted by ``task_weights``.

    Args:
        n_classes: of each task; must be given.
        hidden: width of the hidden layer, or the widths of several.
        task_weights: "equal" for the mean over the tasks; "uncertainty" for the sum of
            exp(-s) loss + s / 2 with an s for each task that is learned (Kendall, Gal and Cipolla,
            "Multi-task learning using uncertainty to weigh losses", 2018).
        dropout, lr, weight_decay, epochs, batch_size, warmup, optimizer, label_smoothing,
            early_stopping, patience, seed, device, precision: see :class:`MLPHead`.

    Attributes:
        classes_: (n_outputs,), the columns of the scores: those of all tasks side by side.
        log_variances_: s of each task; () where they are not learned.
        hidden_weight_, hidden_bias_, weight_, bias_, n_iter_: see :class:`MLPHead`.
    """

    def __init__(
        self,
        n_classes: Sequence[int] = (),
        hidden: int | Sequence[int] = 256,
        *,
        task_weights: str = "equal",
        dropout: float = 0.2,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        epochs: int = 15,
        batch_size: int = 128,
        warmup: float = 0.0,
        optimizer: str = "adamw",
        label_smoothing: float = 0.0,
        early_stopping: bool = False,
        patience: int = 5,
        seed: int = 0,
        device: str = "cpu",
        precision: str = "auto",
    ) -> None:
        super().__init__(
            hidden, dropout=dropout, lr=lr, weight_decay=weight_decay, epochs=epochs,
            batch_size=batch_size, warmup=warmup, optimizer=optimizer,
            label_smoothing=label_smoothing, early_stopping=early_stopping, patience=patience,
            seed=seed, device=device, precision=precision,
        )  # fmt: skip
        self.n_classes = n_classes
        self.task_weights = task_weights

    def training(self, device: str | torch.device) -> Training:
        """How it is trained; heads that agree in it are trained together."""
        return replace(super().training(device), task_weights=self.task_weights)

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        super().check_params()
        counts = self.n_classes
        whole = isinstance(counts, Sequence) and all(isinstance(n, Integral) for n in counts)
        if not whole or not all(n > 1 for n in counts):
            raise ValueError(f"n_classes is {counts!r}, expected 2 or more for each task")
        if not counts:
            raise ValueError("n_classes is empty, expected the number of classes of each task")

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features) and y (n_samples, n_tasks).

        Args:
            X: features.
            y: class codes of each task from 0, NO_LABEL (-1) where a sample has none.
            sample_weight: (n_samples,).

        Raises:
            ValueError: parameters or samples that do not fit.
            ArithmeticError: the parameters are not finite any more: ``lr`` is too large.
        """
        self.check_params()
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64], multi_output=True)
        rows = np.arange(len(X))
        targets, self.classes_, n_classes = self.targets(y, rows)
        if (targets == NO_LABEL).all():
            raise ValueError("y has no label in any column, expected some in one of them")
        weights = sample_weights(X, rows, None, sample_weight)
        return self._learn_targets(X, targets, weights, n_classes)

    def targets(
        self, y: Array, rows: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], Sequence[int]]:
        """What to learn from some rows; a class that they lack has an output all the same."""
        codes = np.asarray(y)
        if codes.dtype.kind not in "iu" or codes.shape[1:] != (len(self.n_classes),):
            raise ValueError(
                f"y is {codes.dtype} of shape {codes.shape}, expected class codes of shape "
                f"(n_samples, {len(self.n_classes)}), one column a task"
            )
        return codes, np.arange(sum(self.n_classes)), self.n_classes

    def predict(self, X: Array) -> NDArray[np.intp]:
        """Return the likeliest class of each task: (n_samples, n_tasks) codes."""
        check_is_fitted(self)
        scores = self.logits(X)
        parts = task_slices(self.n_classes)
        return np.stack([scores[:, part].argmax(axis=1) for part in parts], axis=1)

    def predict_proba(self, X: Array) -> NDArray[Any]:
        """Probabilities (n_samples, n_outputs), those of all tasks side by side."""
        scores = self.logits(X)
        parts = task_slices(self.n_classes)
        return np.concatenate([softmax(scores[:, part]) for part in parts], axis=1)

    def score(self, X: Array, y: Array, sample_weight: Array | None = None) -> float:
        """Mean over the tasks of the share of right answers among the samples with a label.

        A task in which no sample has one, or none of those a weight, is left out.

        Raises:
            ValueError: that is so in all of them.
        """
        y, right = np.asarray(y), self.predict(X) == y
        weights = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight)
        parts = zip((y != NO_LABEL).T, right.T, strict=True)
        shares = [
            np.average(r[known], weights=weights[known])
            for known, r in parts
            if weights[known].any()
        ]
        if not shares:
            raise ValueError("y has no label with a weight in any column: nothing can be scored")
        return float(np.mean(shares))
