"""Settings of a linear head on folds: every penalty and fold is one call of its solver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.heads.base import Array, Head, linear_logits, sample_weights, solver_device
from pipeline.heads.folds import FIT_ERRORS, Fold, FoldResult, fit_one_by_one, fold_result


class LinearFits(Protocol):
    """What a solver gives back: linear classifiers of every fold and penalty."""

    @property
    def coef(self) -> Array:
        """(n_folds, n_penalties, n_outputs, n_features)."""

    @property
    def intercept(self) -> Array:
        """(n_folds, n_penalties, n_outputs)."""

    @property
    def converged(self) -> NDArray[np.bool_]:
        """(n_folds, n_penalties)."""


LinearSolver = Callable[..., LinearFits]
"""As :func:`~pipeline.heads.solvers.linear.fit_logistic`: called with X, y and the penalties, with
``sample_weight`` (n_folds, n_samples), or None for one fold of equal weights; with ``device``, a
torch.device; and with the head's tol and max_iter where it has them."""


def try_linear_settings(
    cls: type[Head],
    settings: Sequence[Mapping[str, Any]],
    X: Array,
    y: Array,
    folds: Sequence[Fold],
    *,
    n_classes: int,
    solver: Callable[[Any], LinearSolver],
    along: str = "C",
) -> Iterator[FoldResult]:
    """Fit every setting on every fold; settings that differ in C only are solved together.

    So are the folds, as sample weights on one X. Where that fails, each is fitted by itself.

    Args:
        cls: a head with the parameters C and class_weight.
        settings, X, y, folds, n_classes: see :meth:`~pipeline.heads.base.Head.try_settings`.
        solver: of a head with its parameters set.
        along: the parameter that the solver takes many values of, if not C.

    Yields:
        A result for every setting and fold.
    """
    groups: dict[str, list[tuple[int, Any]]] = {}
    for i, setting in enumerate(settings):
        head: Any = cls(**setting)
        try:
            head.check_params()
        except FIT_ERRORS as error:
            failure = f"{type(error).__name__}: {error}"
            yield from (FoldResult(i, f, 0.0, failure=failure) for f in range(len(folds)))
        else:
            others = {name: value for name, value in head.get_params().items() if name != along}
            groups.setdefault(repr(others), []).append((i, head))
    # A fold that lacks a class is another problem, with fewer outputs.
    batches: dict[bytes, list[int]] = {}
    for f, fold in enumerate(folds):
        batches.setdefault(np.unique(y[fold.fit]).tobytes(), []).append(f)
    for group in groups.values():
        for batch in batches.values():
            parts = [folds[f] for f in batch]
            heads = [head for _, head in group]
            for result in _try_batch(heads, X, y, parts, n_classes, solver(heads[0]), along):
                yield replace(result, setting=group[result.setting][0], fold=batch[result.fold])


def _try_batch(
    heads: Sequence[Any],
    X: Array,
    y: Array,
    folds: Sequence[Fold],
    n_classes: int,
    solver: LinearSolver,
    along: str,
) -> Iterator[FoldResult]:
    """Heads that differ in one parameter only, on folds of the same classes."""
    started = time.perf_counter()
    params = heads[0].get_params()
    try:
        rows, weights = _weights(y, folds, params["class_weight"])
        classes, codes = np.unique(y[rows], return_inverse=True)
        fits = solver(
            X[rows],
            codes,
            np.array([getattr(head, along) for head in heads], dtype=np.float64),
            sample_weight=weights,
            **_options(params),
        )
    except FIT_ERRORS:
        settings = [head.get_params() for head in heads]
        yield from fit_one_by_one(type(heads[0]), settings, X, y, folds, n_classes)
        return
    share = (time.perf_counter() - started) / (len(heads) * len(folds))
    for f, fold in enumerate(folds):
        chosen = X[fold.choose]
        for i in range(len(heads)):
            begun = time.perf_counter()
            logits = linear_logits(chosen, fits.coef[f, i], fits.intercept[f, i])
            seconds = share + time.perf_counter() - begun
            converged = bool(fits.converged[f, i])
            yield fold_result(i, f, seconds, logits, classes, n_classes, converged)


def _options(params: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: params[name] for name in ("tol", "max_iter") if name in params}
    return options | {"device": solver_device(params.get("device", "cpu"))}


def _weights(
    y: Array, folds: Sequence[Fold], class_weight: Any
) -> tuple[Array, NDArray[np.float64] | None]:
    """Rows that any fold fits on, and their weights in every fold (n_folds, n_rows).

    One fold without class weights has None for its weights, all equal.
    """
    if len(folds) == 1:
        rows = folds[0].fit
        if class_weight is None:
            return rows, None
        return rows, sample_weights(rows, y[rows], class_weight)[None]
    rows = np.unique(np.concatenate([fold.fit for fold in folds]))
    weights = np.zeros((len(folds), len(rows)))
    for weight, fold in zip(weights, folds, strict=True):
        np.add.at(
            weight,
            np.searchsorted(rows, fold.fit),
            sample_weights(fold.fit, y[fold.fit], class_weight),
        )
    return rows, weights
