"""Fit one kind of head on stored features: choose its setting, fit it, score it once."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import pipeline
from pipeline.data.names import counted, quoted
from pipeline.errors import UnknownNameError
from pipeline.heads import HEADS, head_class
from pipeline.heads.features import HeadInputs, InputBlock, load_inputs
from pipeline.heads.knn import KNNHead
from pipeline.heads.metrics import Score, confusion_matrix, evaluate
from pipeline.heads.model import HeadModel
from pipeline.heads.scaling import SCALINGS
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
from pipeline.store import open_store
from pipeline.sweep.grids import GRIDS, Setting, describe_setting, edge_note
from pipeline.sweep.protocol import Protocol, plan_protocol
from pipeline.sweep.selection import Selection, Trial, refit, select_setting

if TYPE_CHECKING:
    from pipeline.store import Store

Array = NDArray[Any]

_MAX_CLASSES_WITH_CONFUSION = 200


@dataclass(frozen=True)
class HeadRun:
    """A fitted head and everything that was found out about it.

    Attributes:
        head: its name in ``pipeline.heads.HEADS``.
        model: from features to class probabilities; fitted on train, and on val where given.
        inputs: the features that it takes.
        label: the label column.
        seed: of every random choice.
        best: the chosen setting, and its score on the samples that chose it.
        trials: every setting that was tried.
        chosen_by: which samples chose, in words.
        scored_on: "test"; "val" where there is no test split, which flatters: the same samples
            chose the setting; "" where nothing could be scored.
        scores: metrics of "test" and "val", as far as there are; "val" are the samples that
            chose, scored by heads that were not fitted on them.
        confusion: (n_classes, n_classes) of ``scored_on``, true class by row.
        score_classes: the classes of ``confusion``: the model's, then those only test has.
        predictions: of the samples of ``scored_on``.
        n_samples: samples by split.
        split_origin: how the splits came about.
        seconds: by phase, and "total".
        data_digest: sha256 over the sorted (id, digest, label) of all samples.
        notes: what a user should know before believing the scores.
    """

    head: str
    model: HeadModel
    inputs: tuple[InputBlock, ...]
    label: str
    seed: int
    best: Trial
    trials: list[Trial]
    chosen_by: str
    scored_on: str
    scores: dict[str, dict[str, Score]]
    confusion: NDArray[np.int64]
    score_classes: tuple[str, ...]
    predictions: Predictions
    n_samples: dict[str, int]
    split_origin: str
    seconds: dict[str, float]
    data_digest: str
    notes: list[str]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that the model can predict."""
        return self.model.classes

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
        document = {
            "format": RUN_FORMAT,
            "format_version": RUN_FORMAT_VERSION,
            "kind": "fit-head",
            "head": self.head,
            "setting": self.best.setting,
            "scaling": self.model.scaler.kind,
            "temperature": self.model.temperature,
            "label": self.label,
            "seed": self.seed,
            "stores": [block.store for block in self.inputs],
            "layers": [list(block.layers) for block in self.inputs],
            "classes": list(self.classes),
            "n_samples": self.n_samples,
            "split_origin": self.split_origin,
            "chosen_by": self.chosen_by,
            "scored_on": self.scored_on,
            "metrics": self._metrics_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "converged": self.converged,
            "seconds": self.seconds,
            "notes": self.notes,
            "data_digest": self.data_digest,
            "versions": _versions(),
        }
        if len(self.score_classes) <= _MAX_CLASSES_WITH_CONFUSION:
            document["confusion"] = {
                "classes": list(self.score_classes),
                "counts": self.confusion.tolist(),
            }
        return document

    def _metrics_dict(self) -> dict[str, dict[str, dict[str, float]]]:
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
        backbones = [str(block.recipe.get("backbone", "features")) for block in self.inputs]
        names = "+".join(name.removeprefix("torchvision:") for name in backbones)
        source = safe_name(str(self.inputs[0].source.get("name", "data")))

        def write(folder: Path) -> None:
            write_json(folder / RUN_FILE, self.to_dict() | {"command": command})
            self.predictions.write(folder / PREDICTIONS_FILE)
            about = {
                "label": self.label,
                "scored_on": self.scored_on,
                "metrics": self._metrics_dict(),
                "data_digest": self.data_digest,
            }
            save_bundle(folder, self.model, head=self.head, inputs=self.inputs, about=about)

        return create_run(out or Path("runs") / source, f"{self.head}-{names}", write)


def fit_head(
    stores: Store | str | Path | Sequence[Store | str | Path],
    *,
    head: str = "logreg",
    layers: Sequence[str] | None = None,
    label: str | None = None,
    scaling: str | None = None,
    settings: Sequence[Setting] | None = None,
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
        scaling: one of ``pipeline.heads.scaling.SCALINGS``; None for the head's own default.
        settings: parameters to try; None for the default grid of the head.
        seed: of held-out parts, gradient steps and the bootstrap.
        on_trial: called with every setting that was tried.

    Raises:
        UsageError: unknown head, layer, label column or scaling.
        DataError: no labels, no train split, or too few classes.
        StoreError: a store is damaged, or the stores share no sample.
        TlpipeError: every setting failed.
    """
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    scaling = scaling or HEADS[head].scaling
    if scaling not in SCALINGS:
        raise UnknownNameError("scaling", scaling, SCALINGS)
    clock = _Clock()
    opened = _open(stores)
    inputs = load_inputs(opened, layers=layers, label=label)
    clock.lap("load")
    protocol = plan_protocol(inputs.ids, inputs.labels, inputs.splits, seed=seed)
    known, unseen = _class_names(inputs.labels, protocol)
    codes = _encode(inputs.labels, (*known, *unseen))
    settings = _seeded(head, settings or GRIDS[head], seed)
    selection = select_setting(
        head, settings, inputs.X, codes, protocol,
        n_classes=len(known), scaling=scaling, widths=inputs.widths, on_trial=on_trial,
    )  # fmt: skip
    clock.lap("select")
    model = refit(
        head, selection.best, inputs.X, codes, protocol,
        classes=known, scaling=scaling, widths=inputs.widths,
    )  # fmt: skip
    clock.lap("fit")
    scored = _score(model, inputs, codes, protocol, selection, n_unseen=len(unseen), seed=seed)
    clock.lap("score")
    return HeadRun(
        head=head,
        model=model,
        inputs=inputs.blocks,
        label=inputs.label_column,
        seed=seed,
        best=selection.best,
        trials=selection.trials,
        chosen_by=protocol.chosen_by,
        scored_on=scored.split,
        scores=scored.scores,
        confusion=scored.confusion,
        score_classes=(*known, *unseen),
        predictions=scored.predictions,
        n_samples={name: int((inputs.splits == name).sum()) for name in ("train", "val", "test")},
        split_origin=opened[0].split_origin,
        seconds=clock.seconds(),
        data_digest=inputs.digest(),
        notes=inputs.notes
        + _data_notes(inputs, protocol, unseen)
        + _fit_notes(head, model, selection, protocol, settings),
    )


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = round(now - self._last, 3)
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._laps | {"total": round(sum(self._laps.values()), 3)}


def _open(stores: Store | str | Path | Sequence[Store | str | Path]) -> list[Store]:
    several = stores if isinstance(stores, Sequence) and not isinstance(stores, str) else [stores]
    return [open_store(store) if isinstance(store, str | Path) else store for store in several]


def _class_names(labels: Array, protocol: Protocol) -> tuple[list[str], list[str]]:
    """Classes that the head learns, and those that only test has; both sorted."""
    known = set(labels[protocol.refit])
    return sorted(known), sorted(set(labels[protocol.test]) - known)


def _encode(labels: Array, classes: Sequence[str]) -> NDArray[np.int64]:
    index = {name: code for code, name in enumerate(classes)}
    return np.array([index[label] for label in labels], dtype=np.int64)


def _seeded(head: str, settings: Sequence[Setting], seed: int) -> list[Setting]:
    """Settings with the seed, where the head draws random numbers."""
    if "seed" not in head_class(head).parameter_names():
        return list(settings)
    return [{"seed": seed} | setting for setting in settings]


@dataclass(frozen=True)
class _Scored:
    split: str
    scores: dict[str, dict[str, Score]]
    confusion: NDArray[np.int64]
    predictions: Predictions


def _score(
    model: HeadModel,
    inputs: HeadInputs,
    codes: Array,
    protocol: Protocol,
    selection: Selection,
    *,
    n_unseen: int,
    seed: int,
) -> _Scored:
    """Score the test split, and the samples that chose with the heads that had not seen them."""
    n_classes = len(model.classes) + n_unseen
    parts = {"test": (protocol.test, np.zeros((0, len(model.classes))))}
    if len(protocol.test):
        parts["test"] = protocol.test, model.predict_proba(inputs.X[protocol.test])
    parts["val"] = selection.rows, selection.probabilities
    parts = {split: part for split, part in parts.items() if len(part[0])}
    scores = {
        split: evaluate(codes[rows], _padded(probabilities, n_classes), seed=seed)
        for split, (rows, probabilities) in parts.items()
    }
    split = next(iter(parts), "")
    rows, probabilities = parts.get(split, (protocol.test, np.zeros((0, len(model.classes)))))
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
    )


def _padded(probabilities: NDArray[np.float64], n_classes: int) -> NDArray[np.float64]:
    """Zero probability for classes that the model does not know."""
    return np.pad(probabilities, ((0, 0), (0, n_classes - probabilities.shape[1])))


def _data_notes(inputs: HeadInputs, protocol: Protocol, unseen: Sequence[str]) -> list[str]:
    notes = []
    if unseen:
        n_samples = int(np.isin(inputs.labels[protocol.test], unseen).sum())
        notes.append(
            f"{counted(n_samples, 'test sample')} of {counted(len(unseen), 'class', 'classes')} "
            f"that train does not have ({quoted(unseen)}): counted as errors."
        )
    absent = sorted(set(inputs.labels[protocol.refit]) - set(inputs.labels[protocol.train]))
    if absent:
        notes.append(
            f"Only val has samples of {counted(len(absent), 'class', 'classes')} "
            f"({quoted(absent)})."
        )
    for split, rows, others in (
        ("test", protocol.test, protocol.refit),
        ("val", np.setdiff1d(protocol.refit, protocol.train), protocol.train),
    ):
        n_shared = int(np.isin(inputs.digests[rows], inputs.digests[others]).sum())
        if n_shared:
            notes.append(
                f"Warning: {n_shared:,} of {counted(len(rows), f'{split} image')} also in train, "
                "byte for byte: the scores flatter."
            )
    return notes


def _fit_notes(
    head: str,
    model: HeadModel,
    selection: Selection,
    protocol: Protocol,
    settings: Sequence[Setting],
) -> list[str]:
    best = selection.best
    notes = []
    if not len(protocol.test):
        notes.append(
            "Warning: there is no test split. The scores are of the samples that chose the "
            "setting, and so too good."
            if len(selection.rows)
            else "Warning: there is no test split and no sample to spare: nothing was scored."
        )
    if protocol.kind == "none":
        notes.append(
            f"No sample could be held out to choose a setting: {describe_setting(best.setting)} "
            "was taken unseen" + (", without a temperature." if HEADS[head].calibrated else ".")
        )
    failed = [trial for trial in selection.trials if trial.failure]
    notes += [f"Failed: {describe_setting(trial.setting)}: {trial.failure}" for trial in failed]
    edge = edge_note(best.setting, settings) if protocol.folds else None
    notes += [edge] if edge else []
    if not model.head.converged_:
        notes.append(
            f"The solver did not converge with {describe_setting(best.setting)}: the head is "
            "usable, but another fit of it may score differently."
        )
    if isinstance(model.head, KNNHead) and model.head.k_ < model.head.k:
        notes.append(f"k was cut to {model.head.k_}: there are no more training samples.")
    return notes


def _versions() -> dict[str, str]:
    packages = ("numpy", "scipy", "scikit-learn", "torch")
    return {
        "tlpipe": pipeline.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
