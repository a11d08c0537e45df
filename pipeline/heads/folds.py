"""Settings of a head, tried on folds: what a sweep asks of a head, and what it gets back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray

from pipeline.heads.threads import one_thread_each

if TYPE_CHECKING:
    from pipeline.heads.base import Head

Array = NDArray[Any]
Indices = NDArray[np.intp]

FIT_ERRORS = (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError)
"""What an estimator raises when it cannot be fitted on these samples with this setting."""


@dataclass(frozen=True)
class Fold:
    """One way to part the samples.

    Attributes:
        fit: rows that heads are fitted on.
        choose: rows that they are compared on.
    """

    fit: Indices
    choose: Indices


@dataclass(frozen=True)
class FoldResult:
    """One setting, fitted on one fold.

    Attributes:
        setting: its place among the settings.
        fold: its place among the folds.
        seconds: spent on it; of what was fitted together, its share.
        logits: (n_choose, n_classes), -inf for a class that the fold's fit rows lack; None where
            it failed.
        converged: whether the solver met its tolerance.
        failure: why there are no logits, or "".
    """

    setting: int
    fold: int
    seconds: float
    logits: Array | None = None
    converged: bool = True
    failure: str = ""


def fit_one_by_one(
    cls: type[Head],
    settings: Sequence[Mapping[str, Any]],
    X: Array,
    y: Array,
    folds: Sequence[Fold],
    n_classes: int,
) -> Iterator[FoldResult]:
    """Fit every setting on every fold by itself, setting by setting; several side by side.

    joblib's threads by default; any other of its backends may be set with
    ``joblib.parallel_config``. See :meth:`pipeline.heads.base.Head.try_settings`.
    """
    tasks = (
        delayed(fit_fold)(cls, setting, X, y, part, n_classes, i, f)
        for i, setting in enumerate(settings)
        for f, part in enumerate(folds)
    )
    with one_thread_each():
        yield from Parallel(n_jobs=-1, prefer="threads", return_as="generator")(tasks)


def plain_view(X: Array) -> Array:
    """View 0 of (n_samples, n_views, n_features), or X itself."""
    return X[:, 0] if X.ndim == 3 else X


def fit_on(head: Head, X: Array, y: Array) -> Head:
    """Fit a head on (n_samples, n_features), or on several views of each sample."""
    return head.fit_views(X, y) if X.ndim == 3 else head.fit(X, y)


def fit_fold(
    cls: type[Head],
    setting: Mapping[str, Any],
    X: Array,
    y: Array,
    part: Fold,
    n_classes: int,
    i: int,
    f: int,
) -> FoldResult:
    """Fit setting number ``i`` on fold number ``f`` and score the rows that choose."""
    started = time.perf_counter()
    try:
        head = fit_on(cls(**setting), X[part.fit], y[part.fit])
        logits = head.logits(plain_view(X)[part.choose])
    except FIT_ERRORS as error:
        failure = f"{type(error).__name__}: {error}"
        return FoldResult(i, f, time.perf_counter() - started, failure=failure)
    return fold_result(
        i, f, time.perf_counter() - started, logits, head.classes_, n_classes, head.converged_
    )


def fold_result(
    i: int,
    f: int,
    seconds: float,
    logits: Array,
    classes: Array,
    n_classes: int,
    converged: bool = True,
) -> FoldResult:
    """A result from logits (n_choose, len(classes)) of those classes that the fold has."""
    if np.isnan(logits).any():
        return FoldResult(i, f, seconds, failure="ArithmeticError: its scores are not numbers")
    if len(classes) < n_classes:
        known, logits = logits, np.full((len(logits), n_classes), -np.inf)
        logits[:, classes] = known
    return FoldResult(i, f, seconds, logits, bool(converged))
