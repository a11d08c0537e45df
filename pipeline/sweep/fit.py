"""Fit one kind of head on stored features: choose its setting, fit it, score it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UnknownNameError
from pipeline.heads import HEADS
from pipeline.heads.scaling import SCALINGS
from pipeline.sweep.grids import GRIDS, Setting
from pipeline.sweep.head_run import Clock, HeadRun, finish_run
from pipeline.sweep.prepare import prepare
from pipeline.sweep.proposals import Grid
from pipeline.sweep.search import Search
from pipeline.sweep.trials import Trial, check_metric

if TYPE_CHECKING:
    from pipeline.store import Store

__all__ = ["HeadRun", "fit_head"]


def fit_head(
    stores: Store | str | Path | Sequence[Store | str | Path],
    *,
    head: str = "logreg",
    layers: Sequence[str] | None = None,
    label: str | None = None,
    groups: str | None = None,
    scaling: str | None = None,
    settings: Sequence[Setting] | None = None,
    metric: str = "top1",
    seed: int = 0,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> HeadRun:
    """Fit a head on stored features and score it.

    The setting is chosen on the val split, or on a part of train; the head is then fitted on
    train and val, and the test split is scored once. Nothing is written: see :meth:`HeadRun.save`.

    Args:
        stores: feature stores or their paths; several are joined by sample, features side by side.
        head: a key of ``pipeline.heads.HEADS``.
        layers: layers to use; ("all",) for every one; None for "penultimate", or every one.
        label: label column; None for "label" or the only one.
        groups: column of samples that belong together and are never parted.
        scaling: one of ``pipeline.heads.scaling.SCALINGS``; None for the head's own default.
        settings: parameters to try; None for a few that suit the head.
        metric: what chooses, of ``pipeline.sweep.trials.METRICS``.
        seed: of held-out parts, gradient steps and the bootstrap.
        on_trial: called with every setting that was tried.

    Raises:
        UsageError: unknown head, layer, column, metric or scaling.
        DataError: no labels, no train split, too few classes, or splits that part a group.
        StoreError: a store is damaged, or the stores share no sample.
        TlpipeError: every setting failed.
    """
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    scaling = scaling or HEADS[head].scaling
    if scaling not in SCALINGS:
        raise UnknownNameError("scaling", scaling, SCALINGS)
    check_metric(metric)
    clock = Clock()
    data = prepare(stores, layers=layers, label=label, groups=groups, seed=seed)
    clock.lap("load")
    frames = [(data.inputs.layer_names, scaling)]
    proposals = Grid(head, settings or GRIDS["quick"][head], frames)
    selection = Search(data, metric=metric, on_trial=on_trial).run(proposals)
    clock.lap("select")
    run = finish_run(data, selection, metric=metric, seconds=clock.laps)
    return replace(run, notes=data.notes() + run.notes)
