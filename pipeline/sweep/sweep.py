"""Many kinds of head and settings on the same features: one table, one recommendation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import TlpipeError, UnknownNameError, UsageError
from pipeline.heads import HEADS
from pipeline.sweep.head_run import Clock, HeadRun, default_folder, finish_run
from pipeline.sweep.journal import Journal
from pipeline.sweep.layers import AUTO, LayerChoice, choose_layers, layer_sets, layers_to_read
from pipeline.sweep.memory import peak_memory
from pipeline.sweep.prepare import Prepared
from pipeline.sweep.prepare import plan as plan_data
from pipeline.sweep.proposals import (
    Draws,
    Frame,
    Grid,
    Guided,
    Proposals,
    check_search,
    only_scaling,
    scalings_of,
)
from pipeline.sweep.search import Search
from pipeline.sweep.space import Choice, Range, check_settings, grid_of, params_of, space_of
from pipeline.sweep.stream import fit_streamed, must_stream
from pipeline.sweep.sweep_run import HeadResult, SweepRun
from pipeline.sweep.trials import Trial, check_metric

if TYPE_CHECKING:
    from pipeline.store import Store

_DEFAULT_TRIALS = 30


@dataclass(frozen=True)
class Plan:
    """What a sweep tries.

    Attributes:
        heads: keys of ``pipeline.heads.HEADS``.
        layers: "each", "all", "auto", or layers separated by commas; () for the default of the
            stores.
        scalings: of ``pipeline.heads.scaling.SCALINGS``, "auto" for those that may suit a head; ()
            for the head's own default.
        grid: a key of ``pipeline.sweep.grids.GRIDS``.
        params: (head or "", parameter, values) that take the place of the grid's.
        search: "grid", "random" or "optuna".
        n_trials: candidates of each head, of a search that draws; None for 30.
        time_budget: seconds for all heads and repeats; None for no end.
        metric: what chooses, of ``pipeline.sweep.trials.METRICS``.
        repeats: how often all of it is done, each time with another seed.
        seed: the first.
        memory_limit: of the whole process, bytes; heads that could exceed it are fitted from disk.
    """

    heads: tuple[str, ...] = ("logreg",)
    layers: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ()
    grid: str = "default"
    params: tuple[tuple[str, str, Range | Choice], ...] = ()
    search: str = "grid"
    n_trials: int | None = None
    time_budget: float | None = None
    metric: str = "top1"
    repeats: int = 1
    seed: int = 0
    memory_limit: float | None = None
    spaces: Mapping[str, Mapping[str, Range | Choice]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be done, before anything is read.

        Raises:
            UsageError: a name that there is none of, or numbers out of range.
        """
        if not self.heads:
            raise UsageError(f"No head was named; there are: {', '.join(HEADS)}.")
        for head in self.heads:
            if head not in HEADS:
                raise UnknownNameError("head", head, HEADS)
            scalings_of(head, self.scalings)
        check_metric(self.metric)
        check_search(self.search)
        if self.n_trials is not None and self.search == "grid":
            raise UsageError(
                "A grid tries all of its settings.\n"
                "  For a number of trials:  --search random --trials N"
            )
        if self.repeats < 1 or (self.n_trials or 1) < 1 or not (self.time_budget or 1) > 0:
            raise UsageError(
                f"{self.repeats} repeats, {self.n_trials} trials and a budget of "
                f"{self.time_budget} seconds, expected 1 or more of each."
            )
        if self.memory_limit is not None and (self.search != "grid" or self.time_budget):
            raise UsageError(
                "With --memory-limit all settings of a head share their passes over the store: "
                "it goes with --search grid, and without --time-budget."
            )
        object.__setattr__(self, "spaces", params_of(self.heads, self.params))
        for head in self.heads:
            grid = grid_of(head, self.grid, self.spaces[head])
            if self.params:
                check_settings(head, grid)

    def proposals(self, head: str, layers: Sequence[tuple[str, ...]], seed: int) -> Proposals:
        """Candidates of a head."""
        frames: list[Frame] = [
            (names, scaling) for names in layers for scaling in scalings_of(head, self.scalings)
        ]
        if self.search == "grid":
            settings = grid_of(head, self.grid, self.spaces[head])
            return Grid(head, settings, frames, spread=self.time_budget is not None)
        kind = Guided if self.search == "optuna" else Draws
        space = space_of(head, self.spaces[head])
        return kind(head, space, frames, self.n_trials or _DEFAULT_TRIALS, seed)


def sweep(
    stores: Store | str | Path | Sequence[Store | str | Path],
    plan: Plan,
    *,
    label: str | None = None,
    groups: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
    on_trial: Callable[[Trial], None] = lambda _: None,
    on_head: Callable[[HeadRun], None] = lambda _: None,
) -> SweepRun:
    """Choose the best candidate of every head, fit it, and score it on test once a repeat.

    Every trial is written down as it is done, so that a sweep that was killed can go on. Otherwise
    nothing is written: see :meth:`SweepRun.save`.

    Args:
        stores: feature stores or their paths; several are joined by sample, features side by side.
        plan: what to try.
        label: label column; None for "label" or the only one.
        groups: column of samples that belong together and are never parted.
        out: folder that the run will be saved in, where trials are kept meanwhile;
            ``runs/<data source>`` by default.
        resume: take up the trials of a sweep of the same data that was killed.
        on_note: is told what is worth knowing beforehand.
        on_trial: is told of every trial.
        on_head: is told of every head that is done.

    Raises:
        UsageError: unknown layer or column.
        DataError: no labels, no train split, too few classes, or splits that part a group.
        StoreError: a store is damaged, the stores share no sample, or ``out`` cannot be written to.
        ResourceError: the features do not fit into memory.
        TlpipeError: every setting of every head failed.
    """
    clock = Clock()
    data = plan_data(
        stores, layers=layers_to_read(plan.layers), label=label, groups=groups, seed=plan.seed
    )
    sets = layer_sets(data.inputs.layer_names, plan.layers)
    if plan.memory_limit is None:
        _ = data.inputs.X
    elif len(sets) != 1 or AUTO in plan.layers:
        raise UsageError(
            f"With --memory-limit one set of layers is swept, not {', '.join(plan.layers)}.\n"
            "  Name it:  --layers penultimate"
        )
    clock.lap("load")
    ends = None if plan.time_budget is None else time.monotonic() + plan.time_budget
    journal = Journal(out or default_folder(data.inputs.blocks), data.key(), resume=resume)
    if journal.n_left:
        on_note(
            f"An unfinished sweep of this data left {journal.n_left:,} trials; --resume takes "
            "them up."
        )
    with journal:
        choice = None
        if AUTO in plan.layers and data.protocol.folds:
            choice = choose_layers(data, Search(data, plan.metric, ends, journal))
            clock.lap("layers")
            sets = list(dict.fromkeys([*sets, choice.layers]))
        runner = _Runner(data, plan, sets or [data.inputs.layer_names], journal, ends, on_trial)
        results = runner.all_heads(on_head)
    clock.lap("sweep")
    return SweepRun(results, runner.failures, plan.metric, _notes(data, choice), clock.seconds())


def _notes(data: Prepared, choice: LayerChoice | None) -> list[str]:
    return data.notes() + ([choice.note()] if choice else [])


@dataclass
class _Runner:
    """Heads times repeats.

    Attributes:
        failures: why a head has no result, by its name.
    """

    data: Prepared
    plan: Plan
    sets: Sequence[tuple[str, ...]]
    journal: Journal
    ends: float | None
    on_trial: Callable[[Trial], None]
    failures: dict[str, str] = field(default_factory=dict)

    def all_heads(self, on_head: Callable[[HeadRun], None]) -> list[HeadResult]:
        """A result for each head that could be fitted.

        Raises:
            TlpipeError: none could.
        """
        plan, results = self.plan, []
        for place, head in enumerate(plan.heads):
            runs: list[HeadRun] = []
            try:
                with peak_memory() as peak:
                    for repeat in range(plan.repeats):
                        n_left = (len(plan.heads) - place) * plan.repeats - repeat
                        runs.append(self._one(head, plan.seed + repeat, n_left))
                        on_head(runs[-1])
            except TlpipeError as error:
                if len(plan.heads) == 1:
                    raise
                self.failures[head] = str(error)
            else:
                results.append(HeadResult.of(runs, peak.size_bytes))
        if not results:
            raise TlpipeError("\n".join(self.failures.values()))
        return results

    def _one(self, head: str, seed: int, n_left: int) -> HeadRun:
        """One head on one seed; its time is a fair share of what is left."""
        clock = Clock()
        data = self.data if seed == self.data.seed else self.data.again(seed)
        deadline = None
        if self.plan.memory_limit is not None:
            settings = grid_of(head, self.plan.grid, self.plan.spaces[head])
            if must_stream(data, head, settings, self.plan.memory_limit):
                return fit_streamed(
                    data, head=head, scaling=only_scaling(head, self.plan.scalings),
                    settings=settings, metric=self.plan.metric, memory_limit=self.plan.memory_limit,
                    on_trial=self.on_trial, clock=clock,
                )  # fmt: skip
        if self.ends is not None:
            now = time.monotonic()
            deadline = now + max(self.ends - now, 0.0) / n_left
        search = Search(
            data, self.plan.metric, deadline, self.journal, self.on_trial,
            spares_memory=self.plan.memory_limit is not None,
        )  # fmt: skip
        try:
            selection = search.run(self.plan.proposals(head, self.sets, seed))
            clock.lap("select")
            clock.laps["select"] += selection.known_seconds
            return finish_run(search, selection, metric=self.plan.metric, seconds=clock.laps)
        finally:
            if self.plan.memory_limit is not None:
                for name in ("X", "X_views"):  # the next head may need the room
                    vars(data.inputs).pop(name, None)
