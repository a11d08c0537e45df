"""A fine-tuned network and everything that was found out about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.finetune.bundle import Architecture, save_network
from pipeline.finetune.checkpoint import Checkpoint, write_metrics
from pipeline.finetune.network import Classifier
from pipeline.finetune.settings import Settings
from pipeline.heads.metrics import Score
from pipeline.heads.tasks import Task
from pipeline.runs.folder import (
    METRICS_FILE,
    RUN_FILE,
    RUN_FORMAT,
    RUN_FORMAT_VERSION,
    create_run,
    write_json,
)
from pipeline.runs.predictions import PREDICTIONS_FILE
from pipeline.runs.tasks import TaskResult, mean_scores
from pipeline.sweep.head_run import versions

_MAX_CLASSES_WITH_CONFUSION = 200


@dataclass(frozen=True)
class FinetuneRun:
    """A fine-tuned network and everything that was found out about it.

    Attributes:
        network: in its best state, in eval mode.
        architecture: how it is built again.
        settings: how it was trained.
        lr: the learning rate, given or found.
        lr_trials: what ``lr="auto"`` tried.
        backbone: its name, where its weights are from, their digest.
        source: name, spec and layout of the data.
        head: what the head started from, in words.
        head_refitted: whether it was fitted on none but the samples that train.
        head_seconds: that the run which it started from took; 0 for a fresh one.
        stores: of the activations that were trained on, and of the features that the head was
            fitted on.
        n_parameters: of the network with its new head.
        n_trained: that were trained.
        best_epoch: epochs before the state that was kept.
        curve: one entry an epoch; the first is before training.
        chosen_by: which samples chose the epoch and the learning rate, in words.
        results: what was found out about each label column; "val" are the samples that chose.
        task_weights: what each column's loss was multiplied with in the end.
        n_samples: samples by split.
        n_fit: samples that were trained on.
        split_origin: how the splits came about.
        seconds: "load", "embed" of activations, "search", "train", "score" and "total".
        device: what it ran on: "cpu", or the GPU's name.
        n_processes: that trained together, each with a GPU of its own where it ran on GPUs.
        data_digest: sha256 over the sorted (id, digest, label) of all samples.
        failures: why samples were left out, by id.
        notes: what a user should know before believing the scores.
        checkpoint: of the training, removed once the run is saved.
        out: folder for the run's folder.
    """

    network: Classifier
    architecture: Architecture
    settings: Settings
    lr: float
    lr_trials: list[dict[str, Any]]
    backbone: dict[str, str]
    source: dict[str, Any]
    head: str
    head_refitted: bool
    head_seconds: float
    stores: list[str]
    n_parameters: int
    n_trained: int
    best_epoch: int
    curve: list[dict[str, Any]]
    chosen_by: str
    results: tuple[TaskResult, ...]
    task_weights: list[float]
    n_samples: dict[str, int]
    n_fit: int
    split_origin: str
    seconds: dict[str, float]
    device: str
    n_processes: int
    data_digest: str
    failures: dict[str, str]
    notes: list[str]
    checkpoint: Checkpoint
    out: Path

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The label columns with their classes."""
        return tuple(result.task for result in self.results)

    @property
    def label(self) -> str:
        """Names of the label columns."""
        return " + ".join(task.label for task in self.tasks)

    @property
    def scores(self) -> dict[str, dict[str, Score]]:
        """Metrics of "test" and "val", as far as there are; means over several label columns."""
        return self.results[0].scores if len(self.results) == 1 else mean_scores(self.results)

    @property
    def scored_on(self) -> str:
        """Where the metrics are from: "test", else "val"; "" where nothing could be scored."""
        return next(iter(self.scores), "")

    @property
    def metrics(self) -> dict[str, Score]:
        """Scores on ``scored_on``; empty where nothing could be scored."""
        return self.scores.get(self.scored_on, {})

    def to_dict(self) -> dict[str, Any]:
        """What ``run.json`` holds, as plain values for JSON."""
        document = {
            "format": RUN_FORMAT,
            "format_version": RUN_FORMAT_VERSION,
            "kind": "finetune",
            "policy": self.settings.policy,
            "head": f"finetune {self.settings.policy}",
            "head_start": self.head,
            "head_seconds": self.head_seconds,
            "stores": self.stores,
            "lr": self.lr,
            "lr_trials": self.lr_trials,
            "settings": self.settings.to_dict(),
            "backbone": self.backbone,
            "source": self.source,
            "label": self.label,
            "seed": self.settings.seed,
            "n_samples": self.n_samples,
            "n_fit": self.n_fit,
            "n_parameters": self.n_parameters,
            "n_trained": self.n_trained,
            "epochs": self.curve[-1]["epoch"],
            "best_epoch": self.best_epoch,
            "curve": self.curve,
            "split_origin": self.split_origin,
            "chosen_by": self.chosen_by,
            "scored_on": self.scored_on,
            "metrics": self.metrics_dict(),
            "seconds": self.seconds,
            "device": self.device,
            "n_processes": self.n_processes,
            "failures": self.failures,
            "notes": self.notes,
            "data_digest": self.data_digest,
            "versions": versions(),
        }
        if len(self.results) > 1:
            tasks = [result.to_dict() for result in self.results]
            return {**document, "tasks": tasks, "task_weights": self.task_weights}
        result = self.results[0]
        document["classes"] = list(result.task.classes)
        if len(result.score_classes) <= _MAX_CLASSES_WITH_CONFUSION:
            document["confusion"] = {
                "classes": list(result.score_classes),
                "counts": result.confusion.tolist(),
            }
        return document

    def metrics_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Scores by split and metric, for JSON."""
        return {
            split: {name: score.to_dict() for name, score in scores.items()}
            for split, scores in self.scores.items()
        }

    def save(self, *, command: str = "") -> Path:
        """Write the run to a new numbered folder, forget its checkpoint, and return its path.

        Args:
            command: the command line that made it, for the record.

        Raises:
            ResourceError: the disk is full.
            StoreError: the folder cannot be written to.
        """
        policy = self.settings.policy.replace(":", "")
        name = self.backbone["name"].removeprefix("torchvision:")
        document = self.to_dict() | {"command": command}
        path = create_run(
            self.out, f"finetune-{policy}-{name}", lambda folder: self._write(folder, document)
        )
        self.checkpoint.remove()
        return path

    def _write(self, folder: Path, document: dict[str, Any]) -> None:
        write_json(folder / RUN_FILE, document)
        if len(self.results) == 1:
            self.results[0].predictions.write(folder / PREDICTIONS_FILE)
        else:
            for result in self.results:
                result.write_predictions(folder)
        write_metrics(folder / METRICS_FILE, self.curve)
        about = {
            "label": self.label,
            "scored_on": self.scored_on,
            "metrics": self.metrics_dict(),
            "data_digest": self.data_digest,
            "backbone": self.backbone,
        }
        save_network(folder, self.network, self.architecture, self.tasks, about)
