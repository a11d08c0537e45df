"""A fitted head and everything that was found out about it."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pipeline
from pipeline.heads import HEADS
from pipeline.heads.features import HeadInputs, InputBlock
from pipeline.heads.knn import KNNHead
from pipeline.heads.metrics import Score, confusion_matrix, evaluate
from pipeline.heads.model import HeadModel
from pipeline.runs.bundle import save_bundle
from pipeline.runs.folder import (
    RUN_FILE,
    RUN_FORMAT,
    RUN_FORMAT_VERSION,
    create_run,
    safe_name,
    write_json,
)
from pipeline.runs.predictions import PREDICTIONS_FILE, Predictions
from pipeline.sweep.grids import edge_note
from pipeline.sweep.prepare import Prepared
from pipeline.sweep.search import Search, Selection, take_layers
from pipeline.sweep.selection import RefitError, refit
from pipeline.sweep.trials import Trial, described

_MAX_CLASSES_WITH_CONFUSION = 200


@dataclass(frozen=True)
class FittedRun:
    """What is known of every fitted head, whether it learned one label column or several.

    Attributes:
        head: its name in ``pipeline.heads.HEADS``.
        model: from features to class probabilities; fitted on train, and on val where given.
        inputs: the features that it takes.
        label: the label column; names of several joined by " + ".
        seed: of every random choice.
        best: the chosen setting, and its score on the samples that chose it.
        metric: that chose it.
        trials: every setting that was tried.
        chosen_by: which samples chose, in words.
        scored_on: "test"; "val" where there is no test split, which flatters: the same samples
            chose the setting; "" where nothing could be scored.
        scores: metrics of "test" and "val", as far as there are; "val" are the samples that
            chose, scored by heads that were not fitted on them.
        n_samples: samples by split.
        split_origin: how the splits came about.
        seconds: by phase, and "total"; "predict" is for a thousand samples.
        data_digest: sha256 over the sorted (id, digest, label) of all samples.
        notes: what a user should know before believing the scores.
    """

    head: str
    model: HeadModel
    inputs: tuple[InputBlock, ...]
    label: str
    seed: int
    best: Trial
    metric: str
    trials: list[Trial]
    chosen_by: str
    scored_on: str
    scores: dict[str, dict[str, Score]]
    n_samples: dict[str, int]
    split_origin: str
    seconds: dict[str, float]
    data_digest: str
    notes: list[str]

    @property
    def metrics(self) -> dict[str, Score]:
        """Scores on ``scored_on``; empty where nothing could be scored."""
        return self.scores.get(self.scored_on, {})

    @property
    def converged(self) -> bool:
        """Whether the solver of the final fit met its tolerance."""
        return bool(self.model.head.converged_)

    def to_dict(self) -> dict[str, Any]:
        """What ``run.json`` holds, as plain values for JSON."""
        return {
            "format": RUN_FORMAT,
            "format_version": RUN_FORMAT_VERSION,
            "kind": "fit-head",
            "head": self.head,
            "setting": self.best.setting,
            "metric": self.metric,
            "scaling": self.model.scaler.kind,
            "temperature": self.model.temperature,
            "label": self.label,
            "seed": self.seed,
            "stores": [block.store for block in self.inputs],
            "layers": [list(block.layers) for block in self.inputs],
            **self.found(),
            "n_samples": self.n_samples,
            "split_origin": self.split_origin,
            "chosen_by": self.chosen_by,
            "scored_on": self.scored_on,
            "metrics": self.metrics_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "converged": self.converged,
            "n_trained": self.model.head.n_trained(),
            "seconds": self.seconds,
            "notes": self.notes,
            "data_digest": self.data_digest,
            "versions": versions(),
        }

    def found(self) -> dict[str, Any]:
        """What ``run.json`` says of the classes."""
        raise NotImplementedError

    def write_predictions(self, folder: Path) -> None:
        """Write what was predicted for each scored sample."""
        raise NotImplementedError

    @property
    def size_bytes(self) -> int:
        """Of everything that the model learned."""
        return sum(array.nbytes for array in self.model.to_arrays().values())

    def metrics_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Scores by split and metric, for JSON."""
        return {
            split: {name: score.to_dict() for name, score in scores.items()}
            for split, scores in self.scores.items()
        }

    def save(self, out: Path | None = None, *, command: str = "") -> Path:
        """Write the run to a new numbered folder and return its path.

        Args:
            out: folder for the run's folder; ``runs/<data source>`` by default.
            command: the command line that made it, for the record.

        Raises:
            ResourceError: the disk is full.
            StoreError: the folder cannot be written to.
        """
        return create_run(
            out or default_folder(self.inputs),
            f"{self.head}-{backbone_names(self.inputs)}",
            lambda folder: self.write(folder, self.to_dict() | {"command": command}),
        )

    def write(self, folder: Path, document: dict[str, Any]) -> None:
        """Put the model, its predictions and ``document`` as run.json into ``folder``."""
        write_json(folder / RUN_FILE, document)
        self.write_predictions(folder)
        about = {
            "label": self.label,
            "scored_on": self.scored_on,
            "metrics": self.metrics_dict(),
            "data_digest": self.data_digest,
        }
        save_bundle(folder, self.model, head=self.head, inputs=self.inputs, about=about)


@dataclass(frozen=True)
class HeadRun(FittedRun):
    """A head that learned one label column, and everything that was found out about it.

    Attributes:
        confusion: (n_classes, n_classes) of ``scored_on``, true class by row.
        score_classes: the classes of ``confusion``: the model's, then those only test has.
        predictions: of the samples of ``scored_on``.
        chosen_right: (n_choose,), whether the best setting was right on the samples that chose.
    """

    confusion: NDArray[np.int64]
    score_classes: tuple[str, ...]
    predictions: Predictions
    chosen_right: NDArray[np.bool_]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the model can predict."""
        return self.model.classes

    def found(self) -> dict[str, Any]:
        """Classes, and the confusion matrix where it is small enough to read."""
        found: dict[str, Any] = {"classes": list(self.classes)}
        if len(self.score_classes) <= _MAX_CLASSES_WITH_CONFUSION:
            found["confusion"] = {
                "classes": list(self.score_classes),
                "counts": self.confusion.tolist(),
            }
        return found

    def write_predictions(self, folder: Path) -> None:
        """Write ``predictions.csv``."""
        self.predictions.write(folder / PREDICTIONS_FILE)


def backbone_names(inputs: Sequence[InputBlock]) -> str:
    """Backbones of the features, for a folder's name."""
    names = [str(block.recipe.get("backbone", "features")) for block in inputs]
    return "+".join(name.removeprefix("torchvision:") for name in names)


def default_folder(inputs: Sequence[InputBlock]) -> Path:
    """Where runs on these features go."""
    return Path("runs") / safe_name(str(inputs[0].source.get("name", "data")))


def finish_run(
    search: Search, selection: Selection, *, metric: str, seconds: dict[str, float]
) -> HeadRun:
    """Fit what was chosen on train and val, and score test once.

    Where it cannot be fitted on all of them, the next best is taken, and a note says so.

    Args:
        search: with features and protocol.
        selection: what it chose.
        metric: that chose it.
        seconds: by phase so far.

    Raises:
        TlpipeError: no setting can be fitted on all samples.
    """
    data, clock = search.data, Clock(seconds)
    while True:
        search.release()  # the fit on all samples needs the room
        candidate = selection.best.candidate
        inputs = take_layers(data.inputs, candidate.layers)
        try:
            model = refit(selection.best, inputs, data.codes, data.protocol, data.known)
            break
        except RefitError as error:
            selection = search.without_best(selection, str(error))
    clock.lap("fit")
    scored = _score(model, inputs, data, selection)
    clock.lap("score")
    if len(data.protocol.test):
        clock.laps["predict"] = 1000 * scored.seconds / len(data.protocol.test)
    return HeadRun(
        head=candidate.head,
        model=model,
        inputs=inputs.blocks,
        label=inputs.label_column,
        seed=data.seed,
        best=selection.best,
        metric=metric,
        trials=selection.trials,
        chosen_by=data.protocol.chosen_by,
        scored_on=scored.split,
        scores=scored.scores,
        confusion=scored.confusion,
        score_classes=(*data.known, *data.unseen),
        predictions=scored.predictions,
        chosen_right=selection.probabilities.argmax(axis=1) == data.codes[selection.rows],
        n_samples=data.n_samples(),
        split_origin=data.split_origin,
        seconds=clock.seconds(),
        data_digest=inputs.digest(),
        notes=[*view_notes(candidate.head, inputs), *fit_notes(model, selection, data)],
    )


class Clock:
    """Seconds by phase."""

    def __init__(self, laps: dict[str, float] | None = None) -> None:
        self.laps = dict(laps or {})
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The phase that ends now."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """What was measured, and its total."""
        total = sum(value for name, value in self.laps.items() if name != "predict")
        return {name: round(value, 4) for name, value in (self.laps | {"total": total}).items()}


@dataclass(frozen=True)
class _Scored:
    split: str
    scores: dict[str, dict[str, Score]]
    confusion: NDArray[np.int64]
    predictions: Predictions
    seconds: float


def _score(model: HeadModel, inputs: HeadInputs, data: Prepared, selection: Selection) -> _Scored:
    """Score the test split, and the samples that chose with the heads that had not seen them."""
    n_classes = len(data.known) + len(data.unseen)
    test, codes = data.protocol.test, data.codes
    parts = {"test": (test, np.zeros((0, len(model.classes))))}
    started = time.perf_counter()
    if len(test):
        parts["test"] = test, model.predict_proba(inputs.X[test])
    seconds = time.perf_counter() - started
    parts["val"] = selection.rows, selection.probabilities
    parts = {split: part for split, part in parts.items() if len(part[0])}
    scores = {
        split: evaluate(codes[rows], _padded(probabilities, n_classes), seed=data.seed)
        for split, (rows, probabilities) in parts.items()
    }
    split = next(iter(parts), "")
    rows, probabilities = parts.get(split, (test, np.zeros((0, len(model.classes)))))
    predicted = probabilities.argmax(axis=1)
    return _Scored(
        split,
        scores,
        confusion_matrix(codes[rows], predicted, n_classes),
        Predictions(
            ids=inputs.ids[rows],
            splits=inputs.splits[rows],
            labels=inputs.labels[rows],
            predicted=np.array(model.classes, dtype=object)[predicted],
            probability=probabilities[np.arange(len(rows)), predicted],
        ),
        seconds,
    )


def _padded(probabilities: NDArray[np.float64], n_classes: int) -> NDArray[np.float64]:
    """Zero probability for classes that the model does not know."""
    return np.pad(probabilities, ((0, 0), (0, n_classes - probabilities.shape[1])))


def view_notes(head: str, inputs: HeadInputs, *, plain_only: bool = False) -> list[str]:
    """Which stored views a head has learned from, where there are several.

    Args:
        head: its name.
        inputs: its features.
        plain_only: it was fitted in a way that reads no other views.
    """
    numbers = [store.n_views for store in inputs.features.stores]
    n_views = max(numbers)
    if not HEADS[head].views or n_views == 1:
        return []
    if min(numbers) < n_views:
        found = " and ".join(map(str, numbers))
        return [f"Learned from the plain view alone: the stores hold {found} views a sample."]
    if plain_only:
        why = "fits from disk and of several labels use no other"
        return [f"Learned from the plain view alone of {n_views} that are stored: {why}."]
    return [f"Learned from all {n_views} stored views of each sample, scored on the plain one."]


def fit_notes(model: HeadModel, selection: Selection, data: Prepared) -> list[str]:
    """What a user should know of the fit before believing its score."""
    best, protocol, trials = selection.best, data.protocol, selection.trials
    chosen = described(best.candidate, trials)
    notes = []
    if not len(protocol.test):
        notes.append(
            "Warning: there is no test split. The scores are of the samples that chose the "
            "setting, and so too good."
            if len(selection.rows)
            else "Warning: there is no test split and no sample to spare: nothing was scored."
        )
    if protocol.kind == "none":
        calibrated = HEADS[best.candidate.head].calibrated
        notes.append(
            f"No sample could be held out to choose a setting: {chosen} "
            "was taken unseen" + (", without a temperature." if calibrated else ".")
        )
    failed = [trial for trial in trials if trial.failure]
    notes += [f"Failed: {described(trial.candidate, trials)}: {trial.failure}" for trial in failed]
    alike = [
        trial.setting
        for trial in trials
        if (trial.candidate.layers, trial.candidate.scaling)
        == (best.candidate.layers, best.candidate.scaling)
    ]
    edge = edge_note(best.setting, alike) if protocol.folds and selection.has_edges else None
    notes += [edge] if edge else []
    if not model.head.converged_:
        notes.append(
            f"The solver did not converge with {chosen}: the head is "
            "usable, but another fit of it may score differently."
        )
    if isinstance(model.head, KNNHead) and model.head.k_ < model.head.k:
        notes.append(f"k was cut to {model.head.k_}: there are no more training samples.")
    if selection.stopped_early:
        notes.append(f"The time was up after {len(trials)} settings: there were more to try.")
    return notes


def versions() -> dict[str, str]:
    """Of this package and of what decides its numbers."""
    packages = ("numpy", "scipy", "scikit-learn", "torch")
    return {
        "tlpipe": pipeline.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
