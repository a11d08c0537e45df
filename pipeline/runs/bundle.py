"""The model of a run: saved as arrays and a card, loaded without running any code."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.errors import (
    CorruptStoreError,
    MismatchError,
    StoreError,
    StoreFormatError,
    UnknownNameError,
)
from pipeline.heads.features import InputBlock
from pipeline.heads.model import HeadModel
from pipeline.heads.tasks import Task
from pipeline.runs.folder import RUN_FORMAT_VERSION, read_json, write_json

Array = NDArray[Any]

CARD_FILE = "card.json"
CARD_FORMAT = "tlpipe-head"
MODEL_FILE = "model.safetensors"
NETWORK_FORMAT = "tlpipe-network"
"""The card of a fine-tuned network, which ``finetune/bundle.py`` writes and loads."""


@dataclass(frozen=True)
class Bundle:
    """A fitted model that needs no store, unless its samples are too many to be held.

    Attributes:
        path: the run's folder.
        card: what ``card.json`` holds.
        inputs: the features that it takes, one block a recipe.
        model: from features to probabilities.
    """

    path: Path
    card: dict[str, Any]
    inputs: tuple[InputBlock, ...]
    model: HeadModel

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities."""
        return self.model.classes

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The label columns, whose probabilities lie side by side."""
        return self.model.tasks or (Task(str(self.card.get("label", "")), self.classes),)

    def predict_proba(self, blocks: Sequence[Array] | Mapping[str, Array]) -> NDArray[np.float64]:
        """Probabilities (n_samples, n_classes) of features; those of each task sum to one.

        Args:
            blocks: one array (n_samples, n_features) for each of ``inputs`` and in their order,
                its layers side by side; or the same by recipe key, which is checked.

        Raises:
            MismatchError: features of another recipe, or of another width.
        """
        if isinstance(blocks, Mapping):
            self.check_keys(list(blocks))
            blocks = [blocks[block.key] for block in self.inputs]
        if len(blocks) != len(self.inputs):
            raise MismatchError(
                f"{self.path} takes {len(self.inputs)} blocks of features, not {len(blocks)}."
            )
        rounded = [
            self._checked(np.asarray(features), block)
            for features, block in zip(blocks, self.inputs, strict=True)
        ]
        if len({len(features) for features in rounded}) > 1:
            raise MismatchError(
                "The blocks of features have different numbers of samples: "
                f"{', '.join(str(len(features)) for features in rounded)}."
            )
        return self.model.predict_proba(np.concatenate(rounded, axis=1))

    def check_keys(self, keys: Sequence[str]) -> None:
        """Raise MismatchError unless ``keys`` are the recipes that the model was fitted on."""
        expected = [block.key for block in self.inputs]
        strangers = [key for key in keys if key not in expected]
        missing = [block for block in self.inputs if block.key not in keys]
        if not strangers and not missing:
            return
        found = ", ".join(key[:8] for key in strangers or keys) or "none"
        wanted = ", ".join(f"{b.key[:8]} ({b.recipe.get('backbone', '?')})" for b in self.inputs)
        raise MismatchError(
            f"{self.path} was fitted on features of recipe {wanted}, but these are of recipe "
            f"{found}.\n  Their numbers mean something else: fit a head on that store, or embed "
            "the images with the recipe of this run, as tlpipe predict does."
        )

    def _checked(self, features: Array, block: InputBlock) -> NDArray[np.float32]:
        """Features as they would have come back from the store."""
        if features.ndim != 2 or features.shape[1] != block.n_features:
            raise MismatchError(
                f"{self.path} takes {block.n_features} features ({', '.join(block.layers)}), "
                f"but these have shape {features.shape}."
            )
        return features.astype(block.dtype).astype(np.float32)


def save_bundle(
    folder: Path,
    model: HeadModel,
    *,
    head: str,
    inputs: Sequence[InputBlock],
    about: dict[str, Any],
) -> None:
    """Write ``model.safetensors`` and ``card.json`` into ``folder``.

    Args:
        folder: exists.
        model: the fitted model.
        head: its name in ``pipeline.heads.HEADS``.
        inputs: the features that it takes.
        about: more for people, such as metrics and the digest of the data.
    """
    data = save(model.to_arrays())
    (folder / MODEL_FILE).write_bytes(data)
    card = {
        "format": CARD_FORMAT,
        "format_version": RUN_FORMAT_VERSION,
        "head": head,
        "params": model.head.get_params(deep=False),
        **_classes(model),
        "scaling": model.scaler.kind,
        "temperature": model.temperature,
        "inputs": [asdict(block) for block in inputs],
        "model_sha256": hashlib.sha256(data).hexdigest(),
        **about,
    }
    write_json(folder / CARD_FILE, card)


def _classes(model: HeadModel) -> dict[str, Any]:
    """What the outputs stand for."""
    if model.tasks:
        return {"tasks": [task.to_dict() for task in model.tasks]}
    return {"classes": list(model.classes)}


def load_bundle(path: str | Path) -> Bundle:
    """Load the model of a run.

    Args:
        path: the run's folder.

    Raises:
        StoreError: there is no model, or its files are damaged or do not fit each other.
    """
    from pipeline.heads.streaming.knn import reopen  # brings torch

    path = Path(path)
    card = read_json(path / CARD_FILE, CARD_FORMAT)
    try:
        fields = _Fields(card)
        inputs = tuple(_input_block(_Fields(block)) for block in fields.list("inputs", dict))
        head, scaling = fields.text("head"), fields.text("scaling")
        params = fields.dict("params")
        temperature = fields.number("temperature")
        tasks = read_tasks(card)
        names = [name for task in tasks for name in task.classes]
        classes = names or fields.list("classes", str)
        digest = fields.text("model_sha256")
    except _WrongFieldError as error:
        raise CorruptStoreError(f"{path / CARD_FILE}: {error}") from error
    try:
        model = HeadModel.from_arrays(
            _load_arrays(path / MODEL_FILE, digest),
            head=head,
            params=params,
            scaling=scaling,
            widths=[width for block in inputs for width in block.widths],
            temperature=temperature,
            classes=classes,
            tasks=tasks,
        )
        reopen(model, inputs)
    except UnknownNameError as error:
        raise StoreFormatError(f"{path / CARD_FILE}: {error}\n  Upgrade tlpipe.") from error
    except StoreError as error:
        raise type(error)(f"{path}: {error}") from error
    return Bundle(path, card, inputs, model)


def read_tasks(card: dict[str, Any]) -> tuple[Task, ...]:
    """The label columns of a model that learned several; () of one that learned one.

    Args:
        card: of a model, which may have been made up.

    Raises:
        ValueError: what is wrong with them.
    """
    if "tasks" not in card:
        return ()
    found = [_Fields(task) for task in _Fields(card).list("tasks", dict)]
    return tuple(Task(task.text("label"), tuple(task.list("classes", str))) for task in found)


def is_network(path: str | Path) -> bool:
    """Whether the run at ``path`` holds a fine-tuned network rather than a head."""
    try:
        read_json(Path(path) / CARD_FILE, NETWORK_FORMAT)
    except StoreError:
        return False
    return True


def _load_arrays(path: Path, digest: str) -> dict[str, Array]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptStoreError(f"{path.name} cannot be read ({error.strerror}).") from error
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CorruptStoreError(
            f"{path.name} has sha256 {found[:12]}…, but {CARD_FILE} was written for "
            f"{digest[:12]}…: one of the two was changed or damaged. Fit the head again."
        )
    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{path.name} is not a safetensors file ({error}).") from error


class _WrongFieldError(ValueError):
    pass


class _Fields:
    """Typed access to an object of a card that may have been made up."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def _get(self, name: str, kind: type | tuple[type, ...], words: str) -> Any:
        value = self.values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _WrongFieldError(f"{name!r} is {value!r:.80}, expected {words}")
        return value

    def text(self, name: str) -> str:
        return str(self._get(name, str, "text"))

    def number(self, name: str) -> float:
        value = float(self._get(name, (int, float), "a number"))
        if not (math.isfinite(value) and value > 0):
            raise _WrongFieldError(f"{name!r} is {value}, expected a number above 0")
        return value

    def dict(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._get(name, dict, "an object")
        return found

    def list(self, name: str, kind: type) -> list[Any]:
        values: list[Any] = self._get(name, list, "a list")
        if not values or not all(type(value) is kind for value in values):
            raise _WrongFieldError(f"{name!r} is {values!r:.80}, expected {kind.__name__}s")
        return values


def _input_block(fields: _Fields) -> InputBlock:
    layers, widths = fields.list("layers", str), fields.list("widths", int)
    dtype = fields.text("dtype")
    if len(layers) != len(widths) or min(widths) < 1:
        raise _WrongFieldError(f"layers {layers} have widths {widths}")
    if dtype not in ("float16", "float32"):
        raise _WrongFieldError(f"'dtype' is {dtype!r}, expected float16 or float32")
    return InputBlock(
        store=fields.text("store"),
        key=fields.text("key"),
        recipe=fields.dict("recipe"),
        source=fields.dict("source"),
        origin=fields.dict("origin"),
        dtype=dtype,
        layers=tuple(layers),
        widths=tuple(widths),
    )
