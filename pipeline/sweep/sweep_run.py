"""The outcome of a sweep: one line a head, which of them to take, and the folder it is kept in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.stats import t as student

from pipeline.heads.metrics import Score
from pipeline.heads.paired import accuracy_difference, mcnemar
from pipeline.runs.folder import create_run
from pipeline.sweep.head_run import HeadRun, backbone_names, default_folder
from pipeline.sweep.trials import Trial

TRIALS_FILE = "trials.jsonl"
PAGE_FILE = "report.html"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class HeadResult:
    """One head: its run, and how far other seeds lead.

    Attributes:
        run: of the first seed.
        top1: accuracy on ``run.scored_on`` with its 95 % interval: the bootstrap over samples; with
            repeats their mean, and the spread of the seeds added (Student's t). None where nothing
            was scored.
        repeats: accuracy of every seed.
        seconds: choosing, fitting and scoring, mean of the repeats.
        memory_bytes: the most that the process held beyond what it held before; None where the
            operating system does not say.
        trials: of every seed, as (seed, trial).
    """

    run: HeadRun
    top1: Score | None
    repeats: tuple[float, ...]
    seconds: float
    memory_bytes: int | None
    trials: tuple[tuple[int, Trial], ...]

    @classmethod
    def of(cls, runs: Sequence[HeadRun], memory_bytes: int | None) -> Self:
        """Summarise the repeats of a head."""
        scores = [run.metrics["top1"] for run in runs if run.metrics]
        repeats = tuple(score.value for score in scores)
        top1 = scores[0] if scores else None
        if len(repeats) > 1:
            mean, spread = float(np.mean(repeats)), float(np.std(repeats, ddof=1))
            by_seed = float(student.ppf(0.975, len(repeats) - 1)) * spread / len(repeats) ** 0.5
            # All repeats are scored on the same samples: their sampling error does not average out.
            below, above = (
                float(np.mean([abs(getattr(score, end) - score.value) for score in scores]))
                for end in ("low", "high")
            )
            low, high = (
                mean - float(np.hypot(below, by_seed)),
                mean + float(np.hypot(above, by_seed)),
            )
            top1 = Score(mean, max(low, 0.0), min(high, 1.0))
        return cls(
            runs[0],
            top1,
            repeats,
            float(np.mean([run.seconds["total"] for run in runs])),
            memory_bytes,
            tuple((run.seed, trial) for run in runs for trial in run.trials),
        )

    def to_dict(self, metric: str) -> dict[str, Any]:
        """A line of the table, for JSON."""
        run, candidate = self.run, self.run.best.candidate
        return {
            "head": run.head,
            "setting": candidate.setting,
            "layers": list(candidate.layers),
            "scaling": candidate.scaling,
            "temperature": run.model.temperature,
            f"val_{metric}": run.best.scores.get(metric),
            "scored_on": run.scored_on,
            "top1": None if self.top1 is None else self.top1.to_dict(),
            "repeats": list(self.repeats),
            "seed_std": float(np.std(self.repeats, ddof=1)) if len(self.repeats) > 1 else None,
            "metrics": run.metrics_dict(),
            "seconds": round(self.seconds, 3),
            "predict_seconds_per_1000": run.seconds.get("predict"),
            "memory_bytes": self.memory_bytes,
            "size_bytes": run.size_bytes,
            "n_trials": len(run.trials),
            "n_failed": sum(bool(trial.failure) for trial in run.trials),
            "converged": run.converged,
            "notes": run.notes,
        }


@dataclass(frozen=True)
class SweepRun:
    """The best of every head.

    Attributes:
        results: in the order in which the heads were asked for.
        failures: why a head has no result, by its name.
        metric: that chose.
        notes: what a user should know before believing the scores.
        seconds: by phase, and "total".
    """

    results: list[HeadResult]
    failures: dict[str, str]
    metric: str
    notes: list[str]
    seconds: dict[str, float]

    def ranked(self) -> list[HeadResult]:
        """The best first, by the samples that chose; test has no say."""
        if not len(self.results[0].run.chosen_right):
            return list(self.results)
        return sorted(
            self.results,
            key=lambda result: (*result.run.best.rank(self.metric), -result.run.size_bytes),
            reverse=True,
        )

    def recommended(self) -> tuple[HeadResult, str]:
        """The head to take, and why: the best on the samples that chose.

        Heads that cannot be told from it there (exact McNemar test, 5 %) are named, with what
        their models save.
        """
        best, *others = self.ranked()
        if not len(best.run.chosen_right):
            return best, "no sample could be held out to compare the heads: the first one is taken"
        level = [
            _saving(result.run, best.run)
            for result in others
            if mcnemar(best.run.chosen_right, result.run.chosen_right) >= SIGNIFICANT
        ]
        value = best.run.best.scores[self.metric]
        why = f"it has the best {self.metric} on validation, {value:.3f}"
        return best, why + (f", but cannot be told from {' or '.join(level)}" if level else "")

    def compared(self) -> dict[str, dict[str, Any]]:
        """Each other head against the recommended one on the samples that were scored, by name.

        ``difference`` is in accuracy, with its paired interval; ``p_value`` of McNemar's test.
        """
        chosen, _ = self.recommended()
        own = _right(chosen.run)
        if not len(own):
            return {}
        found = {}
        for result in self.results:
            if result is not chosen:
                right = _right(result.run)
                found[result.run.head] = {
                    "difference": accuracy_difference(right, own, seed=chosen.run.seed).to_dict(),
                    "p_value": mcnemar(right, own),
                }
        return found

    def to_dict(self) -> dict[str, Any]:
        """What ``run.json`` holds: the recommended head's run, and the table."""
        chosen, why = self.recommended()
        compared = self.compared()
        return chosen.run.to_dict() | {
            "kind": "sweep",
            "notes": self.notes + chosen.run.notes,
            "metric": self.metric,
            "why": why,
            "seconds": self.seconds,
            "heads": [
                result.to_dict(self.metric) | compared.get(result.run.head, {})
                for result in self.ranked()
            ],
            "failures": self.failures,
        }

    def save(
        self,
        out: Path | None = None,
        *,
        name: str = "sweep",
        command: str = "",
        page: Callable[[dict[str, Any]], str] | None = None,
    ) -> Path:
        """Write the run to a new numbered folder and return its path.

        Args:
            out: folder for the run's folder; ``runs/<data source>`` by default.
            name: what the folder's name begins with.
            command: the command line that made it, for the record.
            page: makes report.html of what run.json holds.

        Raises:
            ResourceError: the disk is full.
            StoreError: the folder cannot be written to.
        """
        chosen, _ = self.recommended()

        def write(folder: Path) -> None:
            document = self.to_dict() | {"command": command}
            chosen.run.write(folder, document)
            if page is not None:
                (folder / PAGE_FILE).write_text(page(document), encoding="utf-8")
            lines = [
                json.dumps({"seed": seed, **trial.to_dict()}, allow_nan=False)
                for result in self.results
                for seed, trial in result.trials
            ]
            (folder / TRIALS_FILE).write_text("\n".join(lines) + "\n", encoding="ascii")

        inputs = chosen.run.inputs
        return create_run(out or default_folder(inputs), f"{name}-{backbone_names(inputs)}", write)


def _saving(run: HeadRun, best: HeadRun) -> str:
    """The name of a head, and how much smaller its model is, if it is."""
    factor = best.size_bytes / max(run.size_bytes, 1)
    return f"{run.head} (a model {factor:.0f} times smaller)" if factor >= 2 else run.head


def _right(run: HeadRun) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n_scored,), whether each prediction was right."""
    return np.asarray(run.predictions.predicted == run.predictions.labels, dtype=bool)
