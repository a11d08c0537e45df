"""Fit one head on several label columns at once: shared hidden layers, a softmax a column."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UnknownNameError, UsageError
from pipeline.heads import HEADS, MULTITASK, multitask_class
from pipeline.heads.base import softmax
from pipeline.heads.folds import FIT_ERRORS, FoldResult
from pipeline.heads.metrics import evaluate
from pipeline.heads.model import HeadModel
from pipeline.heads.scaling import fit_scaler
from pipeline.heads.tasks import NO_LABEL, TASK_WEIGHTS, task_slices
from pipeline.runs.tasks import MEAN_NOTE, TaskResult, mean_scores, score_task
from pipeline.sweep.columns import LabelColumn
from pipeline.sweep.grids import GRIDS, Setting
from pipeline.sweep.head_run import Clock, FittedRun, fit_notes, view_notes
from pipeline.sweep.prepare import Prepared, plan
from pipeline.sweep.proposals import scalings_of
from pipeline.sweep.search import Selection, Tried, all_failed, without_best
from pipeline.sweep.selection import RefitError, Scaled, scale
from pipeline.sweep.stream import in_memory_bytes, memory_option
from pipeline.sweep.trials import Candidate, Trial, check_metric

if TYPE_CHECKING:
    from pipeline.store import Store


@dataclass(frozen=True)
class MultiTaskRun(FittedRun):
    """A head that learned several label columns, and everything that was found out about it.

    Its ``scores`` are means over the columns.

    Attributes:
        tasks: what was found out about each column.
        task_weighting: of their losses, one of ``pipeline.heads.tasks.TASK_WEIGHTS``.
    """

    tasks: tuple[TaskResult, ...]
    task_weighting: str

    def found(self) -> dict[str, Any]:
        """The columns with their classes and scores."""
        return {
            "tasks": [result.to_dict() for result in self.tasks],
            "task_weighting": self.task_weighting,
            "task_weights": self.task_weights(),
        }

    def task_weights(self) -> list[float]:
        """What each column's loss was multiplied by in the end."""
        learned = getattr(self.model.head, "log_variances_", ())
        return [math.exp(-s) for s in learned] or [1 / len(self.tasks)] * len(self.tasks)

    def write_predictions(self, folder: Path) -> None:
        """Write ``predictions-<label>.csv`` for each column."""
        for result in self.tasks:
            result.write_predictions(folder)


def fit_multitask(
    stores: Store | str | Path | Sequence[Store | str | Path],
    labels: Sequence[str],
    *,
    head: str = "mlp",
    task_weights: str = "equal",
    layers: Sequence[str] | None = None,
    groups: str | None = None,
    scaling: str | None = None,
    settings: Sequence[Setting] | None = None,
    metric: str = "top1",
    seed: int = 0,
    memory_limit: float | None = None,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> MultiTaskRun:
    """Fit a head on stored features and several label columns at once, and score it.

    A sample that has no label in a column counts in the others. The setting is chosen by the mean
    over the columns; otherwise all is as in :func:`pipeline.sweep.fit.fit_head`.

    Args:
        stores: feature stores or their paths; several are joined by sample, features side by side.
        labels: label columns; held-out parts have equal shares of the classes of the first.
        head: one of ``pipeline.heads.MULTITASK``.
        task_weights: one of ``pipeline.heads.tasks.TASK_WEIGHTS``.
        layers: layers to use; ("all",) for every one; None for "penultimate", or every one.
        groups: column of samples that belong together and are never parted.
        scaling: one of ``pipeline.heads.scaling.SCALINGS``, "auto" to try those that may suit the
            head; None for the head's own default.
        settings: parameters to try; None for a few that suit the head.
        metric: whose mean chooses, of ``pipeline.sweep.trials.METRICS``.
        seed: of held-out parts, gradient steps and the bootstrap.
        memory_limit: of the whole process, bytes; None for none.
        on_trial: called with every setting that was tried.

    Raises:
        UsageError: unknown head, layer, column, metric, parameter or scaling; a head that learns
            one column at a time; or a memory limit that the features do not fit into.
        DataError: no labels, no train split, too few classes, or splits that part a group.
        StoreError: a store is damaged, or the stores share no sample.
        ResourceError: the features do not fit in memory.
        TlpipeError: every setting failed.
    """
    _check_head(head, labels)
    scalings = scalings_of(head, [scaling] if scaling else [])
    settings = settings or GRIDS["quick"][head]
    _check(head, settings, task_weights, metric)
    clock = Clock()
    data = plan(stores, layers=layers, label=labels, groups=groups, seed=seed)
    columns = [
        LabelColumn.of(name, column, data.protocol) for name, column in data.inputs.columns.items()
    ]
    fit = _MultiTask(data, columns, head, task_weights)
    needed = in_memory_bytes(data, head, settings, sum(fit.sizes))
    if memory_limit is not None and needed > memory_limit:
        fewer = ", fewer layers (--layers)" if len(data.inputs.layer_names) > 1 else ""
        raise UsageError(
            f"Several labels are learned in memory: this fit takes up to {needed / 1e9:.2f} GB, "
            f"and --memory-limit is {memory_limit / 1e9:.2f} GB.\n"
            f"  Take  {memory_option(needed)}{fewer},  or fewer images (extract --limit)."
        )
    _ = data.inputs.X
    clock.lap("load")
    selection = fit.select(settings, scalings, metric, on_trial)
    clock.lap("select")
    while True:
        try:
            model = fit.refit(selection.best)
            break
        except RefitError as error:
            selection = without_best(selection, str(error), metric, fit.once_more)
    clock.lap("fit")
    results = fit.score(model, selection, clock)
    clock.lap("score")
    scores = mean_scores(results)
    return MultiTaskRun(
        head=head,
        model=model,
        inputs=data.inputs.blocks,
        label=data.inputs.label_column,
        seed=seed,
        best=selection.best,
        metric=metric,
        trials=selection.trials,
        chosen_by=data.protocol.chosen_by,
        scored_on=next(iter(scores), ""),
        scores=scores,
        n_samples=data.n_samples(),
        split_origin=data.split_origin,
        seconds=clock.seconds(),
        data_digest=data.inputs.digest(),
        notes=[
            *data.inputs.notes,
            *(note for column in columns for note in column.notes(data.protocol)),
            *data.leak_notes(),
            *view_notes(head, data.inputs, plain_only=True),
            *fit_notes(model, selection, data),
            *([MEAN_NOTE] if scores else []),
        ],
        tasks=tuple(results),
        task_weighting=task_weights,
    )


def _check_head(head: str, labels: Sequence[str]) -> None:
    """Refuse a head that learns one column at a time, and one column."""
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    if head not in MULTITASK:
        options = " ".join(f"--label {name}" for name in labels)
        raise UsageError(
            f"Head {head!r} learns one label column, not several ({', '.join(labels)}).\n"
            f"  Learn them together:  tlpipe fit-head --head {MULTITASK[0]} {options}\n"
            f"  Or one at a time:     tlpipe fit-head --head {head} --label {labels[0]}"
        )
    if len(labels) < 2:
        raise UsageError(
            f"{len(labels)} label columns were given, expected two or more; fit_head learns one."
        )


def _check(head: str, settings: Sequence[Setting], task_weights: str, metric: str) -> None:
    """Refuse what cannot be done before anything is read."""
    check_metric(metric)
    if task_weights not in TASK_WEIGHTS:
        raise UnknownNameError("weighting of tasks", task_weights, TASK_WEIGHTS)
    known = multitask_class(head).parameter_names()
    for name in (name for setting in settings for name in setting):
        if name not in known:
            raise UnknownNameError(f"parameter of {head} with several labels", name, known)


@dataclass(frozen=True)
class _MultiTask:
    """A head on some data.

    Attributes:
        data: features and protocol.
        columns: what is learned.
        head: its name.
        task_weights: how the losses are weighted.
    """

    data: Prepared
    columns: Sequence[LabelColumn]
    head: str
    task_weights: str

    @property
    def sizes(self) -> list[int]:
        """Classes of each column."""
        return [len(column.task.classes) for column in self.columns]

    @property
    def codes(self) -> NDArray[np.int64]:
        """(n_samples, n_tasks)."""
        return np.stack([column.codes for column in self.columns], axis=1)

    def params(self, setting: Setting) -> dict[str, Any]:
        """All that the estimator is made with."""
        return {"n_classes": self.sizes, "task_weights": self.task_weights} | setting

    def select(
        self,
        settings: Sequence[Setting],
        scalings: Sequence[str],
        metric: str,
        on_trial: Callable[[Trial], None],
    ) -> Selection:
        """Try every setting with every scaling on every fold.

        Raises:
            TlpipeError: all of them failed.
        """
        protocol, layers = self.data.protocol, self.data.inputs.layer_names
        seeded = [{"seed": self.data.seed} | setting for setting in settings]
        groups = [[Candidate(self.head, layers, name, own) for own in seeded] for name in scalings]
        if not protocol.folds:
            untried = Trial(_common(groups[0]), 0.0)
            nothing = np.zeros((0, sum(self.sizes)))
            return Selection(untried, [untried], np.zeros(0, np.intp), nothing)
        trials: list[Trial] = []
        best: tuple[Trial, NDArray[np.float64]] | None = None
        for trial, probabilities in chain.from_iterable(map(self._try, groups)):
            on_trial(trial)
            trials.append(trial)
            if probabilities is not None and (
                best is None or trial.rank(metric) > best[0].rank(metric)
            ):
                best = trial, probabilities
        if best is None:
            raise all_failed(trials)
        rows = np.concatenate([fold.choose for fold in protocol.folds])
        return Selection(best[0], trials, rows, best[1])

    def once_more(self, candidate: Candidate) -> Tried:
        """What was tried before, for the probabilities that were not kept."""
        (tried,) = self._try([candidate])
        return tried

    def _try(self, candidates: Sequence[Candidate]) -> Iterator[Tried]:
        """Fit candidates that share their scaling on every fold."""
        inputs, n_outputs = self.data.inputs, sum(self.sizes)
        matrix = scale(
            inputs.X, self.codes, self.data.protocol,
            n_classes=n_outputs, scaling=candidates[0].scaling, widths=inputs.widths,
        )  # fmt: skip
        found = multitask_class(self.head).try_settings(
            [self.params(candidate.setting) for candidate in candidates],
            matrix.X, matrix.y, matrix.folds, n_classes=n_outputs,
        )  # fmt: skip
        folds: list[list[FoldResult]] = [[] for _ in candidates]
        for result in found:
            folds[result.setting].append(result)
        for candidate, parts in zip(candidates, folds, strict=True):
            yield self._judge(candidate, parts, matrix)

    def _judge(self, candidate: Candidate, parts: Sequence[FoldResult], matrix: Scaled) -> Tried:
        """Score one candidate over its folds; pooled probabilities, or None where it failed."""
        seconds = sum(part.seconds for part in parts)
        failure = next((part.failure for part in parts if part.failure), "")
        if failure:
            return Trial(candidate, seconds, failure=failure), None
        ordered = sorted(parts, key=lambda part: part.fold)
        logits = np.concatenate([part.logits for part in ordered if part.logits is not None])
        probabilities, scores = np.empty(logits.shape), []
        for t, part in enumerate(task_slices(self.sizes)):
            probabilities[:, part] = softmax(logits[:, part])
            truth = matrix.truth[:, t]
            if (truth != NO_LABEL).any():
                rows = truth != NO_LABEL
                scores.append(evaluate(truth[rows], probabilities[rows, part], n_resamples=0))
        means = {
            name: float(np.mean([score[name].value for score in scores]))
            for name in scores[0]
            if all(name in score for score in scores)
        }
        return Trial(candidate, seconds, means), probabilities

    def refit(self, best: Trial) -> HeadModel:
        """Fit what was chosen on train and, where it was given, val; train alone scales.

        Raises:
            RefitError: it cannot be fitted on all of it.
        """
        inputs, protocol = self.data.inputs, self.data.protocol
        scaler = fit_scaler(inputs.X[protocol.train], best.candidate.scaling, inputs.widths)
        head = multitask_class(self.head)(**self.params(best.setting))
        try:
            head.fit(scaler.rows(inputs.X, protocol.refit), self.codes[protocol.refit])
        except FIT_ERRORS as error:
            raise RefitError.of(best.candidate, len(protocol.refit), error) from error
        tasks = tuple(column.task for column in self.columns)
        classes = tuple(name for task in tasks for name in task.classes)
        return HeadModel(scaler, head, 1.0, classes, tasks)

    def score(self, model: HeadModel, selection: Selection, clock: Clock) -> list[TaskResult]:
        """Score the test split, and the samples that chose with heads that had not seen them."""
        inputs, test = self.data.inputs, self.data.protocol.test
        clock.lap("score")
        parts = {"test": (test, model.predict_proba(inputs.X[test]))} if len(test) else {}
        clock.lap("score")
        if len(test):
            clock.laps["predict"] = 1000 * clock.laps["score"] / len(test)
        if len(selection.rows):
            parts["val"] = selection.rows, selection.probabilities
        results = []
        for column, part in zip(self.columns, task_slices(self.sizes), strict=True):
            own = {split: (rows, found[:, part]) for split, (rows, found) in parts.items()}
            result = score_task(
                column.task, column.unseen, column.codes, own,
                ids=inputs.ids, splits=inputs.splits, seed=self.data.seed,
            )  # fmt: skip
            results.append(replace(result, data_digest=inputs.digest(column.task.label)))
        return results


def _common(candidates: Sequence[Candidate]) -> Candidate:
    """What all of them share; the rest is left to the head's defaults."""
    first, *others = candidates
    shared = {
        name: value
        for name, value in first.setting.items()
        if all(other.setting.get(name) == value for other in others)
    }
    return replace(first, setting=shared)
