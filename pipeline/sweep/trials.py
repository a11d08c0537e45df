"""What was tried, and how it did on the samples that choose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from pipeline.errors import UnknownNameError
from pipeline.heads import describe_layers, describe_setting
from pipeline.sweep.grids import Setting

METRICS = ("top1", "macro_f1", "mean_per_class_accuracy", "nll")
"""What may choose; the lowest NLL is the best, of all others the highest."""


def check_metric(name: str) -> None:
    """Refuse what cannot choose.

    Raises:
        UnknownNameError: ``name`` is not of :data:`METRICS`.
    """
    if name not in METRICS:
        raise UnknownNameError("metric to choose by", name, METRICS)


@dataclass(frozen=True)
class Candidate:
    """A head with all that has to be chosen for it.

    Attributes:
        head: a key of ``pipeline.heads.HEADS``.
        layers: names of the layers that it sees; of several stores, "store number:layer".
        scaling: of ``pipeline.heads.scaling.SCALINGS``.
        setting: parameters of the estimator.
    """

    head: str
    layers: tuple[str, ...]
    scaling: str
    setting: Setting

    def key(self) -> str:
        """The same text for the same candidate."""
        return json.dumps([self.head, self.layers, self.scaling, self.setting], sort_keys=True)

    def describe(self, *, with_layers: bool = False, with_scaling: bool = False) -> str:
        """For people, without what goes without saying."""
        parts = [describe_setting(self.setting)]
        parts += [self.scaling] if with_scaling else []
        parts += [describe_layers(self.layers)] if with_layers else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Trial:
    """One candidate and how it did.

    Attributes:
        candidate: what was tried.
        seconds: spent on fitting and scoring it; of what was fitted together, its share.
        scores: top1, macro_f1, mean_per_class_accuracy, nll, ece on the samples that choose; empty
            where it failed or nothing chose.
        temperature: fitted on the samples that choose, or 1.
        converged: in every fold.
        failure: why it has no score, or "".
    """

    candidate: Candidate
    seconds: float
    scores: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    converged: bool = True
    failure: str = ""

    @property
    def setting(self) -> Setting:
        """Parameters of the estimator."""
        return self.candidate.setting

    @property
    def top1(self) -> float | None:
        """Share of right answers, if it was scored."""
        return self.scores.get("top1")

    def rank(self, metric: str) -> tuple[float, float]:
        """Larger is better; equals go by the negative log-likelihood."""
        nll = -self.scores["nll"]
        return (nll, nll) if metric == "nll" else (self.scores[metric], nll)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        candidate = self.candidate
        return {
            "head": candidate.head,
            "layers": list(candidate.layers),
            "scaling": candidate.scaling,
            "setting": candidate.setting,
            "seconds": round(self.seconds, 4),
            **self.scores,
            "temperature": self.temperature,
            "converged": self.converged,
            "failure": self.failure,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """The way back.

        Raises:
            KeyError, TypeError, ValueError: it is not what :meth:`to_dict` made.
        """
        candidate = Candidate(
            str(document["head"]),
            tuple(str(name) for name in document["layers"]),
            str(document["scaling"]),
            dict(document["setting"]),
        )
        names = (*METRICS, "ece", "top5")
        return cls(
            candidate,
            float(document["seconds"]),
            {name: float(document[name]) for name in names if name in document},
            float(document["temperature"]),
            bool(document["converged"]),
            str(document["failure"]),
        )


def described(candidate: Candidate, among: Sequence[Trial]) -> str:
    """A candidate for people: with its scaling and layers where those that were tried differ."""
    others = [trial.candidate for trial in among]
    return candidate.describe(
        with_scaling=len({other.scaling for other in others}) > 1,
        with_layers=len({other.layers for other in others}) > 1,
    )
