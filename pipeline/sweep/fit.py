"""Fit one kind of head on stored features: choose its setting, fit it, score it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UnknownNameError
from pipeline.heads import HEADS
from pipeline.sweep.grids import GRIDS, Setting
from pipeline.sweep.head_run import Clock, HeadRun, finish_run
from pipeline.sweep.prepare import plan
from pipeline.sweep.proposals import Grid, only_scaling, scalings_of
from pipeline.sweep.search import Search
from pipeline.sweep.stream import fit_streamed, must_stream
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
    memory_limit: float | None = None,
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
        scaling: one of ``pipeline.heads.scaling.SCALINGS``, "auto" to try those that may suit the
            head; None for the head's own default.
        settings: parameters to try; None for a few that suit the head.
        metric: what chooses, of ``pipeline.sweep.trials.METRICS``.
        seed: of held-out parts, gradient steps and the bootstrap.
        memory_limit: of the whole process, bytes. Where a fit in memory would exceed it, the head
            is fitted by passes over blocks of rows, to the same result.
        on_trial: called with every setting that was tried.

    Raises:
        UsageError: unknown head, layer, column, metric or scaling; or a head that cannot be
            fitted within the memory limit.
        DataError: no labels, no train split, too few classes, or splits that part a group.
        StoreError: a store is damaged, or the stores share no sample.
        ResourceError: the features do not fit in memory, or the limit leaves no room.
        TlpipeError: every setting failed.
    """
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    asked = [scaling] if scaling else []
    scalings = scalings_of(head, asked)
    check_metric(metric)
    clock = Clock()
    settings = settings or GRIDS["quick"][head]
    data = plan(stores, layers=layers, label=label, groups=groups, seed=seed)
    notes = data.notes()
    if memory_limit is not None and must_stream(data, head, settings, memory_limit):
        only = only_scaling(head, asked)
        clock.lap("load")
        run = fit_streamed(
            data, head=head, scaling=only, settings=settings, metric=metric,
            memory_limit=memory_limit, on_trial=on_trial, clock=clock,
        )  # fmt: skip
        return replace(run, notes=notes + run.notes)
    _ = data.inputs.X
    clock.lap("load")
    frames = [(data.inputs.layer_names, name) for name in scalings]
    proposals = Grid(head, settings, frames)
    search = Search(data, metric=metric, on_trial=on_trial, spares_memory=memory_limit is not None)
    selection = search.run(proposals)
    clock.lap("select")
    run = finish_run(search, selection, metric=metric, seconds=clock.laps)
    return replace(run, notes=notes + run.notes)
