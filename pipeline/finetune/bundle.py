"""A trained network: saved as arrays and a card, loaded without running any code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

from pipeline.backbones import Preprocess, load_backbone
from pipeline.backbones.catalogue import parse_spec, timm_tags, torchvision_tags
from pipeline.errors import CorruptStoreError
from pipeline.extract.loader import Demand, load_in_order
from pipeline.extract.loader import load as load_file
from pipeline.extract.precision import resolve_device
from pipeline.finetune.evaluate import probabilities_of, run_in_halves
from pipeline.finetune.network import Classifier, make_head, make_trunk
from pipeline.heads.tasks import Task
from pipeline.runs.bundle import CARD_FILE, MODEL_FILE, NETWORK_FORMAT, read_tasks
from pipeline.runs.folder import RUN_FORMAT_VERSION, read_json, write_json

_BATCH_SIZE = 32


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a network without its numbers.

    Attributes:
        origin: arguments of `load_backbone` that give the trunk, with random weights.
        preprocess: of its input.
        hidden: widths of the head's hidden layers.
        normalise: whether the head gives features length one first.
    """

    origin: dict[str, Any]
    preprocess: Preprocess
    hidden: tuple[int, ...] = ()
    normalise: bool = False

    def build(self, n_classes: int) -> Classifier:
        """The network, with random numbers in it; nothing is downloaded."""
        trunk = make_trunk(load_backbone(**self.origin))
        n_features = int(
            trunk(torch.zeros(1, 3, self.preprocess.height, self.preprocess.width))
            .flatten(1)
            .shape[1]
        )
        head = make_head(n_features, n_classes, hidden=self.hidden, normalise=self.normalise)
        return Classifier(trunk, head).requires_grad_(False).eval()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "origin": self.origin,
            "preprocess": self.preprocess.to_dict(),
            "hidden": list(self.hidden),
            "normalise": self.normalise,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Undo `to_dict`, of a card that may have been made up.

        Raises:
            ValueError, TypeError, KeyError: it makes no sense.
        """
        origin = values["origin"]
        spec, size, weights = origin["spec"], origin["image_size"], origin["weights"]
        known = {"spec", "image_size", "weights", "seed"}
        if (
            not isinstance(spec, str)
            or set(origin) != known
            or weights not in ("random", "default")
        ):
            raise ValueError(f"origin is {origin!r:.80}")
        if weights == "default" and parse_spec(spec).family != "pixels":
            raise ValueError(f"origin asks for the weights of {spec!r:.40}")
        if size is not None and (type(size) is not int or not 1 <= size <= 10_000):
            raise ValueError(f"image_size is {size!r:.40}")
        hidden = tuple(values["hidden"])
        if not all(type(width) is int and 1 <= width <= 1_000_000 for width in hidden):
            raise ValueError(f"hidden is {hidden!r:.80}")
        return cls(
            {"spec": spec, "weights": weights, "image_size": size, "seed": 0},
            Preprocess.from_dict(values["preprocess"]),
            hidden,
            bool(values["normalise"]),
        )


def random_origin(origin: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `load_backbone` for the same architecture with random weights.

    Which weights were meant may decide the preprocessing, so their tag becomes part of the name.
    """
    found = parse_spec(str(origin["spec"]))
    weights, spec = str(origin["weights"]), str(origin["spec"])
    if found.family == "torchvision" and weights in torchvision_tags(found.architecture):
        spec = f"{found.name}:{weights}"
    elif found.family == "timm" and weights in timm_tags(found.architecture):
        spec = f"{found.name}.{weights}"
    kind = "default" if found.family == "pixels" else "random"
    return {"spec": spec, "weights": kind, "image_size": origin["image_size"], "seed": 0}


def save_network(
    folder: Path,
    network: Classifier,
    architecture: Architecture,
    tasks: Sequence[Task],
    about: dict[str, Any],
) -> None:
    """Write ``model.safetensors`` and ``card.json`` into ``folder``.

    Args:
        folder: exists.
        network: trained; a plain one, without what was added for training.
        architecture: of it.
        tasks: in the order of its outputs.
        about: more for people.
    """
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in network.state_dict().items()
    }
    data = save(state)
    several = {"tasks": [task.to_dict() for task in tasks]}
    (folder / MODEL_FILE).write_bytes(data)
    card = {
        "format": NETWORK_FORMAT,
        "format_version": RUN_FORMAT_VERSION,
        "architecture": architecture.to_dict(),
        **({"classes": list(tasks[0].classes)} if len(tasks) == 1 else several),
        "model_sha256": hashlib.sha256(data).hexdigest(),
        **about,
    }
    write_json(folder / CARD_FILE, card)


@dataclass(frozen=True)
class NetworkBundle:
    """A trained network that needs nothing else.

    Attributes:
        path: the run's folder.
        card: what ``card.json`` holds.
        network: in eval mode, on the CPU.
        preprocess: of its input.
        tasks: the label columns with their classes, in the order of its outputs.
    """

    path: Path
    card: dict[str, Any]
    network: Classifier
    preprocess: Preprocess
    tasks: tuple[Task, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the outputs, those of all tasks."""
        return tuple(name for task in self.tasks for name in task.classes)

    def classify(
        self,
        files: Sequence[str],
        *,
        device: str = "auto",
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> tuple[NDArray[np.float64], list[int], dict[int, str]]:
        """Probabilities of image files.

        Args:
            files: paths.
            device: where the network runs.
            on_progress: is told how many more images are done.

        Returns:
            (n_usable, n_outputs) probabilities, those of several tasks side by side; which files
            they are of; why others cannot be used, by place.
        """
        where = resolve_device(device)
        network = self.network.to(where)
        demand = Demand(lambda _: False, lambda pixels, _: self.preprocess(pixels))
        usable: list[int] = []
        failures: dict[int, str] = {}
        waiting: list[torch.Tensor] = []
        parts: list[torch.Tensor] = []

        def run() -> None:
            if waiting:
                batch = self.preprocess.normalise(torch.stack(waiting).to(where))
                parts.extend(run_in_halves(network, batch))
                waiting.clear()

        with (
            torch.inference_mode(),
            closing(
                load_in_order(
                    files, lambda file: load_file(file, [demand]), os.cpu_count() or 1, 64
                )
            ) as stream,
        ):
            for place, one in enumerate(stream):
                on_progress(1)
                if one.failure:
                    failures[place] = one.failure
                    continue
                (pixels,) = one.pixels
                assert pixels is not None
                usable.append(place)
                waiting.append(pixels)
                if len(waiting) == _BATCH_SIZE:
                    run()
            run()
        logits = torch.cat(parts) if parts else torch.empty(0, len(self.classes))
        return probabilities_of(logits, self.tasks), usable, failures


def load_network(path: str | Path) -> NetworkBundle:
    """Load the network of a run.

    Raises:
        StoreError: there is none, or its files are damaged or do not fit each other.
        TlpipeError: its architecture is not known here.
    """
    path = Path(path)
    card = read_json(path / CARD_FILE, NETWORK_FORMAT)
    try:
        architecture = Architecture.from_dict(card["architecture"])
        tasks = _read_tasks(card)
        digest = str(card["model_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptStoreError(f"{path / CARD_FILE}: {error!s:.120}; was it changed?") from error
    state = _load_state(path / MODEL_FILE, digest)
    network = architecture.build(sum(len(task.classes) for task in tasks))
    expected = network.state_dict()
    misfits = [
        name
        for name in {**expected, **state}
        if name not in state
        or name not in expected
        or state[name].shape != expected[name].shape
        or state[name].dtype != expected[name].dtype
    ]
    if misfits:
        raise CorruptStoreError(
            f"{path / MODEL_FILE} does not hold the network of its card: {len(misfits)} tensors "
            f"differ, such as {misfits[0]}. Fine-tune again."
        )
    network.load_state_dict(state)
    return NetworkBundle(path, card, network, architecture.preprocess, tasks)


def _read_tasks(card: dict[str, Any]) -> tuple[Task, ...]:
    """The label columns of a card that may have been made up; one where it names no tasks.

    Raises:
        ValueError, TypeError, KeyError: it makes no sense.
    """
    tasks = read_tasks(card) or (Task(card["label"], tuple(card["classes"])),)
    for task in tasks:
        names = (task.label, *task.classes)
        if len(names) < 3 or not all(isinstance(name, str) for name in names):
            raise ValueError(f"classes are {task.classes!r:.80}")
    if len({task.label for task in tasks}) < len(tasks):
        raise ValueError(f"tasks are {[task.label for task in tasks]!r:.80}")
    return tasks


def _load_state(path: Path, digest: str) -> dict[str, torch.Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptStoreError(f"{path} cannot be read ({error.strerror}).") from error
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CorruptStoreError(
            f"{path} has sha256 {found[:12]}…, but {CARD_FILE} was written for {digest[:12]}…: "
            "one of the two was changed or damaged. Fine-tune again."
        )
    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{path} is not a safetensors file ({error}).") from error
