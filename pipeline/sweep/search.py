"""Try candidates of a head until they are done or the time is up, and keep the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import TlpipeError
from pipeline.heads import HEADS, head_class
from pipeline.heads.features import HeadInputs
from pipeline.sweep.journal import Journal
from pipeline.sweep.prepare import Prepared
from pipeline.sweep.proposals import Frame, Proposals
from pipeline.sweep.selection import Scaled, scale, try_candidates
from pipeline.sweep.trials import Candidate, Trial

_TOGETHER = 16
_KEPT_MATRICES = 2


Tried = tuple[Trial, NDArray[np.float64] | None]
"""A trial, and its probabilities (n_choose, n_classes); None where it failed."""


@dataclass(frozen=True)
class Selection:
    """What a search found.

    Attributes:
        best: the chosen trial; one that nothing chose where no sample could be held out.
        trials: all of them, in the order in which they were proposed.
        rows: samples that chose.
        probabilities: (len(rows), n_classes), by the best, fitted without them.
        stopped_early: the time was up before all was tried.
        has_edges: a best value at the end of what was tried is worth telling.
        known_seconds: that an earlier process spent on trials which were taken up.
    """

    best: Trial
    trials: list[Trial]
    rows: NDArray[np.intp]
    probabilities: NDArray[np.float64]
    stopped_early: bool = False
    has_edges: bool = True
    known_seconds: float = 0.0


@dataclass
class Search:
    """Tries candidates on one protocol.

    Attributes:
        data: features and protocol.
        metric: what chooses, of ``pipeline.sweep.trials.METRICS``.
        deadline: of ``time.monotonic``; at least some of each head is tried.
        journal: keeps trials; None for nowhere.
        on_trial: is told of every trial.
        spares_memory: hold the features in one scaling at a time, and scale them again instead.
    """

    data: Prepared
    metric: str = "top1"
    deadline: float | None = None
    journal: Journal | None = None
    on_trial: Callable[[Trial], None] = lambda _: None
    spares_memory: bool = False
    _matrices: dict[tuple[Frame, bool], Scaled] = field(default_factory=dict)

    def run(self, proposals: Proposals) -> Selection:
        """Try what is proposed.

        Raises:
            TlpipeError: every candidate failed.
        """
        protocol = self.data.protocol
        rows = np.concatenate([fold.choose for fold in protocol.folds] or [np.zeros(0, np.intp)])
        if not protocol.folds:
            untried = Trial(self._seeded(_common(proposals.next(None))), 0.0)
            nothing = np.zeros((0, len(self.data.known)))
            return Selection(untried, [untried], rows, nothing)
        tried: dict[str, Trial] = {}
        order: dict[str, int] = {}
        best: tuple[tuple[float, ...], Trial, NDArray[np.float64] | None] | None = None
        stopped_early = False
        known_seconds = 0.0
        pace = _Pace(self.deadline, HEADS[proposals.head].together)
        while proposed := proposals.next(pace.n_next()):
            batch = {c.key(): c for c in map(self._seeded, proposed)}
            for key in batch:
                order.setdefault(key, len(order))
            pace.begin(proposed)
            fresh = [candidate for key, candidate in batch.items() if key not in tried]
            for trial, probabilities in self._try(fresh):
                key = trial.candidate.key()
                tried[key] = trial
                known_seconds += trial.seconds if self._was_known(trial) else 0.0
                self.on_trial(trial)
                if not trial.failure:
                    # Of equals the first, in whatever order they are done.
                    rank = (*trial.rank(self.metric), -order[key])
                    best = max(best or (rank, trial, probabilities), (rank, trial, probabilities),
                               key=lambda one: one[0])  # fmt: skip
            for key in batch:
                failed = bool(tried[key].failure)
                proposals.tell(tried[key], None if failed else tried[key].rank(self.metric)[0])
            if pace.is_over():
                stopped_early = bool(proposals.next(1))
                break
        trials = sorted(tried.values(), key=lambda trial: order[trial.candidate.key()])
        if best is None:
            raise all_failed(trials)
        _, chosen, probabilities = best
        if probabilities is None:  # they went with the process that found it
            chosen, trials, probabilities = best_of(trials, self.metric, self._once_more)
        return Selection(
            chosen, trials, rows, probabilities, stopped_early, proposals.has_edges, known_seconds
        )

    def release(self) -> None:
        """Let go of scaled features; they are made again where they are needed."""
        self._matrices.clear()

    def without_best(self, selection: Selection, failure: str) -> Selection:
        """The next best of what was tried, where the best cannot be fitted on all samples.

        Args:
            selection: of this search.
            failure: why its best is of no use.

        Raises:
            TlpipeError: there is no other.
        """
        return without_best(selection, failure, self.metric, self._once_more)

    def _was_known(self, trial: Trial) -> bool:
        """Whether an earlier process did it."""
        known = self.journal and self.journal.known(self.data.seed, trial.candidate)
        return known is trial

    def _try(self, candidates: Sequence[Candidate]) -> Iterator[Tried]:
        """Trials with their probabilities; without where one failed or an earlier process did it.

        Args:
            candidates: all different.
        """
        fresh = []
        for candidate in candidates:
            known = self.journal and self.journal.known(self.data.seed, candidate)
            if known:
                yield known, None
            else:
                fresh.append(candidate)
        for (layers, scaling), group in groupby(sorted(fresh, key=_frame), key=_frame):
            some = list(group)
            # The matrix has no name here: it must be gone when the next one is made.
            for trial, probabilities in try_candidates(
                some, self._matrix((layers, scaling), some[0].head)
            ):
                if self.journal is not None:
                    self.journal.add(self.data.seed, trial)
                yield trial, probabilities

    def _once_more(self, candidate: Candidate) -> Tried:
        """What was tried before, for the probabilities that were not kept."""
        matrix = self._matrix(_frame(candidate), candidate.head)
        (tried,) = try_candidates([candidate], matrix)
        return tried

    def _seeded(self, candidate: Candidate) -> Candidate:
        """With the seed, where the head draws random numbers."""
        if "seed" not in head_class(candidate.head).parameter_names():
            return candidate
        return replace(candidate, setting={"seed": self.data.seed} | candidate.setting)

    def _matrix(self, frame: Frame, head: str) -> Scaled:
        layers, scaling = frame
        with_views = HEADS[head].views and self.data.inputs.features.n_views > 1
        key = frame, with_views
        if key not in self._matrices:
            while len(self._matrices) >= (1 if self.spares_memory else _KEPT_MATRICES):
                self._matrices.pop(next(iter(self._matrices)))
            part = take_layers(self.data.inputs, layers)
            self._matrices[key] = scale(
                part.matrix(with_views), self.data.codes, self.data.protocol,
                n_classes=len(self.data.known), scaling=scaling, widths=part.widths,
            )  # fmt: skip
        return self._matrices[key]


def all_failed(trials: Sequence[Trial]) -> TlpipeError:
    """What to raise where no setting of a head is left."""
    reasons = "\n".join(f"  {t.candidate.describe()}: {t.failure}" for t in trials)
    return TlpipeError(f"Every setting of head {trials[0].candidate.head!r} failed:\n{reasons}")


def best_of(
    trials: Sequence[Trial], metric: str, once_more: Callable[[Candidate], Tried]
) -> tuple[Trial, list[Trial], NDArray[np.float64]]:
    """The best trial, all of them, and the best one's probabilities (n_choose, n_classes).

    Args:
        trials: of one head; of equals the first is the best.
        metric: what chooses.
        once_more: tries a candidate again; one that fails then gives way to the next best.

    Raises:
        TlpipeError: none is left.
    """
    trials = list(trials)
    while left := [trial for trial in trials if not trial.failure and trial.scores]:
        best = max(left, key=lambda trial: trial.rank(metric))
        again, probabilities = once_more(best.candidate)
        trials = [again if trial is best else trial for trial in trials]
        if probabilities is not None:
            return again, trials, probabilities
    raise all_failed(trials)


def without_best(
    selection: Selection, failure: str, metric: str, once_more: Callable[[Candidate], Tried]
) -> Selection:
    """The next best of what was tried, where the best cannot be fitted on all samples.

    Args:
        selection: whose best is of no use.
        failure: why.
        metric, once_more: see :func:`best_of`.

    Raises:
        TlpipeError: there is no other.
    """
    useless = selection.best.candidate.key()
    trials = [
        replace(trial, failure=failure) if trial.candidate.key() == useless else trial
        for trial in selection.trials
    ]
    best, trials, probabilities = best_of(trials, metric, once_more)
    return replace(selection, best=best, trials=trials, probabilities=probabilities)


def _common(candidates: Sequence[Candidate]) -> Candidate:
    """What all candidates have in common; the rest is left to the head's defaults."""
    first = candidates[0]
    shared = {
        name: value
        for name, value in first.setting.items()
        if all(other.setting.get(name) == value for other in candidates)
    }
    return replace(first, setting=shared)


class _Pace:
    """How many candidates to try at once, so that the time is neither wasted nor overrun.

    Args:
        deadline: of ``time.monotonic``; None for none.
        most: never more than these at once; None for any number.
    """

    def __init__(self, deadline: float | None, most: int | None) -> None:
        self._deadline = deadline
        self._most = most
        self._started = time.monotonic()
        self._n_done = 0

    def begin(self, candidates: Sequence[Candidate]) -> None:
        """These are tried now."""
        self._n_done += len(candidates)

    def n_next(self) -> int | None:
        """How many to try next; None for all of them."""
        if self._deadline is None:
            return self._most
        if not self._n_done:
            return 1
        now = time.monotonic()
        seconds_each = max(now - self._started, 1e-3) / self._n_done
        # Half of what is left, as long as the estimate is young.
        affordable = int((self._deadline - now) / (2 * seconds_each))
        return max(1, min(affordable, _TOGETHER, self._n_done))

    def is_over(self) -> bool:
        """Whether the time is up."""
        return self._deadline is not None and time.monotonic() > self._deadline


def _frame(candidate: Candidate) -> Frame:
    return candidate.layers, candidate.scaling


def take_layers(inputs: HeadInputs, layers: Sequence[str]) -> HeadInputs:
    """The features of some layers, by their names."""
    return inputs.take([inputs.layer_names.index(name) for name in layers])
