"""Features -> head: one estimator a module, found by name here.

Importing this package imports neither scikit-learn nor torch; a head's module is imported when
the head is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from pipeline.heads.base import Head
    from pipeline.heads.multitask import MultiTaskMLP

__all__ = [
    "HEADS",
    "MULTITASK",
    "HeadSpec",
    "describe_layers",
    "describe_setting",
    "head_class",
    "make_head",
    "multitask_class",
]


@dataclass(frozen=True)
class HeadSpec:
    """Where a head lives and how the pipeline treats it.

    Attributes:
        module: module of ``pipeline.heads``.
        class_name: the estimator in it.
        summary: one line for people.
        scaling: default scaling of its features, one of ``pipeline.heads.scaling.SCALINGS``.
        scalings: those that are worth trying.
        together: settings that are fitted at once at most, so that what is done is written down
            now and then; None for all.
        calibrated: True where its scores are no log-probabilities that were fitted as such, so
            that a temperature is fitted on the samples that choose its setting.
        views: whether it learns from all stored views of a sample, one drawn at each step.
    """

    module: str
    class_name: str
    summary: str
    scaling: str = "standardise"
    scalings: tuple[str, ...] = ("standardise", "l2")
    together: int | None = None
    calibrated: bool = False
    views: bool = False


HEADS: dict[str, HeadSpec] = {
    "logreg": HeadSpec("logistic", "LogisticHead", "multinomial logistic regression"),
    "linear": HeadSpec(
        "linear", "LinearHead", "softmax layer trained by gradient steps", together=16, views=True
    ),
    "svm": HeadSpec("svm", "SVMHead", "support vectors, linear or RBF kernel", calibrated=True),
    "mlp": HeadSpec(
        "mlp",
        "MLPHead",
        "network with hidden layers, trained by gradient steps",
        together=8,
        views=True,
    ),
    "ridge": HeadSpec("ridge", "RidgeHead", "least squares on ±1 targets", calibrated=True),
    "knn": HeadSpec(
        "knn",
        "KNNHead",
        "weighted votes of the nearest samples",
        scaling="l2",
        scalings=("l2", "standardise", "none"),
        calibrated=True,
    ),
    "prototype": HeadSpec(
        "prototype",
        "PrototypeHead",
        "nearest class mean",
        scaling="none",
        scalings=("none", "standardise"),
        calibrated=True,
    ),
}


MULTITASK = ("mlp",)
"""Heads that learn several label columns at once, with a trunk that these share."""


def head_class(name: str) -> type[Head]:
    """Return the estimator class called ``name``.

    Raises:
        UnknownNameError: no head has that name.
    """
    if name not in HEADS:
        raise UnknownNameError("head", name, HEADS)
    spec = HEADS[name]
    found: type[Head] = getattr(import_module(f"pipeline.heads.{spec.module}"), spec.class_name)
    return found


def multitask_class(name: str) -> type[MultiTaskMLP]:
    """Return the estimator class that learns several label columns as head ``name`` learns one.

    Raises:
        UnknownNameError: the head learns one at a time.
    """
    if name not in MULTITASK:
        raise UnknownNameError("head for several label columns", name, MULTITASK)
    found: type[MultiTaskMLP] = import_module("pipeline.heads.multitask").MultiTaskMLP
    return found


def make_head(name: str, **params: Any) -> Head:
    """Make an unfitted head.

    Args:
        name: a key of :data:`HEADS`.
        params: the estimator's parameters; those not given keep their default.

    Raises:
        UnknownNameError: no head has that name.
        UsageError: the head has no such parameter.
    """
    cls = head_class(name)
    known = cls.parameter_names()
    for param in params:
        if param not in known:
            raise UsageError(
                f"Head {name!r} has no parameter {param!r}. It has: {', '.join(known)}."
            )
    return cls(**params)


def describe_setting(setting: Mapping[str, Any]) -> str:
    """``{"kernel": "rbf", "C": 10.0, "seed": 0}`` -> ``"kernel=rbf, C=10"``."""
    parts = [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in setting.items()
        if name != "seed"
    ]
    return ", ".join(parts) or "nothing to choose"


def describe_layers(layers: Sequence[str]) -> str:
    """``["a", "b"]`` -> ``"a+b"``; their number where they are many."""
    return "+".join(layers) if len(layers) <= 3 else f"{len(layers)} layers"
