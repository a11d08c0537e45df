"""Fit every setting, compare them on the samples that choose, keep the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray

from pipeline.errors import TlpipeError
from pipeline.heads import HEADS, make_head
from pipeline.heads.base import softmax
from pipeline.heads.calibration import fit_temperature
from pipeline.heads.metrics import evaluate
from pipeline.heads.model import HeadModel
from pipeline.heads.scaling import Scaler, fit_scaler
from pipeline.sweep.grids import Setting, describe_setting
from pipeline.sweep.protocol import Fold, Protocol
from pipeline.sweep.threads import one_thread_each

Array = NDArray[Any]

FIT_ERRORS = (ValueError, ArithmeticError, RuntimeError, MemoryError)
"""What an estimator raises when it cannot be fitted on these samples with this setting."""


@dataclass(frozen=True)
class Trial:
    """One setting and how it did.

    Attributes:
        setting: parameters of the head.
        seconds: of one core, spent on fitting and scoring it.
        top1: on the samples that choose; None where it failed or nothing chose.
        nll: likewise, in nats.
        temperature: fitted on the samples that choose, or 1.
        converged: in every fold.
        failure: why it has no score, or "".
    """

    setting: Setting
    seconds: float
    top1: float | None = None
    nll: float | None = None
    temperature: float = 1.0
    converged: bool = True
    failure: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Selection:
    """The outcome.

    Attributes:
        best: the chosen trial.
        trials: all of them, in the order of the settings.
        rows: samples that chose.
        probabilities: (len(rows), n_classes), by the best setting, fitted without them.
    """

    best: Trial
    trials: list[Trial]
    rows: NDArray[np.intp]
    probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class _ScaledFold:
    fold: Fold
    X_fit: NDArray[np.float32]
    X_choose: NDArray[np.float32]


def select_setting(
    name: str,
    settings: Sequence[Setting],
    X: Array,
    codes: Array,
    protocol: Protocol,
    *,
    n_classes: int,
    scaling: str,
    widths: Sequence[int],
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Selection:
    """Try every setting; the best has the highest top-1, and among equals the lowest NLL.

    Args:
        name: of the head.
        settings: parameters to try.
        X: (n_samples, n_features).
        codes: (n_samples,), class indices.
        protocol: who fits and who chooses; without folds the first setting is taken unseen.
        n_classes: columns of the probabilities.
        scaling: learned anew on the fitted part of each fold.
        widths: features of each block.
        on_trial: called with every setting that was tried.

    Raises:
        TlpipeError: every setting failed.
    """
    folds = [_scale_fold(fold, X, scaling, widths) for fold in protocol.folds]
    rows = np.concatenate([fold.choose for fold in protocol.folds] or [np.zeros(0, np.intp)])
    if not folds:
        untried = Trial(settings[0], 0.0)
        return Selection(untried, [untried], rows, np.zeros((0, n_classes)))
    trials: list[Trial] = []
    best: tuple[Trial, NDArray[np.float64]] | None = None
    tasks = (
        delayed(_fit_fold)(name, setting, part, codes, n_classes)
        for setting in settings
        for part in folds
    )
    with one_thread_each():
        outcomes = Parallel(n_jobs=-1, prefer="threads", return_as="generator")(tasks)
        for setting in settings:
            parts = list(islice(outcomes, len(folds)))
            trial, probabilities = _judge(name, setting, parts, codes[rows])
            trials.append(trial)
            if probabilities is not None and (best is None or _rank(trial) > _rank(best[0])):
                best = trial, probabilities
            on_trial(trial)
    if best is None:
        reasons = "\n".join(
            f"  {describe_setting(trial.setting)}: {trial.failure}" for trial in trials
        )
        raise TlpipeError(f"Every setting of head {name!r} failed:\n{reasons}")
    return Selection(best[0], trials, rows, best[1])


def _scale_fold(fold: Fold, X: Array, scaling: str, widths: Sequence[int]) -> _ScaledFold:
    X_fit = X[fold.fit]
    scaler = fit_scaler(X_fit, scaling, widths)
    return _ScaledFold(fold, scaler(X_fit), scaler(X[fold.choose]))


def _rank(trial: Trial) -> tuple[float, float]:
    return (trial.top1 or 0.0, -(trial.nll or 0.0))


@dataclass(frozen=True)
class _FoldOutcome:
    """(n_choose, n_classes) logits, or why there are none."""

    seconds: float
    logits: Array | None = None
    converged: bool = True
    failure: str = ""


def _fit_fold(
    name: str, setting: Setting, part: _ScaledFold, codes: Array, n_classes: int
) -> _FoldOutcome:
    """Fit one setting on one fold and score the samples that choose."""
    started = time.perf_counter()
    try:
        head = make_head(name, **setting).fit(part.X_fit, codes[part.fold.fit])
        logits = np.full((len(part.X_choose), n_classes), -np.inf)
        logits[:, head.classes_] = head.logits(part.X_choose)
        if np.isnan(logits).any():
            raise ArithmeticError("its scores are not numbers")
    except FIT_ERRORS as error:
        failure = f"{type(error).__name__}: {error}"
        return _FoldOutcome(time.perf_counter() - started, failure=failure)
    return _FoldOutcome(time.perf_counter() - started, logits, head.converged_)


def _judge(
    name: str, setting: Setting, parts: Sequence[_FoldOutcome], truth: Array
) -> tuple[Trial, NDArray[np.float64] | None]:
    """Score one setting over its folds; pooled probabilities, or None where it failed."""
    seconds = sum(part.seconds for part in parts)
    failure = next((part.failure for part in parts if part.failure), "")
    if failure:
        return Trial(setting, seconds, failure=failure), None
    logits = np.concatenate([part.logits for part in parts if part.logits is not None])
    temperature = fit_temperature(logits, truth) if HEADS[name].calibrated else 1.0
    probabilities = softmax(logits / temperature)
    scored = evaluate(truth, probabilities, n_resamples=0)
    trial = Trial(
        setting,
        seconds,
        top1=scored["top1"].value,
        nll=scored["nll"].value,
        temperature=temperature,
        converged=all(part.converged for part in parts),
    )
    return trial, probabilities


def refit(
    name: str,
    best: Trial,
    X: Array,
    codes: Array,
    protocol: Protocol,
    *,
    classes: Sequence[str],
    scaling: str,
    widths: Sequence[int],
) -> HeadModel:
    """Fit the chosen setting on train and, where it was given, val; scaling is learned on train.

    Raises:
        TlpipeError: the setting cannot be fitted on all of it.
    """
    scaler: Scaler = fit_scaler(X[protocol.train], scaling, widths)
    head = make_head(name, **best.setting)
    try:
        head.fit(scaler(X[protocol.refit]), codes[protocol.refit])
    except FIT_ERRORS as error:
        raise TlpipeError(
            f"Head {name!r} with {describe_setting(best.setting)} could not be fitted on all "
            f"{len(protocol.refit):,} samples: {error}"
        ) from error
    return HeadModel(scaler, head, best.temperature, tuple(classes))
