"""The head that a training starts from: fresh, or that of a run on cached features (LP-FT).

Kumar et al., "Fine-tuning can distort pretrained features and underperform out-of-distribution",
2022: fit the head first, then train everything. Scaling and temperature are folded into the first
and the last layer, so that the network begins with the run's own probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.backbones import PENULTIMATE
from pipeline.backbones.backbone import Backbone
from pipeline.errors import MismatchError, TlpipeError
from pipeline.finetune.data import TrainingData
from pipeline.finetune.network import linear_layers, make_head
from pipeline.finetune.settings import Settings
from pipeline.heads import make_head as make_estimator
from pipeline.heads import multitask_class
from pipeline.heads.calibration import fit_temperature
from pipeline.heads.features import HeadInputs, load_inputs
from pipeline.heads.folds import FIT_ERRORS
from pipeline.heads.model import HeadModel
from pipeline.heads.scaling import fit_scaler
from pipeline.heads.tasks import Task
from pipeline.runs.bundle import Bundle, load_bundle
from pipeline.runs.folder import RUN_FILE, read_run
from pipeline.store import open_store

Array = NDArray[Any]

_USABLE = "logreg, linear, ridge, mlp, and svm with a linear kernel"


@dataclass(frozen=True)
class InitialHead:
    """A head to start from.

    Attributes:
        module: (N, n_features) -> (N, n_classes).
        run: that it comes from; None for a fresh one.
        note: one sentence about it; "" for a fresh one.
        saw_choosers: whether it was fitted on the samples that choose.
    """

    module: nn.Sequential
    run: Path | None = None
    note: str = ""
    saw_choosers: bool = False


def fresh_head(backbone: Backbone, n_classes: int, settings: Settings) -> InitialHead:
    """A head that knows nothing."""
    module = make_head(
        backbone.trace.n_features,
        n_classes,
        hidden=settings.hidden,
        dropout=settings.dropout,
        seed=settings.seed,
    )
    return InitialHead(module)


def head_of_run(
    path: Path, backbone: Backbone, data: TrainingData, settings: Settings
) -> InitialHead:
    """The head of a run on cached features of the same backbone, as a part of a network.

    A run's head was fitted on all of train and val. Where the run's store is still there, its
    setting is fitted again without the samples that choose here, so that they judge fairly.

    Raises:
        MismatchError: it is of another backbone or layer, has other classes, or is of a kind that
            is no part of a network.
        StoreError: it cannot be read.
    """
    bundle = load_bundle(path)
    _check_features(bundle, backbone)
    if not _same_classes(bundle, data):
        raise MismatchError(_other_classes(bundle, data))
    model, saw_choosers = _refitted(bundle, data), False
    if model is None:
        model, saw_choosers = bundle.model, len(data.fold.choose) > 0
    module = head_module(model, data.tasks, path=path, dropout=settings.dropout)
    shown = f"{bundle.card['head']} of {path}"
    if not saw_choosers:
        note = f"The head starts as {shown}, fitted again without the samples that choose."
    else:
        note = (
            f"The head starts as {shown}. Its store is not here, so it could not be fitted without "
            "the samples that choose: their scores flatter the first epochs."
        )
    return InitialHead(
        module, path, f"{note} --init-head none starts from a fresh one.", saw_choosers
    )


def find_run(runs: Path, backbone: Backbone, data: TrainingData, settings: Settings) -> Path | None:
    """The run whose head suits, of several the one with the best validation score.

    Args:
        runs: a folder of runs.
        backbone: that will be trained.
        data: with the classes and the label column.
        settings: widths of hidden layers that were asked for; of several label columns none for
            any, as every head that learns several has some.
    """
    any_widths = len(data.tasks) > 1 and not settings.hidden
    found: list[tuple[float, str]] = []
    for file in sorted(runs.glob(f"*/{RUN_FILE}")):
        try:
            run = read_run(file.parent)
            if (
                run.get("kind") == "finetune"
                or run.get("label") != data.samples.inputs.label_column
            ):
                continue
            bundle = load_bundle(file.parent)
            _check_features(bundle, backbone)
            module = head_module(bundle.model, data.tasks, path=file.parent)
        except TlpipeError:
            continue  # not one to start from
        widths = tuple(layer.out_features for layer in linear_layers(module)[:-1])
        if _same_classes(bundle, data) and (any_widths or widths == settings.hidden):
            top1 = run.get("metrics", {}).get("val", {}).get("top1", {}).get("value", 0.0)
            found.append((float(top1), str(file.parent)))
    return Path(max(found)[1]) if found else None


def head_module(
    model: HeadModel, tasks: Sequence[Task], *, path: Path, dropout: float = 0.0
) -> nn.Sequential:
    """Linear layers whose softmax gives the model's probabilities.

    Standardising x to (x − mean) / scale is folded into the first layer, W / scale and
    b − W (mean / scale); dividing by the temperature into the last.

    Args:
        model: fitted.
        classes: in the order of the outputs.
        path: of its run, for messages.
        dropout: put before each layer.

    Raises:
        MismatchError: it is not made of linear layers.
    """
    head, scaler = model.head, model.scaler
    arrays = head.to_arrays()
    layers = _layers(arrays)
    if not layers:
        raise MismatchError(
            f"The head of {path} is no part of a network ({type(head).__name__}); a training can "
            f"start from {_USABLE}.\n"
            "  Fit one of those:  tlpipe fit-head STORE --head logreg\n"
            "  Or start from a fresh one:  --init-head none"
        )
    weights = [np.asarray(weight, np.float64) for weight, _ in layers]
    biases = [np.asarray(bias, np.float64) for _, bias in layers]
    if len(weights[-1]) == 1:  # the single output of two classes stands against a zero
        weights[-1] = np.vstack([np.zeros_like(weights[-1]), weights[-1]])
        biases[-1] = np.concatenate([[0.0], biases[-1]])
    order = _order(model, tasks, path)
    weights[-1] = weights[-1][order] / model.temperature
    biases[-1] = biases[-1][order] / model.temperature
    if scaler.mean is not None and scaler.scale is not None:
        weights[0] = weights[0] / scaler.scale
        biases[0] = biases[0] - weights[0] @ scaler.mean
    module = make_head(
        weights[0].shape[1],
        len(order),
        hidden=[len(weight) for weight in weights[:-1]],
        dropout=dropout,
        normalise=scaler.kind == "l2",
    )
    with torch.no_grad():
        for layer, weight, bias in zip(linear_layers(module), weights, biases, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    return module


def _layers(arrays: Mapping[str, Array]) -> list[tuple[Array, Array]]:
    """(outputs, inputs) weights and (outputs,) biases of a head's layers; [] if it has others."""
    if set(arrays) >= {"coef", "intercept"}:
        return [(arrays["coef"], arrays["intercept"])]
    hidden = sorted(
        (name for name in arrays if name.startswith("hidden") and name.endswith("_weight")),
        key=lambda name: (len(name), name),
    )
    names = [*hidden, "weight"] if "weight" in arrays else []
    return [(arrays[name], arrays[name.removesuffix("weight") + "bias"]) for name in names]


def _order(model: HeadModel, tasks: Sequence[Task], path: Path) -> list[int]:
    """For each class of each task the head's output."""
    learned = _outputs(model.tasks or (Task(tasks[0].label, model.classes),))
    found = [learned[int(code)] for code in model.head.classes_]
    missing = sorted(set(_outputs(tasks)) - set(found))
    if missing:
        raise MismatchError(
            f"The head of {path} has never seen a sample of {missing[0][1]!r}.\n"
            "  Fit it again, or use --init-head none."
        )
    return [found.index(output) for output in _outputs(tasks)]


def _outputs(tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Label and class of each output."""
    return [(task.label, name) for task in tasks for name in task.classes]


def _check_features(bundle: Bundle, backbone: Backbone) -> None:
    """Raise MismatchError unless a bundle takes what the trunk of ``backbone`` gives."""
    remedy = "  Use the head of a run on the same backbone, or --init-head none."
    if len(bundle.inputs) != 1 or bundle.inputs[0].layers != (PENULTIMATE,):
        layers = ", ".join(layer for block in bundle.inputs for layer in block.layers)
        raise MismatchError(
            f"The head of {bundle.path} takes {layers} of {len(bundle.inputs)} store(s), but a "
            f'network ends with "{PENULTIMATE}".\n{remedy}'
        )
    recipe = bundle.inputs[0].recipe
    expected = {
        "backbone": backbone.name,
        "weights": backbone.weights_digest,
        "preprocess": backbone.preprocess.to_dict(),
    }
    words = {"backbone": "backbone", "weights": "weights", "preprocess": "preprocessing"}
    for name, value in expected.items():
        if recipe.get(name) != value:
            found, wanted = recipe.get(name), value
            if isinstance(found, dict) and isinstance(wanted, dict):
                found = {k: v for k, v in found.items() if wanted.get(k) != v}
                wanted = {k: wanted.get(k) for k in found}
            raise MismatchError(
                f"The head of {bundle.path} was fitted on features of {words[name]} "
                f"{found!s:.60}, but this training has {wanted!s:.60}.\n{remedy}"
            )


def _same_classes(bundle: Bundle, data: TrainingData) -> bool:
    """Whether a head knows the classes of the data; of several label columns the names count."""
    several = len(data.tasks) > 1

    def known(tasks: Sequence[Task]) -> list[tuple[str, set[str]]]:
        return [(task.label if several else "", set(task.classes)) for task in tasks]

    return known(bundle.tasks) == known(data.tasks)


def _other_classes(bundle: Bundle, data: TrainingData) -> str:
    if len(bundle.tasks) > 1 or len(data.tasks) > 1:
        found, wanted = (
            " + ".join(f"{task.label} ({len(task.classes)} classes)" for task in tasks)
            for tasks in (bundle.tasks, data.tasks)
        )
        return (
            f"The head of {bundle.path} has learned {found}, but this training is of {wanted}.\n"
            "  Fit a head on these label columns, or use --init-head none."
        )
    classes = data.samples.known
    extra = sorted(set(bundle.classes) - set(classes))
    missing = sorted(set(classes) - set(bundle.classes))
    parts = [f"it lacks {missing[0]!r}"] if missing else []
    parts += [f"it has {extra[0]!r}"] if extra else []
    return (
        f"The head of {bundle.path} knows {len(bundle.classes)} classes, and the data has "
        f"{len(classes)}: {' and '.join(parts)}.\n"
        "  Fit a head on these labels, or use --init-head none."
    )


def _refitted(bundle: Bundle, data: TrainingData) -> HeadModel | None:
    """The bundle's setting, fitted on the samples that train; None where its store is not here."""
    block, samples = bundle.inputs[0], data.samples
    try:
        store = open_store(block.store)
        if store.key != block.key:
            return None
        label = tuple(samples.inputs.columns) or samples.inputs.label_column
        features = load_inputs([store], layers=list(block.layers), label=label)
    except TlpipeError:
        return None
    places = {sample: row for row, sample in enumerate(_samples(features))}
    every = list(_samples(samples.inputs))
    wanted = [places.get(every[row]) for row in data.fold.fit]
    if None in wanted:
        return None
    X = np.asarray(features.features[np.array(wanted, np.intp)], np.float32)
    scaler = fit_scaler(X, bundle.model.scaler.kind, features.widths)
    name, params = str(bundle.card["head"]), bundle.card["params"]
    several = len(data.tasks) > 1
    head = multitask_class(name)(**params) if several else make_estimator(name, **params)
    try:
        head.fit(scaler(X), samples.codes[data.fold.fit])
    except FIT_ERRORS:
        return None
    if several:
        classes = tuple(name for task in data.tasks for name in task.classes)
        return HeadModel(scaler, head, 1.0, classes, data.tasks)
    if len(head.classes_) < len(samples.known):
        return None
    model = HeadModel(scaler, head, 1.0, samples.known)
    choosing = [places.get(every[row]) for row in data.fold.choose]
    if not choosing or None in choosing:
        return replace(model, temperature=bundle.model.temperature)
    # Too sure of itself, a head would send large gradients through a trunk that is right already.
    logits = model.logits(np.asarray(features.features[np.array(choosing, np.intp)], np.float32))
    return replace(model, temperature=fit_temperature(logits, samples.codes[data.fold.choose]))


def _samples(inputs: HeadInputs) -> Iterator[tuple[str, bytes]]:
    """What tells each sample: its id and its image."""
    for name, digest in zip(inputs.ids, inputs.digests, strict=True):
        yield str(name), digest.tobytes()
