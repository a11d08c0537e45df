"""Runs on the same data against each other: what each reaches, what it costs, what is chance."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, MismatchError, StoreError, UsageError
from pipeline.heads.metrics import Score
from pipeline.heads.paired import accuracy_difference, mcnemar
from pipeline.runs.folder import read_run
from pipeline.runs.predictions import COLUMNS, PREDICTIONS_FILE
from pipeline.runs.tasks import task_file
from pipeline.store import open_store

SIGNIFICANT = 0.05
_FROZEN = ("head",)


@dataclass(frozen=True)
class Contender:
    """One run, or one of its label columns where it learned several.

    Attributes:
        path: its folder.
        run: what its ``run.json`` holds; of several label columns, with what is said of this one.
        right: whether the prediction of each scored sample was right, by sample id.
        extract_seconds: of the features that it, or the head that it started from, was fitted on;
            None where that is not known, 0 where it needs none.
        with_label: its name tells the label column.
        with_split: its name tells where it was scored.
        with_start: its name tells the head that a training started from.
    """

    path: str
    run: dict[str, Any]
    right: dict[str, bool]
    extract_seconds: float | None
    with_label: bool = False
    with_split: bool = False
    with_start: bool = False

    @property
    def is_tuned(self) -> bool:
        """Whether a part of the backbone was trained."""
        return self.run["kind"] == "finetune" and self.run["policy"] not in _FROZEN

    @property
    def name(self) -> str:
        """Head or policy, backbone; what else tells it from the others."""
        column = f", {self.label}" if self.with_label else ""
        column += f", on {self.run['scored_on']}" if self.with_split else ""
        if self.run["kind"] == "finetune":
            start = f" from {self.start}" if self.with_start else ""
            return f"fine-tuning, {self.run['policy']}{start} ({self.backbone}){column}"
        layers = [name for names in self.run.get("layers", ()) for name in names]
        shown = "+".join(layers) if len(layers) <= 2 else f"{len(layers)} layers"
        return f"{self.run['head']} ({self.backbone}, {shown}){column}"

    @property
    def start(self) -> str:
        """The head that a training started from; "" for a head."""
        if self.run["kind"] != "finetune":
            return ""
        start = str(self.run.get("head_start", "fresh"))
        return "a fresh head" if start == "fresh" else Path(start).name

    @property
    def label(self) -> str:
        """The label column."""
        return str(self.run["label"])

    @property
    def backbone(self) -> str:
        """Names of the backbones."""
        if self.run["kind"] == "finetune":
            return str(self.run["backbone"]["name"]).removeprefix("torchvision:")
        return "+".join(Path(store).name.rpartition("-")[0] for store in self.run.get("stores", ()))

    @property
    def top1(self) -> Score:
        """On the samples that were scored."""
        return Score(**self.run["metrics"][self.run["scored_on"]]["top1"])

    @property
    def val_top1(self) -> float | None:
        """On the samples that chose."""
        scores = self.run["metrics"].get("val")
        return None if scores is None else float(scores["top1"]["value"])

    @property
    def fit_seconds(self) -> float:
        """Choosing, training and scoring, and the fit of the head that a training started from."""
        return self._own_seconds + float(self.run.get("head_seconds", 0.0))

    @property
    def _own_seconds(self) -> float:
        """Without embedding, which the run's stores tell of whoever did it."""
        seconds = self.run["seconds"]
        return float(seconds["total"]) - float(seconds.get("embed", 0.0))

    @property
    def total_seconds(self) -> float | None:
        """With the features."""
        return None if self.extract_seconds is None else self.extract_seconds + self.fit_seconds

    @property
    def device_seconds(self) -> float | None:
        """Seconds of all GPUs together; None where none took part."""
        if self.run.get("device", "cpu") == "cpu":
            return None
        return self._own_seconds * int(self.run.get("n_processes", 1))

    @property
    def n_tried(self) -> int:
        """Settings that a sweep tried, or learning rates that a training did; 1 for none."""
        if self.run["kind"] == "finetune":
            return len({trial["lr"] for trial in self.run.get("lr_trials", ())}) or 1
        heads = self.run.get("heads")
        if heads is not None:
            return sum(int(line["n_trials"]) for line in heads)
        return len(self.run.get("trials", ())) or 1

    @property
    def search_seconds(self) -> float:
        """What trying them took."""
        seconds = self.run["seconds"]
        return float(
            sum(seconds.get(name, 0.0) for name in ("layers", "sweep", "select", "search"))
        )

    def metric(self, name: str) -> float | None:
        """A metric of the scored samples."""
        score = self.run["metrics"][self.run["scored_on"]].get(name)
        return None if score is None else float(score["value"])

    def to_dict(self) -> dict[str, Any]:
        """A line of the table, for JSON."""
        run = self.run
        return {
            "path": self.path,
            "name": self.name,
            "kind": run["kind"],
            "is_tuned": self.is_tuned,
            "label": self.label,
            "scored_on": run["scored_on"],
            "n_samples": run["n_samples"],
            "top1": self.top1.to_dict(),
            "val_top1": self.val_top1,
            **{name: self.metric(name) for name in ("macro_f1", "nll", "ece")},
            "n_trained": run.get("n_trained"),
            "extract_seconds": self.extract_seconds,
            "fit_seconds": self.fit_seconds,
            "n_tried": self.n_tried,
            "search_seconds": self.search_seconds,
            "budget_seconds": run.get("settings", {}).get("budget_seconds"),
            "total_seconds": self.total_seconds,
            "device": run.get("device", "cpu"),
            "device_seconds": self.device_seconds,
            "curve": run.get("curve", []),
        }


def read_contenders(path: Path) -> list[Contender]:
    """Read a run: one contender for each label column that was scored.

    Raises:
        UsageError: it is a comparison.
        StoreError: it is no run, or was not scored.
    """
    run = read_run(path)
    if run.get("kind") == "compare":
        compared = dict.fromkeys(str(line["path"]) for line in run["lines"])
        raise UsageError(
            f"{path} is a comparison itself, expected a run that it compares.\n"
            f"  Name its runs:  tlpipe compare {shlex.join(compared)}"
        )
    parts = {PREDICTIONS_FILE: run}
    if "tasks" in run:
        parts = {task_file(task["label"]): run | task for task in run["tasks"]}
    scored = {name: part for name, part in parts.items() if part.get("scored_on")}
    if not scored:
        raise StoreError(f"{path} was not scored: there was no test and no validation sample.")
    seconds = _extract_seconds(run)
    return [
        Contender(str(path), part, _read_right(path / name), seconds, "tasks" in run)
        for name, part in scored.items()
    ]


def _read_right(file: Path) -> dict[str, bool]:
    """Whether each scored sample's prediction was right, by its id."""
    right: dict[str, bool] = {}
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = csv.DictReader(stream)
            if tuple(rows.fieldnames or ()) != COLUMNS:
                raise CorruptStoreError(f"{file} has columns {rows.fieldnames}, not {COLUMNS}.")
            for row in rows:
                right[row["id"]] = row["label"] == row["predicted"]
    except OSError as error:
        raise StoreError(f"{file} cannot be read ({error.strerror}).") from error
    return right


def _extract_seconds(run: Mapping[str, Any]) -> float | None:
    """What embedding all samples of the run's stores took, as their stores say."""
    total = 0.0
    for path in run.get("stores", ()):
        try:
            store = open_store(path)
        except StoreError:
            return None
        cost = store.manifest.provenance.get("cost")
        numbers = cost.values() if isinstance(cost, dict) else ()
        if len(numbers) != 2 or not all(isinstance(n, int | float) and n > 0 for n in numbers):
            return None
        assert isinstance(cost, dict)
        # A run that was killed embedded rows that it did not live to count.
        total += cost["seconds"] * max(1.0, len(store) / cost["n_embedded"])
    return total


@dataclass(frozen=True)
class Comparison:
    """Runs that were scored on the same samples.

    Attributes:
        contenders: by label column, where there are several; of each the most accurate first.
        notes: what a user should know before believing the table.
    """

    contenders: list[Contender]
    notes: list[str]

    def lines(self) -> list[dict[str, Any]]:
        """The table; each line with its difference to the one above, if of the same label."""
        found = []
        for i, contender in enumerate(self.contenders):
            line = contender.to_dict()
            above = self.contenders[i - 1] if i else None
            if above is not None and above.label == contender.label:
                line |= _paired(contender, above)
            found.append(line)
        return found

    def verdict(self) -> str:
        """Was it worth unfreezing? In words, from the numbers; for each label column."""
        groups = _by_label(self.contenders)
        if len(groups) == 1:
            return _verdict(self.contenders)
        return " ".join(f"{label}: {_verdict(group)}" for label, group in groups.items())

    def to_dict(self) -> dict[str, Any]:
        """For JSON and pages."""
        first = self.contenders[0].run
        splits = dict.fromkeys(contender.run["scored_on"] for contender in self.contenders)
        return {
            "kind": "compare",
            "lines": self.lines(),
            "verdict": self.verdict(),
            "notes": self.notes,
            "scored_on": " and ".join(splits),
            "n_samples": first["n_samples"],
            "split_origin": first["split_origin"],
            "confusions": self._confusions(),
        }

    def _confusions(self) -> list[dict[str, Any]]:
        """Of the best on validation of each label column, where its run has them."""
        best = [_best(group) for group in _by_label(self.contenders).values()]
        return [
            {"name": one.name, "scored_on": one.run["scored_on"], **one.run["confusion"]}
            for one in best
            if one is not None and "confusion" in one.run
        ]


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Read runs and put them side by side.

    Args:
        paths: two or more run folders.

    Raises:
        UsageError: fewer than two runs.
        MismatchError: they were not scored on the same samples of the same labels; one that
            learned several must share one of them with another.
        StoreError: one of them is no run.
    """
    paths = list({path.resolve(): path for path in paths}.values())
    if len(paths) < 2:
        raise UsageError(
            "A comparison needs two runs or more.\n  List the runs there are:  tlpipe ls"
        )
    runs = [read_contenders(path) for path in paths]
    _check_labels(runs)
    groups = _by_label([contender for run in runs for contender in run])
    for group in groups.values():
        _check_samples(group)
        group.sort(key=lambda contender: -contender.top1.value)
    n_splits = len({group[0].run["scored_on"] for group in groups.values()})
    contenders = [
        replace(
            contender,
            with_label=contender.with_label or len(groups) > 1,
            with_split=n_splits > 1,
        )
        for group in groups.values()
        for contender in group
    ]
    starts: dict[str, set[str]] = {}
    for contender in contenders:
        starts.setdefault(contender.name, set()).add(contender.start)
    contenders = [replace(c, with_start=len(starts[c.name]) > 1) for c in contenders]
    return Comparison(contenders, _notes(contenders))


def _check_labels(runs: Sequence[Sequence[Contender]]) -> None:
    """Refuse a run of labels that no other run has learned."""
    for run in runs:
        own = [contender.label for contender in run]
        others = [c for other in runs if other is not run for c in other]
        if not any(contender.label in own for contender in others):
            raise MismatchError(
                f"{run[0].path} learned the label {' + '.join(own)!r}, but {others[0].path} "
                f"learned {others[0].label!r}: their scores cannot stand in one table."
            )


def _by_label(contenders: Sequence[Contender]) -> dict[str, list[Contender]]:
    groups: dict[str, list[Contender]] = {}
    for contender in contenders:
        groups.setdefault(contender.label, []).append(contender)
    return groups


def _check_samples(contenders: Sequence[Contender]) -> None:
    """Refuse runs that were scored on other samples than the first of them."""
    first = contenders[0]
    for other in contenders[1:]:
        mine, its = first.run["scored_on"], other.run["scored_on"]
        if mine != its:
            raise MismatchError(
                f"{first.path} was scored on {mine!r}, but {other.path} on {its!r}: their scores "
                "cannot stand in one table."
            )
        if first.right.keys() != other.right.keys():
            shared = len(first.right.keys() & other.right.keys())
            raise MismatchError(
                f"{first.path} was scored on {len(first.right):,} samples and {other.path} on "
                f"{len(other.right):,}, of which they share {shared:,}: their scores cannot stand "
                "in one table.\n  Fit both on the same data, with the same splits and seed."
            )


def _notes(contenders: Sequence[Contender]) -> list[str]:
    notes = []
    if any(contender.run["scored_on"] != "test" for contender in contenders):
        notes.append(
            "Warning: there is no test split; the same samples chose and scored, which flatters."
        )
    digests = {(contender.label, contender.run.get("data_digest")) for contender in contenders}
    if len(digests) > len(_by_label(contenders)):
        notes.append("Warning: the runs were not fitted on the same training samples or labels.")
    if len({c.run["chosen_by"] for c in contenders}) > 1:
        notes.append("The runs did not choose their settings on the same samples.")
    if any(c.extract_seconds is None for c in contenders):
        notes.append("Where the extraction shows –, the store is gone or from an older release.")
    return notes


def _verdict(contenders: Sequence[Contender]) -> str:
    """Of contenders of one label column."""
    frozen = _best([c for c in contenders if not c.is_tuned])
    tuned = _best([c for c in contenders if c.is_tuned and c.run["policy"] != "scratch"])
    scratch = _best([c for c in contenders if c.run.get("policy") == "scratch"])
    sentences = []
    if frozen and tuned:
        sentences.append(_worth(frozen, tuned))
    elif frozen or tuned:
        best = frozen or tuned
        assert best is not None
        sentences.append(f"The best on validation is {best.name}: {best.top1}.")
    if scratch and (best := tuned or frozen):
        sentences.append(
            f"Training from scratch reaches {scratch.top1.value:.3f}" + _transfer(best, scratch)
        )
    return " ".join(sentences)


def _transfer(best: Contender, scratch: Contender) -> str:
    """What the pretrained weights are worth."""
    right = _aligned(best, scratch)
    gain = accuracy_difference(*right)
    if mcnemar(*right) >= SIGNIFICANT:
        return f" and cannot be told from {best.name}: here transfer is worth no more than chance."
    if gain.value > 0:
        return (
            f", {_points(gain)} points less than {best.name}: that is what transfer is worth here."
        )
    return (
        f", {_points(_negated(gain))} points more than {best.name}: the pretrained weights hurt "
        "here."
    )


def _best(contenders: Sequence[Contender]) -> Contender | None:
    """By validation: test has no say."""
    return max(
        contenders,
        key=lambda c: c.top1.value if c.val_top1 is None else c.val_top1,
        default=None,
    )


def _aligned(a: Contender, b: Contender) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    ids = sorted(a.right)
    return np.array([a.right[i] for i in ids]), np.array([b.right[i] for i in ids])


def _paired(contender: Contender, above: Contender) -> dict[str, Any]:
    right = _aligned(contender, above)
    return {"difference": accuracy_difference(*right).to_dict(), "p_value": mcnemar(*right)}


def _points(difference: Score) -> str:
    return f"{100 * difference.value:.1f} [{100 * difference.low:.1f}, {100 * difference.high:.1f}]"


def _worth(frozen: Contender, tuned: Contender) -> str:
    """The sentence that the project exists for."""
    right = _aligned(tuned, frozen)
    difference, p_value = accuracy_difference(*right), mcnemar(*right)
    if frozen.total_seconds and tuned.total_seconds is not None:
        time = f"for {tuned.total_seconds / frozen.total_seconds:.2g}× the time"
    else:
        time = f"in {tuned.fit_seconds:.0f} s"
    if p_value >= SIGNIFICANT:
        return (
            f"{tuned.name[0].upper()}{tuned.name[1:]} cannot be told from the best frozen head, "
            f"{frozen.name}: {_points(difference)} points (p = {p_value:.2g}), {time}."
        )
    gains = "gains" if difference.value > 0 else "loses"
    shown = difference if difference.value > 0 else _negated(difference)
    return (
        f"{tuned.name[0].upper()}{tuned.name[1:]} {gains} {_points(shown)} points of accuracy "
        f"against the best frozen head, {frozen.name}, {time} (p = {p_value:.2g})."
    )


def _negated(score: Score) -> Score:
    return Score(-score.value, -score.high, -score.low)
