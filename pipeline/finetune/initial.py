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
from pipeline.heads.scaling import Scaler, fit_scaler
from pipeline.heads.tasks import Task
from pipeline.runs.bundle import Bundle, is_network, load_bundle
from pipeline.runs.folder import RUN_FILE, read_run
from pipeline.store import open_store

Array = NDArray[Any]

_USABLE = "logreg, linear, ridge, mlp, and svm with a linear kernel"

# An output that nothing has taught begins so far below the least of the others.
_UNSEEN_BELOW = 10.0

_USUAL = 0.75
"""Quantile of the features' deviations that a fitted head divides by at least."""


@dataclass(frozen=True)
class InitialHead:
    """A head to start from.

    Attributes:
        module: (N, n_features) -> (N, n_classes).
        run: that it comes from; None for a fresh one.
        note: one sentence about it; "" for a fresh one.
        saw_choosers: whether it was fitted on the samples that choose.
        refitted: whether it was fitted on none but the samples that train.
        digest: of what the run has learned, wherever it lies; "" for a fresh one.
        stores: paths of the features that it was fitted on.
        seconds: that the run took; 0 for a fresh one.
    """

    module: nn.Sequential
    run: Path | None = None
    note: str = ""
    saw_choosers: bool = False
    refitted: bool = False
    digest: str = ""
    stores: tuple[str, ...] = ()
    seconds: float = 0.0


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
    setting is fitted again without the samples that choose here, so that they judge fairly. A
    class that only those have begins as good as impossible.

    Raises:
        MismatchError: it is of another backbone or layer, has other classes, is of a kind that
            is no part of a network, or is a whole network.
        StoreError: it cannot be read.
    """
    if is_network(path):
        raise MismatchError(
            f"{path} is a fine-tuned network; a training starts from a head on cached features.\n"
            "  Name a run of fit-head or sweep, or use --init-head none."
        )
    bundle = load_bundle(path)
    _check_features(bundle, backbone)
    if not _same_classes(bundle, data):
        raise MismatchError(_other_classes(bundle, data))
    note = f"The head starts as {bundle.card['head']} of {path}"
    found, saw_choosers = _refitted(bundle, data), False
    if isinstance(found, HeadModel):
        module = head_module(found, data.tasks, path=path, dropout=settings.dropout, partial=True)
        note += ", fitted again without the samples that choose."
    else:
        module = head_module(bundle.model, data.tasks, path=path, dropout=settings.dropout)
        saw_choosers = len(data.fold.choose) > 0
        note += "."
        if saw_choosers:
            note += (
                f" {found}, so it could not be fitted without the samples that choose: their "
                "scores flatter the first epochs."
            )
    return InitialHead(
        module,
        path,
        f"{note} --init-head none starts from a fresh one.",
        saw_choosers,
        isinstance(found, HeadModel),
        digest=f"{bundle.card['model_sha256']} / {bundle.model.temperature}",
        stores=tuple(block.store for block in bundle.inputs),
        seconds=float(read_run(path).get("seconds", {}).get("total", 0.0)),
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
    model: HeadModel,
    tasks: Sequence[Task],
    *,
    path: Path,
    dropout: float = 0.0,
    partial: bool = False,
) -> nn.Sequential:
    """Linear layers whose softmax gives the model's probabilities.

    Standardising x to (x − mean) / scale is folded into the first layer, W / scale and
    b − W (mean / scale); dividing by the temperature into the last.

    Args:
        model: fitted.
        tasks: label columns with their classes, in the order of the outputs.
        path: of its run, for messages.
        dropout: put before each layer.
        partial: a class that the head never saw gets an output without weights, far below the
            others, instead of an error.

    Raises:
        MismatchError: it is not made of linear layers, or never saw a class.
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
    weights[-1] /= model.temperature
    biases[-1] /= model.temperature
    if partial:
        weights[-1] = np.vstack([weights[-1], np.zeros_like(weights[-1][:1])])
        biases[-1] = np.append(biases[-1], biases[-1].min() - _UNSEEN_BELOW)
    order = _order(model, tasks, path, partial)
    weights[-1], biases[-1] = weights[-1][order], biases[-1][order]
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


def _order(model: HeadModel, tasks: Sequence[Task], path: Path, partial: bool) -> list[int]:
    """For each class of each task the head's output; one more for those that it never saw."""
    learned = _outputs(model.tasks or (Task(tasks[0].label, model.classes),))
    found = [learned[int(code)] for code in model.head.classes_]
    missing = sorted(set(_outputs(tasks)) - set(found))
    if missing and not partial:
        raise MismatchError(
            f"The head of {path} has never seen a sample of {missing[0][1]!r}.\n"
            "  Fit it again, or use --init-head none."
        )
    places = {output: place for place, output in enumerate(found)}
    return [places.get(output, len(found)) for output in _outputs(tasks)]


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


def _refitted(bundle: Bundle, data: TrainingData) -> HeadModel | str:
    """The bundle's setting, fitted on the samples that train; a clause that says why it is not."""
    block, samples = bundle.inputs[0], data.samples
    if not Path(block.store).is_dir():
        return f"Its store {block.store} is not here"
    try:
        store = open_store(block.store)
        if store.key != block.key:
            return f"Its store {block.store} holds other features now"
        label = tuple(samples.inputs.columns) or samples.inputs.label_column
        features = load_inputs([store], layers=list(block.layers), label=label)
    except TlpipeError as error:
        return f"Its store cannot be used ({_first_line(error)})"
    places = {sample: row for row, sample in enumerate(_samples(features))}
    every = list(_samples(samples.inputs))
    fit, choose = (_places(places, every, rows) for rows in (data.fold.fit, data.fold.choose))
    if fit is None:
        return f"Its store {block.store} lacks images that are trained on"
    X = np.asarray(features.features[fit], np.float32)
    X_choose = np.asarray(
        features.features[np.array([], np.intp) if choose is None else choose], np.float32
    )
    # As folds do: a feature that is all but constant for those who train, and not for the rest,
    # would be blown up. No label of those who choose is looked at.
    everyone = np.concatenate([X, X_choose])
    scaler = fit_scaler(everyone, bundle.model.scaler.kind, features.widths)
    scaler = _steady(scaler, everyone)
    name, params = str(bundle.card["head"]), bundle.card["params"]
    several = len(data.tasks) > 1
    head = multitask_class(name)(**params) if several else make_estimator(name, **params)
    try:
        head.fit(scaler(X), samples.codes[data.fold.fit])
    except FIT_ERRORS as error:
        return f"Its setting does not fit the images that are trained on ({_first_line(error)})"
    if several:
        classes = tuple(name for task in data.tasks for name in task.classes)
        return HeadModel(scaler, head, 1.0, classes, data.tasks)
    model = HeadModel(scaler, head, bundle.model.temperature, samples.known)
    if choose is None or not len(choose):
        return model
    # Too sure of itself, a head would send large gradients through a trunk that is right already.
    temperature = fit_temperature(model.logits(X_choose), samples.codes[data.fold.choose])
    return replace(model, temperature=temperature)


def _steady(scaler: Scaler, X: Array) -> Scaler:
    """The scaler, but no feature is divided by less than the usual deviation of features.

    Some features are all but dead on the images at hand. Training the trunk wakes them, and a head
    that enlarges them to the size of the others lets them outvote these.

    Args:
        scaler: fitted on ``X``.
        X: (n_samples, n_features).
    """
    if scaler.scale is None:
        return scaler
    varies = np.ptp(X, axis=0) > 0
    if not varies.any():
        return scaler
    # Not their mean, which would be that of the few loud features that some networks have.
    usual = np.quantile(scaler.scale[varies], _USUAL)
    return replace(scaler, scale=np.maximum(scaler.scale, usual))


def _places(
    places: Mapping[tuple[str, bytes], int], every: Sequence[tuple[str, bytes]], rows: Array
) -> NDArray[np.intp] | None:
    """Where some samples of the data are in a store; None where it lacks one."""
    found = [places.get(every[row]) for row in rows]
    return None if None in found else np.array(found, np.intp)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].removesuffix(".")


def _samples(inputs: HeadInputs) -> Iterator[tuple[str, bytes]]:
    """What tells each sample: its id and its image."""
    for name, digest in zip(inputs.ids, inputs.digests, strict=True):
        yield str(name), digest.tobytes()
