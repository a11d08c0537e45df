"""Fit a head on features that do not fit in memory: the same protocol, by passes over the store."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.names import counted
from pipeline.errors import ResourceError, UsageError
from pipeline.heads import HEADS, describe_setting, head_class
from pipeline.heads.base import Head, softmax
from pipeline.heads.calibration import fit_temperature
from pipeline.heads.features import InputBlock
from pipeline.heads.model import HeadModel
from pipeline.heads.scaling import Scaler
from pipeline.heads.streaming.fit import STREAMED, Fitted, MemoryPlan, StreamedFit, can_stream
from pipeline.heads.streaming.footprint import FitSize, held_bytes
from pipeline.heads.streaming.moments import Parts
from pipeline.heads.streaming.outcomes import Outcomes
from pipeline.runs.predictions import Predictions
from pipeline.sweep.grids import Setting
from pipeline.sweep.head_run import Clock, HeadRun, fit_notes, view_notes
from pipeline.sweep.prepare import Prepared
from pipeline.sweep.search import Selection, all_failed
from pipeline.sweep.selection import RefitError
from pipeline.sweep.trials import Candidate, Trial

Array = NDArray[Any]
Indices = NDArray[np.intp]
Logits = dict[int, Array]

# What a fit loads, threads, freed memory that is kept, and what is paged in of torch as the process
# ends: that alone was 50 to 120 MB.
_LIBRARY_BYTES = 210e6
_LOGITS_SHARE = 0.25  # of the room, for scores that temperatures are fitted on
_OUTCOME_BYTES = 110  # of a sample that chooses, for each setting
_SCORE_BYTES = 300  # of a sample while it is scored
_PLACE_BYTES = 40  # of a sample that may be found, in each fit of knn
_MIN_CALIBRATION = 1000  # samples that a temperature is fitted on
_STATM = Path("/proc/self/statm")


def must_stream(
    data: Prepared, head: str, settings: Sequence[Setting], memory_limit: float
) -> bool:
    """Whether a fit with all features in memory could exceed the limit, in bytes."""
    return in_memory_bytes(data, head, settings) > memory_limit


def in_memory_bytes(
    data: Prepared, head: str, settings: Sequence[Setting], n_outputs: int | None = None
) -> float:
    """The most that this process could hold in a fit with all features in memory.

    Args:
        data: samples and protocol.
        head: a key of ``pipeline.heads.HEADS``.
        settings: to try.
        n_outputs: of a head that learns several label columns, which is fitted on the plain view
            alone; None for one column.
    """
    protocol, features = data.protocol, data.inputs.features
    n_samples, n_features = features.shape
    counts = np.sort(np.bincount(data.codes[protocol.refit]))
    size = FitSize(
        n_samples,
        len(protocol.refit),
        sum(len(fold.choose) for fold in protocol.folds),
        len(protocol.test),
        n_features,
        n_outputs or len(data.known) + len(data.unseen),
        len(protocol.folds),
        min((len(fold.fit) for fold in protocol.folds), default=len(protocol.refit)),
        int(counts[-2:].sum()),
        features.n_views if HEADS[head].views and n_outputs is None else 1,
    )
    tried = settings if protocol.folds else settings[:1]
    return resident_bytes() + _LIBRARY_BYTES + held_bytes(head, tried, size)


def resident_bytes() -> float:
    """Memory that this process holds; at its peak, where the system does not say how much now."""
    if _STATM.exists():
        return float(os.sysconf("SC_PAGE_SIZE") * int(_STATM.read_text().split()[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)


def fit_streamed(
    data: Prepared,
    *,
    head: str,
    scaling: str,
    settings: Sequence[Setting],
    metric: str,
    memory_limit: float,
    on_trial: Callable[[Trial], None],
    clock: Clock,
) -> HeadRun:
    """Choose a setting, fit it and score it; all settings share the passes.

    Args:
        data: samples and protocol; no feature is held.
        head: a key of ``pipeline.heads.HEADS``.
        scaling: one of ``pipeline.heads.scaling.SCALINGS``.
        settings: to try; those that need all features at once are left out, and it is said.
        metric: what chooses.
        memory_limit: of the whole process, bytes.
        on_trial: called with every setting that was tried.
        clock: of the phases.

    Raises:
        UsageError: no setting of this head can be fitted this way.
        ResourceError: the limit leaves no room.
        TlpipeError: every setting failed.
    """
    usable = [setting for setting in settings if can_stream(head, setting)]
    if not usable:
        needed = in_memory_bytes(data, head, settings)
        raise UsageError(_cannot(head, settings, needed, memory_limit))
    fit = _Streamed.of(data, head, scaling, usable, metric, memory_limit)
    trials = fit.choose(on_trial)
    clock.lap("select")
    best, trials, model = fit.refit_best(trials)
    clock.lap("fit")
    run = fit.finish(best, trials, model, clock)
    left_out = len(settings) - len(usable)
    rows = fit.streamed.rows
    notes = [
        f"The features were streamed from disk, in {counted(rows.n_passes, 'pass', 'passes')} over "
        f"blocks of {rows.block_rows:,} rows."
    ]
    if head == "knn":
        notes.append(
            "The model holds the places of its training samples, not a copy of them: predict reads "
            f"them from {', '.join(block.store for block in run.inputs)}, so keep it there."
        )
    if left_out:
        notes.append(
            f"{counted(left_out, 'setting')} left out: "
            f"{'it needs' if left_out == 1 else 'they need'} all features in memory."
        )
    return replace(run, notes=notes + run.notes)


def _cannot(
    head: str, settings: Sequence[Setting], needed_bytes: float, memory_limit: float
) -> str:
    """Why a head is not streamed, and what to do instead."""
    limit = memory_option(needed_bytes)
    what = f"Head {head!r}"
    if head in STREAMED:
        what += f" with {describe_setting(settings[0])}"
    return (
        f"{what} needs all features in memory: this fit takes up to {needed_bytes / 1e9:.2f} GB, "
        f"and --memory-limit is {memory_limit / 1e9:.2f} GB.\n"
        f"  Take  {limit},  fewer images (extract --limit), or a head that is fitted from disk: "
        "logreg (L2), linear, ridge, svm (kernel=linear, squared hinge), knn or prototype."
    )


def memory_option(needed_bytes: float) -> str:
    """The option that is enough the next time, when a little more may be held at the start."""
    return f"--memory-limit {math.ceil((needed_bytes + 2e7) / 1e7) / 100:.2f}GB"


@dataclass
class _Streamed:
    """One head on one protocol.

    Attributes:
        data: samples and protocol.
        head: its name.
        scaling: of its features.
        settings: to try.
        metric: that chooses.
        streamed: the fits.
        logits_bytes: what scores may be kept.
        fitted: heads of the chosen scaling that have not seen a part, by setting.
        outcomes: of the settings on the samples that choose.
    """

    data: Prepared
    head: str
    scaling: str
    settings: list[Setting]
    metric: str
    streamed: StreamedFit
    logits_bytes: float
    first_scaler: Scaler
    fitted: dict[int, dict[int, Fitted]]
    outcomes: dict[int, Outcomes]

    @classmethod
    def of(
        cls,
        data: Prepared,
        head: str,
        scaling: str,
        settings: Sequence[Setting],
        metric: str,
        memory_limit: float,
    ) -> _Streamed:
        kind = head_class(head)
        seed = {"seed": data.seed} if "seed" in kind.parameter_names() else {}
        seeded = [seed | setting for setting in settings]
        if not data.protocol.folds:
            seeded = seeded[:1]
        parts = _parts(data)
        features = data.inputs.features
        held = resident_bytes() + _LIBRARY_BYTES
        n_choose = sum(len(fold.choose) for fold in data.protocol.folds)
        held += n_choose * (_OUTCOME_BYTES * len(seeded) + _SCORE_BYTES)
        if head == "knn":
            held += _PLACE_BYTES * len(data.codes) * parts.n_parts
        room = memory_limit - held
        logits_bytes = 12.0 * len(data.known) * n_choose * len(seeded)
        logits_bytes = max(0.0, min(_LOGITS_SHARE * room, logits_bytes))
        plan = MemoryPlan.of(
            head, features.shape[1], len(data.known), parts.n_parts, len(seeded),
            room - logits_bytes, _largest_k(seeded) if head == "knn" else 0,
        )  # fmt: skip
        if plan.needed_bytes > room - logits_bytes:
            streamed_bytes = held + plan.needed_bytes / (1 - _LOGITS_SHARE)
            needed = min(streamed_bytes, in_memory_bytes(data, head, settings))
            raise ResourceError(
                f"--memory-limit {memory_limit / 1e9:.2f} GB leaves too little room: Python, its "
                f"libraries and the table of samples take {held / 1e9:.2f} GB.\n"
                f"  This fit needs about {needed / 1e9:.2f} GB:  {memory_option(needed)}"
            )
        streamed = StreamedFit(head, features, parts, scaling, data.inputs.widths, seeded, plan)
        first = _train_parts(data, parts) if len(data.protocol.folds) != 1 else [0]
        scaler = streamed.scaler(first)
        return cls(data, head, scaling, seeded, metric, streamed, logits_bytes, scaler, {}, {})

    def candidate(self, i: int) -> Candidate:
        """Setting number ``i``."""
        return Candidate(self.head, self.data.inputs.layer_names, self.scaling, self.settings[i])

    def rank(self, trial: Trial) -> tuple[float, ...]:
        """Larger is better; of equals the first."""
        if not trial.scores:
            return (0.0,)
        return (*trial.rank(self.metric), -float(self.settings.index(trial.setting)))

    def choose(self, on_trial: Callable[[Trial], None]) -> list[Trial]:
        """Fit every setting on every fold, and score the rows that choose."""
        if not self.data.protocol.folds:
            return [Trial(self.candidate(0), 0.0)]
        started = time.perf_counter()
        places = range(len(self.settings))
        left_out = range(1, self.streamed.parts.n_parts)
        self.fitted = {i: {} for i in places}
        for one in self.streamed.fit(places, left_out, self.first_scaler):
            self.fitted[one.setting][one.left_out] = one
        failures = {
            i: next((one.failure for one in own.values() if one.failure), "")
            for i, own in self.fitted.items()
        }
        good = [i for i in places if not failures[i]]
        temperatures = self._score(good)
        seconds = (time.perf_counter() - started) / len(self.settings)
        trials = []
        for i in places:
            if failures[i]:
                trial = Trial(self.candidate(i), seconds, failure=failures[i])
            else:
                scores = self.outcomes[i].scores(n_resamples=0)
                converged = all(one.head.converged_ for one in self.fitted[i].values())
                trial = Trial(
                    self.candidate(i), seconds, {k: v.value for k, v in scores.items()},
                    temperatures[i], converged,
                )  # fmt: skip
            trials.append(trial)
            on_trial(trial)
        return trials

    def _score(self, good: Sequence[int]) -> dict[int, float]:
        """Temperatures by setting; the outcomes are kept."""
        rows = np.concatenate([fold.choose for fold in self.data.protocol.folds])
        temperatures = dict.fromkeys(good, 1.0)
        held: list[tuple[Indices, Logits]] = []
        if HEADS[self.head].calibrated and good:
            # Of one setting at a time, copies in float64 are made.
            row_bytes = len(self.data.known) * (4.0 * len(good) + 60)
            n_kept = int(min(len(rows), max(_MIN_CALIBRATION, self.logits_bytes // row_bytes)))
            sampled = np.zeros(len(self.data.codes), dtype=bool)
            sampled[rows[np.linspace(0, len(rows) - 1, n_kept).astype(np.intp)]] = True
            for samples, logits in self._logits(good):
                kept = sampled[samples]
                held.append((samples[kept], {i: x[kept] for i, x in logits.items()}))
            truth = self.data.codes[np.concatenate([samples for samples, _ in held])]
            for i in good:
                own = np.concatenate([logits[i] for _, logits in held])
                temperatures[i] = fit_temperature(own, truth)
            if n_kept < len(rows):
                held.clear()
        self.outcomes = {i: Outcomes(rows, self.data.codes, self._n_scored) for i in good}
        for samples, logits in held or self._logits(good):
            for i, own in logits.items():
                self.outcomes[i].add(samples, softmax(own / temperatures[i]))
        return temperatures

    @property
    def _n_scored(self) -> int:
        return len(self.data.known) + len(self.data.unseen)

    def _logits(self, good: Sequence[int]) -> Iterator[tuple[Indices, Logits]]:
        """Scores of the rows that choose, by the heads that have not seen them."""
        numbers = self.streamed.parts.numbers
        for samples, raw in self.streamed.queries(numbers > 0):
            own = numbers[samples]
            for part in np.unique(own).tolist():
                mine = np.flatnonzero(own == part)
                heads = {i: self.fitted[i][part].head for i in good}
                yield from self._scored(heads, samples[mine], self.first_scaler(raw[mine]))

    def _scored(
        self, heads: dict[int, Head], samples: Indices, X: Array
    ) -> Iterator[tuple[Indices, Logits]]:
        """Scores (n, n_known_classes) by heads that may lack some of the classes."""
        for rows, found in self.streamed.logits(heads, X):
            tables = {}
            for i, own in found.items():
                tables[i] = np.full((len(own), len(self.data.known)), -np.inf, np.float32)
                tables[i][:, heads[i].classes_] = own
            yield samples[rows], tables

    def refit_best(self, trials: list[Trial]) -> tuple[Trial, list[Trial], HeadModel]:
        """Fit the best setting that can be fitted on train and val; the failures are noted.

        Raises:
            TlpipeError: there is none.
        """
        while left := [trial for trial in trials if not trial.failure]:
            best = max(left, key=self.rank)
            try:
                return best, trials, self.refit(best)
            except RefitError as error:
                failed = replace(best, failure=str(error))
                trials = [failed if trial is best else trial for trial in trials]
        raise all_failed(trials)

    def refit(self, best: Trial) -> HeadModel:
        """Fit the chosen setting on train and val; train alone scales.

        Raises:
            RefitError: it cannot be fitted on all of it.
        """
        scaler = self.streamed.scaler(_train_parts(self.data, self.streamed.parts))
        i = self.settings.index(best.setting)
        near = next(iter(self.fitted.get(i, {}).values()), None)
        start = None if near is None else (near.head, self.first_scaler)
        (found,) = self.streamed.fit([i], [0], scaler, start)
        if found.head is None:
            raise RefitError.of(best.candidate, len(self.data.protocol.refit), found.failure)
        self.fitted.clear()  # scores need the room
        self.streamed.moments.grams.clear()
        return HeadModel(scaler, found.head, best.temperature, self.data.known)

    def _blocks(self) -> tuple[InputBlock, ...]:
        """The inputs; where the model reads its stores, they are found from everywhere."""
        blocks = self.data.inputs.blocks
        if self.head != "knn":
            return blocks
        return tuple(replace(block, store=str(Path(block.store).resolve())) for block in blocks)

    def finish(self, best: Trial, trials: list[Trial], model: HeadModel, clock: Clock) -> HeadRun:
        """Score test once, and put everything together."""
        data, inputs, protocol = self.data, self.data.inputs, self.data.protocol
        i = self.settings.index(best.setting)
        started = time.perf_counter()
        parts: dict[str, Outcomes] = {}
        rows_by_split = {"test": protocol.test}
        if len(protocol.test):
            parts["test"] = Outcomes(protocol.test, data.codes, self._n_scored)
            wanted = np.zeros(len(data.codes), dtype=bool)
            wanted[protocol.test] = True
            for samples, raw in self.streamed.queries(wanted):
                X = model.scaler(raw)
                for rows, tables in self._scored({i: model.head}, samples, X):
                    parts["test"].add(rows, softmax(tables[i] / model.temperature))
            clock.laps["predict"] = 1000 * (time.perf_counter() - started) / len(protocol.test)
        if self.outcomes:
            parts["val"] = self.outcomes[i]
            rows_by_split["val"] = np.concatenate([fold.choose for fold in protocol.folds])
        split = next(iter(parts), "")
        rows = rows_by_split.get(split, protocol.test)
        outcome = parts.get(split, Outcomes(rows, data.codes, self._n_scored))
        scores = {name: part.scores(seed=data.seed) for name, part in parts.items()}
        chosen = self.outcomes.get(i)
        chosen_rows = rows_by_split.get("val", np.zeros(0, np.intp))
        selection = Selection(best, trials, chosen_rows, np.zeros((0, len(data.known))))
        clock.lap("score")
        return HeadRun(
            head=self.head,
            model=model,
            inputs=self._blocks(),
            label=inputs.label_column,
            seed=data.seed,
            best=best,
            metric=self.metric,
            trials=trials,
            chosen_by=protocol.chosen_by,
            scored_on=split,
            scores=scores,
            confusion=outcome.confusion(),
            score_classes=(*data.known, *data.unseen),
            predictions=Predictions(
                ids=inputs.ids[rows],
                splits=inputs.splits[rows],
                labels=inputs.labels[rows],
                predicted=np.array(model.classes, dtype=object)[outcome.predicted],
                probability=outcome.confidence,
            ),
            chosen_right=(
                np.zeros(0, bool) if chosen is None else chosen.predicted == chosen.truth
            ),
            n_samples=data.n_samples(),
            split_origin=data.split_origin,
            seconds=clock.seconds(),
            data_digest=inputs.digest(),
            notes=[
                *view_notes(selection.best.candidate.head, data.inputs, plain_only=True),
                *fit_notes(model, selection, data),
            ],
        )


def _largest_k(settings: Sequence[Setting]) -> int:
    """Neighbours that are searched for."""
    ks = [getattr(head_class("knn")(**setting), "k", 0) for setting in settings]
    return max((k for k in ks if isinstance(k, int)), default=0)


def _parts(data: Prepared) -> Parts:
    """Every sample that is fitted on, by the fold that it chooses in; 0 for none."""
    numbers = np.full(len(data.codes), -1, dtype=np.int8)
    numbers[data.protocol.refit] = 0
    for number, fold in enumerate(data.protocol.folds, 1):
        numbers[fold.choose] = number
    return Parts(data.codes, numbers, len(data.protocol.folds) + 1, len(data.known))


def _train_parts(data: Prepared, parts: Parts) -> list[int]:
    """The parts that train consists of."""
    return [0] if data.protocol.kind == "val" else list(range(parts.n_parts))
