"""Fit every setting on every fold, compare them on the samples that choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import TlpipeError
from pipeline.heads import HEADS, head_class, make_head
from pipeline.heads.base import softmax
from pipeline.heads.calibration import fit_temperature
from pipeline.heads.features import HeadInputs
from pipeline.heads.folds import FIT_ERRORS, Fold, FoldResult, fit_on, fit_one_by_one, plain_view
from pipeline.heads.metrics import evaluate
from pipeline.heads.model import HeadModel
from pipeline.heads.scaling import fit_scaler
from pipeline.sweep.protocol import Protocol
from pipeline.sweep.trials import Candidate, Trial

Array = NDArray[Any]


@dataclass(frozen=True)
class Scaled:
    """Features that are ready to be fitted on.

    Attributes:
        X: (n_rows, n_features) float32, or with views (n_rows, n_views, n_features); of the rows
            that some fold uses.
        y: (n_rows,), class codes.
        folds: rows of X.
        rows: (n_choose,), rows of the data, in the order in which the folds choose.
        truth: (n_choose,), their class codes.
        n_classes: columns of the probabilities.
    """

    X: NDArray[np.float32]
    y: Array
    folds: tuple[Fold, ...]
    rows: NDArray[np.intp]
    truth: Array
    n_classes: int


def scale(
    X: Array,
    codes: Array,
    protocol: Protocol,
    *,
    n_classes: int,
    scaling: str,
    widths: Sequence[int],
) -> Scaled:
    """Scale the rows that the folds use.

    A single fold learns the scaling from the rows that it fits on. Several folds are weights on one
    matrix, which all of train scales: that lets a held-out sample into the means and variances of
    its features, never its label.

    Args:
        X: (n_samples, n_features) or (n_samples, n_views, n_features), raw; view 0 scales all.
        codes: (n_samples,).
        protocol: who fits and who chooses; at least one fold.
        n_classes: how many codes there are.
        scaling: one of ``pipeline.heads.scaling.SCALINGS``.
        widths: features of each block.
    """
    folds = protocol.folds
    used = np.unique(np.concatenate([rows for fold in folds for rows in (fold.fit, fold.choose)]))
    learned_on = folds[0].fit if len(folds) == 1 else protocol.train
    scaler = fit_scaler(plain_view(X)[learned_on], scaling, widths)
    chosen = np.concatenate([fold.choose for fold in folds])
    return Scaled(
        scaler.rows(X, used),
        codes[used],
        tuple(
            Fold(np.searchsorted(used, fold.fit), np.searchsorted(used, fold.choose))
            for fold in folds
        ),
        chosen,
        codes[chosen],
        n_classes,
    )


def try_candidates(
    candidates: Sequence[Candidate], data: Scaled
) -> Iterator[tuple[Trial, NDArray[np.float64] | None]]:
    """Try settings of one head on the same features.

    Args:
        candidates: of one head, on the layers and with the scaling of ``data``.
        data: what to fit on.

    Yields:
        A trial, and its probabilities (n_choose, n_classes) or None where it failed; in the order
        in which they are done.
    """
    name = candidates[0].head
    parts: dict[int, dict[int, FoldResult]] = {}
    for result in _results(name, [candidate.setting for candidate in candidates], data):
        own = parts.setdefault(result.setting, {})
        own[result.fold] = result
        if len(own) == len(data.folds):
            del parts[result.setting]
            ordered = [own[f] for f in range(len(data.folds))]
            yield _judge(candidates[result.setting], ordered, data)


def _results(name: str, settings: Sequence[dict[str, Any]], data: Scaled) -> Iterator[FoldResult]:
    """All settings together; those that are left one by one, where that failed."""
    cls = head_class(name)
    done: set[tuple[int, int]] = set()
    try:
        for result in cls.try_settings(
            settings, data.X, data.y, data.folds, n_classes=data.n_classes
        ):
            done.add((result.setting, result.fold))
            yield result
    except FIT_ERRORS:
        for result in fit_one_by_one(cls, settings, data.X, data.y, data.folds, data.n_classes):
            if (result.setting, result.fold) not in done:
                yield result


def _judge(
    candidate: Candidate, parts: Sequence[FoldResult], data: Scaled
) -> tuple[Trial, NDArray[np.float64] | None]:
    """Score one candidate over its folds; pooled probabilities, or None where it failed."""
    seconds = sum(part.seconds for part in parts)
    failure = next((part.failure for part in parts if part.failure), "")
    if failure:
        return Trial(candidate, seconds, failure=failure), None
    logits = np.concatenate([part.logits for part in parts if part.logits is not None])
    calibrated = HEADS[candidate.head].calibrated
    temperature = fit_temperature(logits, data.truth) if calibrated else 1.0
    probabilities = softmax(logits / temperature)
    scored = evaluate(data.truth, probabilities, n_resamples=0)
    trial = Trial(
        candidate,
        seconds,
        {name: score.value for name, score in scored.items()},
        temperature,
        all(part.converged for part in parts),
    )
    return trial, probabilities


class RefitError(TlpipeError):
    """A setting that could be tried cannot be fitted on all samples."""

    @classmethod
    def of(cls, candidate: Candidate, n_samples: int, why: object) -> Self:
        """With what could not be fitted on how many samples, and why."""
        return cls(
            f"Head {candidate.head!r} with {candidate.describe()} could not be fitted on all "
            f"{n_samples:,} samples: {why}"
        )


def refit(
    best: Trial, inputs: HeadInputs, codes: Array, protocol: Protocol, classes: Sequence[str]
) -> HeadModel:
    """Fit the chosen candidate on train and, where it was given, val; train alone scales.

    Args:
        best: what was chosen.
        inputs: features of its layers.
        codes: (n_samples,).
        protocol: what is fitted on.
        classes: names of the codes.

    Raises:
        RefitError: the setting cannot be fitted on all of it.
    """
    candidate = best.candidate
    scaler = fit_scaler(inputs.X[protocol.train], candidate.scaling, inputs.widths)
    X = inputs.matrix(HEADS[candidate.head].views)
    head = make_head(candidate.head, **candidate.setting)
    try:
        fit_on(head, scaler.rows(X, protocol.refit), codes[protocol.refit])
    except FIT_ERRORS as error:
        raise RefitError.of(candidate, len(protocol.refit), error) from error
    return HeadModel(scaler, head, best.temperature, tuple(classes))
