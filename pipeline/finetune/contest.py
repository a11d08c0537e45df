"""Frozen features against fine-tuning on the same data: everything that `compare DATA` runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import TlpipeError, UsageError
from pipeline.extract.extractor import Settings as ExtractSettings
from pipeline.extract.extractor import extract_all
from pipeline.extract.recall import Request
from pipeline.finetune.fit import Watcher, finetune
from pipeline.finetune.settings import Settings, check_policy
from pipeline.runs.comparison import Comparison, compare_runs
from pipeline.sweep.prepare import prepare
from pipeline.sweep.search import take_layers
from pipeline.sweep.sizes import accuracy_by_size
from pipeline.sweep.sweep import Plan, sweep

if TYPE_CHECKING:
    from pipeline.data import DataSource
    from pipeline.sweep.sweep_run import SweepRun

POLICIES = ("head", "last:1", "full", "scratch")


@dataclass(frozen=True)
class Contest:
    """What stands against what.

    Attributes:
        backbones: their names.
        weights: of the backbones.
        image_size: side of the input, pixels; None for the backbone's own.
        heads: on frozen features, each with a sweep of its own.
        grid: of these sweeps.
        policies: of fine-tuning; () for none.
        training: settings that the policies share.
        budget_seconds: for all fine-tuning together, each policy a fair part of what is left; None
            for as long as the epochs take.
        sizes: whether accuracy is also measured with fewer training samples.
        label: label column; None for "label" or the only one.
        seed: of everything random.
    """

    backbones: tuple[str, ...]
    heads: tuple[str, ...]
    weights: str = "default"
    image_size: int | None = None
    grid: str = "default"
    policies: tuple[str, ...] = POLICIES
    training: Settings = field(default_factory=Settings)
    budget_seconds: float | None = None
    sizes: bool = True
    label: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no contest, before anything is read.

        Raises:
            UsageError: a name that there is none of, or nothing to compare.
        """
        for policy in self.policies:
            check_policy(policy)
        if len(self.heads) + len(self.policies) < 2 or not self.backbones:
            raise UsageError("A comparison needs a backbone, and two heads or policies.")
        Plan(self.heads, grid=self.grid)


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        comparison: of all runs.
        paths: of all runs.
        sizes: by backbone, accuracy of the best frozen head by the number of training samples.
        failures: why a policy has no run, by its name and backbone.
        seconds: of all of it.
    """

    comparison: Comparison
    paths: list[Path]
    sizes: dict[str, list[dict[str, Any]]]
    failures: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON and pages."""
        return self.comparison.to_dict() | {
            "runs": [str(path) for path in self.paths],
            "sizes": self.sizes,
            "failures": self.failures,
            "contest_seconds": round(self.seconds, 1),
        }


def hold_contest(
    source: DataSource,
    contest: Contest,
    *,
    cache_dir: Path,
    out: Path,
    command: str = "",
    on_note: Callable[[str], None] = lambda _: None,
    watcher: Watcher | None = None,
    on_plan: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Embed, fit every head, fine-tune every policy, and compare what test says of them.

    All share the splits and the seed. Runs are saved as they are done.

    Args:
        source: labelled images.
        contest: what stands against what.
        cache_dir: where stores are kept.
        out: folder for the runs' folders.
        command: the command line, for the record.
        on_note: is told what happens.
        watcher: of the trainings.
        on_plan: see :func:`pipeline.extract.extractor.extract_all`.
        on_progress: likewise.
        should_stop: whether the user asked to stop; asked between and within the parts.

    Raises:
        TlpipeError: see ``extract``, ``sweep`` and ``finetune``; a training that fails is noted,
            and the others go on.
    """
    started = time.perf_counter()
    watcher = watcher or Watcher()
    reports = extract_all(
        source,
        [
            Request(name, contest.weights, contest.image_size, contest.seed)
            for name in contest.backbones
        ],
        ExtractSettings(device=contest.training.device),
        cache_dir=cache_dir,
        on_plan=on_plan,
        on_progress=on_progress,
        on_note=on_note,
        should_stop=should_stop,
    )
    if any(report.interrupted for report in reports):
        raise KeyboardInterrupt
    paths: list[Path] = []
    sizes: dict[str, list[dict[str, Any]]] = {}
    for name, report in zip(contest.backbones, reports, strict=True):
        paths += _frozen(report.store, name, contest, out, command, on_note, sizes)
    failures: dict[str, str] = {}
    jobs = [(name, policy) for name in contest.backbones for policy in contest.policies]
    ends = None
    if contest.budget_seconds is not None:
        ends = time.monotonic() + contest.budget_seconds
    for place, (name, policy) in enumerate(jobs):
        settings = replace(contest.training, policy=policy, seed=contest.seed)
        if ends is not None:
            left = max(ends - time.monotonic(), 1.0) / (len(jobs) - place)
            settings = replace(settings, budget_seconds=left)
        on_note(f"Fine-tuning {name}, {policy}")
        try:
            run = finetune(
                source,
                _loaded(name, contest),
                settings,
                label=contest.label,
                out=out,
                watcher=watcher,
            )
        except TlpipeError as error:
            if should_stop():
                raise
            failures[f"{policy} ({name})"] = str(error)
            on_note(f"{policy}: {error}")
            continue
        paths.append(run.save(command=command))
    return Outcome(compare_runs(paths), paths, sizes, failures, time.perf_counter() - started)


def _loaded(name: str, contest: Contest) -> Any:
    from pipeline.backbones import load_backbone

    return load_backbone(
        name, weights=contest.weights, image_size=contest.image_size, seed=contest.seed
    )


def _frozen(
    store: Path,
    name: str,
    contest: Contest,
    out: Path,
    command: str,
    on_note: Callable[[str], None],
    sizes: dict[str, list[dict[str, Any]]],
) -> list[Path]:
    """Every head on the features of one backbone, each a run of its own."""
    if not contest.heads:
        return []

    def told(run: Any) -> None:
        on_note(f"{name}, {run.head}: {run.metrics.get('top1', 'not scored')}")

    found = sweep(
        store,
        Plan(contest.heads, grid=contest.grid, seed=contest.seed),
        label=contest.label,
        out=out,
        on_note=on_note,
        on_head=told,
    )
    if contest.sizes:
        sizes[name] = _by_size(store, found, contest, on_note)
    return [result.run.save(out, command=command) for result in found.results]


def _by_size(
    store: Path, found: SweepRun, contest: Contest, on_note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Accuracy of the best frozen head with fewer training samples."""
    best = found.recommended()[0].run.best
    data = prepare(store, label=contest.label, seed=contest.seed)
    if not len(data.protocol.test):
        return []
    data = replace(data, inputs=take_layers(data.inputs, best.candidate.layers))
    points = accuracy_by_size(data, best)
    on_note(
        f"{best.candidate.head} with fewer samples a class: "
        + ", ".join(f"{p.n_per_class}: {p.to_dict()['mean']:.3f}" for p in points)
    )
    return [point.to_dict() | {"head": best.candidate.head} for point in points]
