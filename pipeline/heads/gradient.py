"""What the heads that learn by gradient steps share: many of them train as one program."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.heads.base import (
    Array,
    Head,
    fit_inputs,
    predict_inputs,
    sample_weights,
    softmax,
    solver_device,
)
from pipeline.heads.folds import FIT_ERRORS, Fold, FoldResult, fit_fold, fold_result, plain_view
from pipeline.heads.solvers.mlp import FittedMlp, MlpSetting, Training, fit_mlps, mlp_logits

Indices = NDArray[np.intp]

_MIN_SAMPLES_TO_STOP_EARLY = 50
_SCORES_AT_ONCE = 2**26


class GradientHead(Head):
    """A network of linear layers with ReLU between them, trained in mini-batches.

    A subclass adds to :meth:`member` what only its networks have, and to :meth:`training`. Layers
    are the arrays ``hidden_weight_``, ``hidden_bias_``, ``hidden2_weight_``, …, ``weight_`` and
    ``bias_``.
    """

    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    warmup: float
    optimizer: str
    label_smoothing: float
    class_weight: Any
    seed: int
    device: str
    n_iter_: int
    log_variances_: tuple[float, ...]

    def widths(self) -> tuple[int, ...]:
        """Units of the hidden layers."""
        return ()

    def member(self) -> MlpSetting:
        """What is trained."""
        return MlpSetting(
            hidden=self.widths(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            seed=self.seed,
        )

    def training(self, device: str | torch.device) -> Training:
        """How it is trained; heads that agree in it are trained together."""
        return Training(
            n_epochs=self.epochs,
            batch_size=self.batch_size,
            warmup=self.warmup,
            optimizer=self.optimizer,
            seed=self.seed,
            device=device,
        )

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        self.member()
        # A model that was fitted on a GPU can be used without one.
        self.training("cpu")

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,), weighted by (n_samples,).

        Raises:
            ValueError: parameters or samples that do not fit.
            ArithmeticError: the parameters are not finite any more: ``lr`` is too large.
        """
        self.check_params()
        X, index = fit_inputs(self, X, y)
        return self._learn(X, index, sample_weight)

    def fit_views(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on several views of each sample; each step draws one of them, by the seed.

        Args:
            X: (n_samples, n_views, n_features); view 0 is the plain one.
            y: (n_samples,).
            sample_weight: (n_samples,).

        Raises:
            ValueError: as :meth:`fit`.
            ArithmeticError: as :meth:`fit`.
        """
        self.check_params()
        X = np.asarray(X)
        if X.ndim != 3 or not X.size:
            raise ValueError(
                f"X has shape {X.shape}, expected (n_samples, n_views, n_features), none of them 0"
            )
        _, index = fit_inputs(self, X[:, 0], y)
        return self._learn(X, index, sample_weight)

    def _learn(self, X: Array, index: Indices, sample_weight: Array | None) -> Self:
        weights = sample_weights(index, self.classes_[index], self.class_weight, sample_weight)
        return self._learn_targets(X, index, weights, len(self.classes_))

    def _learn_targets(
        self, X: Array, targets: Indices, weights: Array, n_classes: int | Sequence[int]
    ) -> Self:
        (model,) = _train([self], X, targets, weights, np.arange(len(X)), n_classes)
        if model.failure:
            raise ArithmeticError(model.failure)
        for name, array in zip(self._weight_names(), model.weights, strict=True):
            setattr(self, name, array)
        for name, array in zip(self._bias_names(), model.biases, strict=True):
            setattr(self, name, array)
        self.n_iter_ = model.n_epochs
        self.log_variances_ = model.log_variances
        self.converged_ = True
        return self

    @classmethod
    def try_settings(
        cls,
        settings: Sequence[Mapping[str, Any]],
        X: Array,
        y: Array,
        folds: Sequence[Fold],
        *,
        n_classes: int,
    ) -> Iterator[FoldResult]:
        """Fit settings that agree in :meth:`training` side by side, a fold after the other.

        Each learns what :meth:`fit` learns on the fold, but for rounding; see
        :meth:`pipeline.heads.base.Head.try_settings`.
        """
        heads = [cls(**setting) for setting in settings]
        companies: defaultdict[Any, list[int]] = defaultdict(list)
        for i, head in enumerate(heads):
            companies[_company(head) or i].append(i)
        for f, part in enumerate(folds):
            for company in companies.values():
                started = time.perf_counter()
                try:
                    models, classes = _fit_fold([heads[i] for i in company], X, y, part)
                except FIT_ERRORS:
                    # Who is to blame for it is found out by fitting each by itself.
                    for i in company:
                        yield fit_fold(cls, settings[i], X, y, part, n_classes, i, f)
                    continue
                seconds = (time.perf_counter() - started) / len(company)
                device = solver_device(heads[company[0]].device)
                scores = _scores(models, plain_view(X)[part.choose], device)
                for i, model, logits in zip(company, models, scores, strict=True):
                    if model.failure:
                        yield FoldResult(i, f, seconds, failure=f"ArithmeticError: {model.failure}")
                    else:
                        yield fold_result(i, f, seconds, logits, classes, n_classes)

    def targets(self, y: Array, rows: Indices) -> tuple[Indices, Indices, int | Sequence[int]]:
        """What to learn from some rows.

        Args:
            y: (n_samples,), class codes of all rows.
            rows: to fit on.

        Returns:
            Targets of all rows, right for those of ``rows``; the codes that the outputs stand for;
            the number of outputs, of several tasks one number each.

        Raises:
            ValueError: the rows have one class.
        """
        classes = np.unique(y[rows])
        if len(classes) < 2:
            raise ValueError(f"The fold has samples of {len(classes)} class, expected at least 2")
        return np.searchsorted(classes, y), classes, len(classes)

    def logits(self, X: Array) -> Array:
        """Unnormalised log-probabilities (n_samples, n_classes)."""
        scores: Array = predict_inputs(self, X)
        for layer, (weight, bias) in enumerate(
            zip(self._weight_names(), self._bias_names(), strict=True)
        ):
            if layer:
                scores = np.maximum(scores, 0)
            scores = scores @ getattr(self, weight).T + getattr(self, bias)
        return scores

    def predict_proba(self, X: Array) -> NDArray[Any]:
        """Probabilities (n_samples, n_classes)."""
        return softmax(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        axes = ["features", *self._hidden_names(), "classes"]
        shapes: dict[str, tuple[str, ...]] = {}
        for weight, bias, (inputs, outputs) in zip(
            self._weight_names(), self._bias_names(), pairwise(axes), strict=True
        ):
            shapes |= {weight: (outputs, inputs), bias: (outputs,)}
        return shapes

    def _hidden_names(self) -> list[str]:
        return ["hidden" if i == 1 else f"hidden{i}" for i in range(1, len(self.widths()) + 1)]

    def _weight_names(self) -> list[str]:
        return [*(f"{name}_weight_" for name in self._hidden_names()), "weight_"]

    def _bias_names(self) -> list[str]:
        return [*(f"{name}_bias_" for name in self._hidden_names()), "bias_"]


def _company(head: GradientHead) -> tuple[Training, str] | None:
    """What a head shares with those that it can be trained with; None where it cannot be."""
    try:
        head.check_params()
        return head.training(solver_device(head.device)), repr(head.class_weight)
    except FIT_ERRORS:
        return None


def _fit_fold(
    heads: Sequence[GradientHead], X: Array, y: Array, part: Fold
) -> tuple[list[FittedMlp], Indices]:
    """One model a head, and the classes that the fold has; heads agree in their training.

    Raises:
        ValueError: the fold has one class, or samples that do not fit.
    """
    targets, classes, n_classes = heads[0].targets(y, part.fit)
    weights = np.zeros(len(X))
    weights[part.fit] = sample_weights(part.fit, y[part.fit], heads[0].class_weight)
    return _train(heads, X, targets, weights, part.fit, n_classes), classes


def _train(
    heads: Sequence[GradientHead],
    X: Array,
    targets: Indices,
    weights: Array,
    rows: Indices,
    n_classes: int | Sequence[int],
) -> list[FittedMlp]:
    """Train heads that agree in their training on some rows of X.

    Those that stop early hold a seeded tenth of the rows out.
    """
    training = heads[0].training(solver_device(heads[0].device))
    held_out: Mapping[str, Any] = {}
    if len(rows) < _MIN_SAMPLES_TO_STOP_EARLY:
        training = replace(training, patience=None)
    if training.patience is not None:
        order = rows[np.random.default_rng(training.seed).permutation(len(rows))]
        n_held_out = len(rows) // 10
        rows = order[n_held_out:]
        held_out = {
            "X_val": X,
            "y_val": targets,
            "val_rows": order[:n_held_out],
            "val_weight": weights,
        }
    return fit_mlps(
        X,
        targets,
        [head.member() for head in heads],
        n_classes=n_classes,
        training=training,
        rows=rows,
        sample_weight=weights,
        **held_out,
    )


def _scores(models: Sequence[FittedMlp], X: Array, device: torch.device) -> Iterator[Array]:
    """Logits (n_samples, n_classes) of one model after the other, some computed at once."""
    step = max(1, _SCORES_AT_ONCE // max(1, len(X) * len(models[0].biases[-1])))
    for start in range(0, len(models), step):
        yield from mlp_logits(models[start : start + step], X, device=device)
