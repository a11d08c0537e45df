"""Accuracy of a contest's best with fewer training samples, at a bounded cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.sweep.prepare import Prepared
from pipeline.sweep.search import take_layers
from pipeline.sweep.sizes import SizePoint, accuracy_by_size, draw_rows, settings_tried
from pipeline.sweep.trials import Trial

if TYPE_CHECKING:
    from pipeline.data import DataSource

SIZES = (2, 10, 50, 200, 1000)
"""Training samples a class; few, as each costs a training."""

MAX_DRAWS = 3
MAX_SHARE = 0.5
"""Cost of all of these trainings, of that of one with all samples."""

# An image that is scored, of one that is trained on once: a third of the arithmetic, and it has to
# be read and hashed first (measured on two CPU cores, EfficientNet-Lite0: 0.4).
_SCORING = 0.5

_LEAST_STEPS = 5  # of an epoch: with few samples the batches are smaller


@dataclass(frozen=True)
class Curve:
    """Accuracy on test by the number of training samples, or a part of it.

    Attributes:
        name: head or policy, and backbone.
        how: each fit in words: what was tried, or for how many epochs.
        points: by size, rising.
        n_fits: that were made for it.
        seconds: of them; no line of the comparison's table counts them.
    """

    name: str
    how: str
    points: tuple[SizePoint, ...] = ()
    n_fits: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON and pages."""
        points = [point.to_dict() for point in self.points]
        return {**vars(self), "points": points, "seconds": round(self.seconds, 2)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Curve:
        """What :meth:`to_dict` gave."""
        points = (
            SizePoint(point["n_per_class"], point["n_samples"], tuple(point["draws"]))
            for point in document["points"]
        )
        return cls(**{**document, "points": tuple(points)})


def joined(parts: Iterable[Curve]) -> list[Curve]:
    """Parts of the same curves put together, the draws of one size side by side."""
    found: dict[str, Curve] = {}
    for part in parts:
        one = found.get(part.name)
        found[part.name] = part if one is None else _added(one, part)
    return list(found.values())


def _added(one: Curve, other: Curve) -> Curve:
    points = {point.n_per_class: point for point in one.points}
    for point in other.points:
        before = points.get(point.n_per_class)
        draws = (*before.draws, *point.draws) if before else point.draws
        points[point.n_per_class] = replace(point, draws=draws)
    return replace(
        one,
        points=tuple(points[n] for n in sorted(points)),
        n_fits=one.n_fits + other.n_fits,
        seconds=one.seconds + other.seconds,
    )


def frozen_curve(data: Prepared, best: Trial, name: str, on_fit: Callable[[], None]) -> Curve:
    """That of a head on frozen features.

    Args:
        data: features of the backbone; a test split.
        best: the head, its scaling and its setting on all samples.
        name: of the curve.
        on_fit: is called before each fit; what it raises ends all.
    """
    started = time.perf_counter()
    data = replace(data, inputs=take_layers(data.inputs, best.candidate.layers))
    points = accuracy_by_size(data, best, on_draw=on_fit)
    return Curve(
        name,
        f"each with the best of {len(settings_tried(best))} settings",
        tuple(points),
        sum(len(point.draws) for point in points),
        time.perf_counter() - started,
    )


@dataclass(frozen=True)
class Few:
    """A training with some of the samples.

    Attributes:
        n_per_class: samples of each class, or all of a class that has fewer.
        draw: which draw of so many.
        ids: of the samples that train.
        batch_size: of its steps.
        share: of the cost of all of these trainings.
    """

    n_per_class: int
    draw: int
    ids: frozenset[str]
    batch_size: int
    share: float = 1.0

    def source(self, source: DataSource, data: Prepared) -> DataSource:
        """The data source with these samples alone to train on, and the same test split."""
        split = dict.fromkeys(self.ids, "train")
        split |= dict.fromkeys(_ids(data, data.protocol.test), "test")
        some = [
            replace(sample, split=split[sample.id])
            for sample in source.samples
            if sample.id in split
        ]
        return replace(source, samples=some, split_origin="given")


def plan_few(data: Prepared, batch_size: int, epochs: int) -> list[Few]:
    """Trainings of several sizes, small ones first and then again with other samples.

    Together they cost at most ``MAX_SHARE`` of one training with all samples in as many epochs,
    counted in images; each of them scores the whole test split, too. The draws are those of the
    frozen heads.

    Args:
        data: samples with their protocol.
        batch_size: of the training with all samples.
        epochs: of that one.
    """
    protocol = data.protocol
    if not len(protocol.test):
        return []
    scoring = _SCORING * len(protocol.test)
    left = MAX_SHARE * (epochs * len(protocol.refit) + scoring)
    found: list[tuple[float, Few]] = []
    for draw in range(MAX_DRAWS):
        for n_per_class in [n for n in SIZES if n < _n_most(data)]:
            rows = draw_rows(data, n_per_class, draw)
            cost = epochs * len(rows) + scoring
            if cost > left:
                continue
            left -= cost
            size = min(batch_size, max(1, len(rows) // _LEAST_STEPS))
            found.append((cost, Few(n_per_class, draw, frozenset(_ids(data, rows)), size)))
    total = sum(cost for cost, _ in found)
    return [replace(few, share=cost / total) for cost, few in found]


def point_of_all(data: Prepared, n_fit: int, top1: float) -> SizePoint:
    """What training with all samples gives, but for those that chose its epoch.

    Args:
        data: samples with their protocol.
        n_fit: samples that it trained on; of each class the same share, give or take one.
        top1: accuracy on test.
    """
    n_per_class = round(_n_most(data) * n_fit / len(data.protocol.refit))
    return SizePoint(n_per_class, n_fit, (top1,))


def _n_most(data: Prepared) -> int:
    """Training samples of the largest class."""
    return int(np.bincount(data.codes[data.protocol.refit]).max())


def _ids(data: Prepared, rows: NDArray[np.intp]) -> list[str]:
    return [str(name) for name in data.inputs.ids[rows]]
