"""Frozen features against fine-tuning on the same data: everything that `compare DATA` runs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backbones import load_backbone
from pipeline.data.names import counted
from pipeline.errors import TlpipeError, UsageError
from pipeline.extract.extractor import Settings as ExtractSettings
from pipeline.extract.extractor import extract_all
from pipeline.extract.recall import Request
from pipeline.finetune.by_size import (
    Curve,
    Few,
    frozen_curve,
    joined,
    plan_few,
    point_of_all,
)
from pipeline.finetune.checkpoint import StoppedError
from pipeline.finetune.data import check_group_column, choose_columns
from pipeline.finetune.fit import AUTO, FRESH, NONE, Watcher, finetune
from pipeline.finetune.policies import check_fits
from pipeline.finetune.settings import Settings, check_policy
from pipeline.runs.comparison import Comparison, compare_runs
from pipeline.runs.folder import (
    COMPARISON_PREFIX,
    RUN_FILE,
    RUN_FORMAT_VERSION,
    TRAINING_PREFIX,
    read_json,
    read_run,
    write_json,
)
from pipeline.store.durable import replacing
from pipeline.sweep.prepare import Prepared, plan
from pipeline.sweep.sizes import SizePoint
from pipeline.sweep.sweep import Plan, sweep
from pipeline.sweep.trials import Trial

if TYPE_CHECKING:
    from pipeline.backbones.backbone import Backbone
    from pipeline.data import DataSource
    from pipeline.finetune.run import FinetuneRun

POLICIES = ("head", "last:1", "full", "scratch")
_OF_CURVE = "full"
_SCRATCH = "scratch"
_FRESH = ":fresh"
_FORMAT = "tlpipe-contest"


@dataclass(frozen=True)
class Contest:
    """What stands against what.

    Attributes:
        backbones: their names.
        weights: of the backbones.
        image_size: side of the input, pixels; None for the backbone's own.
        heads: on frozen features, each with a sweep of its own.
        grid: of these sweeps.
        policies: of fine-tuning; () for none. One with ":fresh" behind it starts from a fresh head
            though there are fitted ones.
        training: settings that the policies share.
        budget_seconds: for all fine-tuning together, the same part for each training; None for as
            long as the epochs take.
        sizes: whether accuracy is also measured with fewer training samples: of the best head, and
            of "full" where it is among the policies.
        label: label column; None for "label" or the only one.
        groups: column of samples that belong together, none of which is ever parted.
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
    groups: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no contest, before anything is read.

        Raises:
            UsageError: a name that there is none of, or nothing to compare.
        """
        for policy in self.policies:
            check_policy(policy.removesuffix(_FRESH))
        if f"{_SCRATCH}{_FRESH}" in self.policies:
            raise UsageError(
                f"{_SCRATCH} always starts from a fresh head, so {_SCRATCH}{_FRESH} is no other "
                f"policy.\n  Name {_SCRATCH} alone."
            )
        if len(self.heads) + len(self.policies) < 2 or not self.backbones:
            raise UsageError("A comparison needs a backbone, and two heads or policies.")
        if self.heads:
            Plan(self.heads, grid=self.grid)

    def few(self, data: Prepared, epochs: int) -> list[Few]:
        """Trainings with fewer samples, where one with all of them has so many epochs."""
        if not self.sizes or _OF_CURVE not in self.policies:
            return []
        return plan_few(data, self.training.batch_size, epochs)

    def training_seconds(self, n_curves: int) -> float | None:
        """A training's part of the budget.

        Args:
            n_curves: trainings with fewer samples, those of one backbone together, have one too.
        """
        if self.budget_seconds is None:
            return None
        return self.budget_seconds / (len(self.policies) * len(self.backbones) + n_curves)

    def backbone(self, name: str) -> Backbone:
        """One of the networks, with the weights that all policies but scratch start from."""
        return load_backbone(name, weights=self.weights, image_size=self.image_size, seed=self.seed)

    def check(self, source: DataSource) -> None:
        """Refuse what data and networks do not allow, before anything is embedded.

        Raises:
            UsageError: no such label or group column, or fewer blocks than a policy asks for.
            DataError: there are no labels.
            MissingExtraError: a policy needs a package that is not installed.
        """
        choose_columns(source, self.label)
        if self.groups is not None:
            check_group_column(self.groups, source)
        for name in self.backbones if self.policies else ():
            stages = self.backbone(name).stages
            for policy in self.policies:
                try:
                    check_fits(policy.removesuffix(_FRESH), stages)
                except UsageError as error:
                    raise UsageError(f"{name}: {error}") from error


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        comparison: of all runs.
        paths: of all runs.
        sizes: accuracy by the number of training samples.
        failures: why a head, a policy or a fit with fewer samples failed, by its name and
            backbone.
        skipped: why images were left out, by id.
        seconds: of all of it, since the last time that it was taken up.
    """

    comparison: Comparison
    paths: list[Path]
    sizes: list[Curve]
    failures: dict[str, str]
    skipped: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON and pages."""
        return self.comparison.to_dict() | {
            "runs": [str(path) for path in self.paths],
            "sizes": [curve.to_dict() for curve in self.sizes],
            "failures": self.failures,
            "skipped": self.skipped,
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

    All share the splits and the seed. Runs are saved as they are done; the same contest on the same
    data goes on where it was stopped.

    Args:
        source: labelled images.
        contest: what stands against what.
        cache_dir: where stores are kept.
        out: folder for the runs' folders.
        command: the command line, for the record.
        on_note: is told what happens.
        watcher: of the trainings; when to stop it learns from ``should_stop``.
        on_plan: see :func:`pipeline.extract.extractor.extract_all`.
        on_progress: likewise.
        should_stop: whether the user asked to stop; asked between and within the parts.

    Raises:
        StoppedError: the user asked to stop.
        TlpipeError: see ``extract`` and :meth:`Contest.check`; or fewer than two runs came about. A
            head or a training that fails is noted, and the others go on.
    """
    started = time.perf_counter()
    contest.check(source)
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
        raise StoppedError("Stopped while images were embedded; those that were are kept.")
    stores = {name: report.store for name, report in zip(contest.backbones, reports, strict=True)}
    data = {
        name: plan(store, label=contest.label, groups=contest.groups, seed=contest.seed)
        for name, store in stores.items()
    }
    n_curves = sum(bool(contest.few(one, contest.training.epochs)) for one in data.values())
    stage = _Stage(
        source,
        contest,
        cache_dir,
        out,
        command,
        on_note,
        replace(watcher or Watcher(), should_stop=should_stop),
        _Record(out, contest, stores, data),
        data,
        contest.training_seconds(n_curves),
    )
    for report in reports:
        stage.skipped |= report.failures
    for name, store in stores.items() if contest.heads else ():
        stage.take("frozen", name, partial(stage.frozen, store, name))
        if contest.sizes:
            stage.frozen_with_fewer(name)
    for name in contest.backbones:
        for policy in contest.policies:
            stage.take(policy, name, partial(stage.fine_tuned, name, policy))
    for name in contest.backbones:
        stage.tuned_with_fewer(name)
    return stage.outcome(time.perf_counter() - started)


@dataclass
class _Stage:
    """A contest under way.

    Attributes:
        record: what is done.
        data: who trains and who scores, by backbone.
        seconds: a training's part of the budget; None for as long as it takes.
        parts: what is done, in order, by what it is.
        failures, skipped: see :class:`Outcome`.
    """

    source: DataSource
    contest: Contest
    cache_dir: Path
    out: Path
    command: str
    note: Callable[[str], None]
    watcher: Watcher
    record: _Record
    data: dict[str, Prepared]
    seconds: float | None
    parts: dict[str, _Part] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def take(self, what: str, name: str, do: Callable[[], _Part]) -> None:
        """Do one part of the contest, or take it from the record.

        Raises:
            StoppedError: the user asked to stop.
        """
        key = _key(what, name)
        if part := self.record.part(key):
            self.note(f"Taken up: {key} is done.")
            self.parts[key] = part
            return
        n_failed = len(self.failures)
        try:
            self.check_stop()
            self.parts[key] = do()
        except (StoppedError, _AskedToStopError) as stop:
            # What a part says of itself, that nothing of it was kept, is not true of the rest.
            raise StoppedError(f"Stopped at {key}; the parts that were done are kept.") from stop
        except TlpipeError as error:
            self.failures[key] = str(error)
        for failed, why in list(self.failures.items())[n_failed:]:
            self.note(f"{failed} failed: {why.splitlines()[0]}")
        if len(self.failures) == n_failed:
            self.record.add(key, self.parts[key])

    def check_stop(self) -> None:
        """Raise where the user asked to stop."""
        if self.watcher.should_stop():
            raise _AskedToStopError

    def frozen(self, store: Path, name: str) -> _Part:
        """Every head on the features of one backbone, each a run of its own."""
        contest = self.contest

        def told(run: Any) -> None:
            self.note(f"{name}, {run.head}: {run.metrics.get('top1', 'not scored')}")

        found = sweep(
            store,
            Plan(contest.heads, grid=contest.grid, seed=contest.seed),
            label=contest.label,
            groups=contest.groups,
            out=self.out,
            resume=True,
            on_note=self.note,
            on_trial=lambda _: self.check_stop(),
            on_head=told,
        )
        self.failures |= {f"{head} ({name})": why for head, why in found.failures.items()}
        runs = [result.run.save(self.out, command=self.command) for result in found.results]
        return _Part(runs, best=found.recommended()[0].run.best)

    def frozen_with_fewer(self, name: str) -> None:
        """The best head with fewer samples, where there is a test split to score it on."""
        found, data = self.parts.get(_key("frozen", name)), self.data[name]
        if found is None or found.best is None or not len(data.protocol.test):
            return
        best = found.best
        curve = f"{best.candidate.head} ({name})"

        def fit() -> _Part:
            return _Part(curves=[frozen_curve(data, best, curve, self.check_stop)])

        self.take("frozen, with fewer samples", name, fit)

    def fine_tuned(self, name: str, policy: str) -> _Part:
        """One policy on one backbone."""
        contest = self.contest
        settings = replace(
            contest.training,
            policy=policy.removesuffix(_FRESH),
            seed=contest.seed,
            budget_seconds=self.seconds,
        )
        self.note(f"Fine-tuning {name}, {policy}")
        init_head = NONE if policy.endswith(_FRESH) else AUTO
        run = self.train(self.source, name, settings, self.watcher, init_head)
        self.skipped |= run.failures
        if run.head == FRESH and f"{policy}{_FRESH}" in contest.policies:
            self.note(
                f"No run of a head suits {name}, so {policy} started from a fresh head and is the "
                f"same training as {policy}{_FRESH}."
            )
        return _Part([run.save(command=self.command)])

    def train(
        self,
        source: DataSource,
        name: str,
        settings: Settings,
        watcher: Watcher,
        init_head: str = AUTO,
    ) -> FinetuneRun:
        """Train a backbone."""
        return finetune(
            source,
            self.contest.backbone(name),
            settings,
            label=self.contest.label,
            groups=self.contest.groups,
            init_head=init_head,
            out=self.out,
            cache_dir=self.cache_dir,
            # Where nothing was left unfinished, there is nothing to say about taking it up.
            resume=any(self.out.glob(f"{TRAINING_PREFIX}*")),
            watcher=watcher,
        )

    def tuned_with_fewer(self, name: str) -> None:
        """Training everything on fewer samples, with the learning rate of all samples.

        All of these samples train, and the last state is kept: so few have none to spare that
        would choose an epoch well.
        """
        contest, data, found = self.contest, self.data[name], self.parts.get(_key(_OF_CURVE, name))
        if found is None or not len(data.protocol.test):
            return
        run = read_run(found.runs[0])
        n_done = max(1, run["curve"][-1]["epoch"])  # fewer, where the time or the patience was up
        whole = point_of_all(data, run["n_fit"], run["metrics"]["test"]["top1"]["value"])
        planned = [few for few in contest.few(data, n_done) if few.n_per_class < whole.n_per_class]
        timed = self.seconds is not None
        settings = replace(
            contest.training, policy=_OF_CURVE, seed=contest.seed, lr=run["lr"], hold_out=False,
            epochs=contest.training.epochs if timed else n_done,
        )  # fmt: skip
        epochs = counted(settings.epochs, "epoch")
        if timed:
            epochs = f"at most {epochs} or a share of the budget"
        curve = Curve(
            f"fine-tuning, {_OF_CURVE} ({name})",
            f"each of {epochs} at learning rate {settings.lr:g}, that of all samples, the last "
            "state kept; the last point is the run of the table, whose epoch other samples chose",
        )
        keys = []
        for few in planned:
            seconds = None if self.seconds is None else self.seconds * few.share
            mine = replace(settings, batch_size=few.batch_size, budget_seconds=seconds)
            what = f"{_OF_CURVE} with {few.n_per_class} a class, draw {few.draw + 1}"
            self.take(what, name, partial(self.tuned_few, name, few, data, mine, curve))
            keys.append(_key(what, name))
        if any(key in self.parts for key in keys):
            self.parts[curve.name] = _Part(curves=[replace(curve, points=(whole,))])

    def tuned_few(
        self, name: str, few: Few, data: Prepared, settings: Settings, curve: Curve
    ) -> _Part:
        """One training with fewer samples; its accuracy is all that is kept.

        Raises:
            TlpipeError: its head could not be fitted on these samples alone.
        """
        quiet = replace(self.watcher, note=lambda _: None, on_epoch=lambda _: None)
        run = self.train(few.source(self.source, data), name, settings, quiet)
        run.checkpoint.remove()
        if run.head != FRESH and not run.head_refitted:
            raise TlpipeError(
                f"The head of {run.head} knows more samples than these, and could not be fitted "
                "again on them."
            )
        top1 = run.scores["test"]["top1"].value
        self.note(f"{name}, {_OF_CURVE} with {counted(len(few.ids), 'sample')}: {top1:.3f}")
        point = SizePoint(few.n_per_class, len(few.ids), (top1,))
        # The run's own count, as it knows what was trained before it was taken up.
        seconds = run.seconds["total"]
        return _Part(curves=[replace(curve, points=(point,), n_fits=1, seconds=seconds)])

    def outcome(self, seconds: float) -> Outcome:
        """Compare the runs that there are.

        Raises:
            TlpipeError: fewer than two.
        """
        paths = [path for part in self.parts.values() for path in part.runs]
        if len(paths) < 2:
            n_all = len(self.contest.heads) + len(self.contest.policies)
            lines = [f"  {name}: {why.splitlines()[0]}" for name, why in self.failures.items()]
            lines += [f"  It is kept in {path}" for path in paths]
            raise TlpipeError(
                f"Only {len(paths)} of the {n_all * len(self.contest.backbones)} runs came about, "
                "and a comparison needs two.\n" + "\n".join(lines)
            )
        comparison = compare_runs(paths)
        sizes = joined(curve for part in self.parts.values() for curve in part.curves)
        if not self.failures:
            self.record.drop()
        return Outcome(comparison, paths, sizes, self.failures, self.skipped, seconds)


class _AskedToStopError(KeyboardInterrupt):
    """Ends a sweep too, which takes every ordinary error for a head that failed."""


@dataclass(frozen=True)
class _Part:
    """What came of one part of a contest.

    Attributes:
        runs: their folders.
        best: what the best head was fitted with.
        curves: parts of accuracy by the number of samples.
    """

    runs: list[Path] = field(default_factory=list)
    best: Trial | None = None
    curves: list[Curve] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "runs": [str(run) for run in self.runs],
            "best": self.best and self.best.to_dict(),
            "curves": [curve.to_dict() for curve in self.curves],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> _Part:
        """What :meth:`to_dict` gave."""
        return cls(
            [Path(run) for run in document["runs"]],
            document["best"] and Trial.from_dict(document["best"]),
            [Curve.from_dict(curve) for curve in document["curves"]],
        )


def _key(what: str, name: str) -> str:
    return f"{what} ({name})"


class _Record:
    """What of a contest is done, in a file that lasts until all of it is.

    Args:
        out: folder of the runs.
        contest: the contest.
        stores: of its features, by backbone; another contest or other data has another file.
        data: who trains and who scores, by backbone.
    """

    def __init__(
        self, out: Path, contest: Contest, stores: Mapping[str, Path], data: Mapping[str, Prepared]
    ) -> None:
        keys = [one.key() for one in data.values()]
        facts = json.dumps([asdict(contest), [str(s) for s in stores.values()], keys])
        self._path = (
            out / f"{COMPARISON_PREFIX}{hashlib.sha256(facts.encode()).hexdigest()[:12]}.json"
        )
        self._parts: dict[str, Any] = {}
        if self._path.is_file():
            self._parts = read_json(self._path, _FORMAT)["parts"]

    def part(self, key: str) -> _Part | None:
        """What was done, if all of its runs are still there and this release understands it."""
        try:
            part = _Part.from_dict(self._parts[key])
        except (KeyError, TypeError, ValueError):
            return None
        return part if all(Path(run, RUN_FILE).is_file() for run in part.runs) else None

    def add(self, key: str, part: _Part) -> None:
        """Write down what was done.

        Raises:
            ResourceError: the disk is full.
            StoreError: the folder cannot be written to.
        """
        self._parts[key] = part.to_dict()
        document = {"format": _FORMAT, "format_version": RUN_FORMAT_VERSION, "parts": self._parts}
        with replacing(self._path) as temporary:
            write_json(temporary, document)

    def drop(self) -> None:
        """Forget it."""
        self._path.unlink(missing_ok=True)
