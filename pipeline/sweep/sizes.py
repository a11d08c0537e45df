"""Accuracy against the number of training samples: would more labels help?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from pipeline.sweep.grids import GRIDS
from pipeline.sweep.prepare import Prepared
from pipeline.sweep.proposals import Grid
from pipeline.sweep.protocol import plan_protocol
from pipeline.sweep.search import Search
from pipeline.sweep.selection import refit
from pipeline.sweep.trials import Trial

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class SizePoint:
    """What so many samples a class give.

    Attributes:
        n_per_class: samples of each class, or all of a class that has fewer.
        n_samples: of all classes.
        draws: accuracy on test of each draw of samples.
    """

    n_per_class: int
    n_samples: int
    draws: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """With the mean and the 95 % interval that the choice of samples gives it, for JSON.

        The interval is Student's t over the draws, within [0, 1]; a single draw has none. All draws
        are scored on the same test split: what another split would say is not in it.
        """
        mean, low, high = float(np.mean(self.draws)), None, None
        if len(self.draws) > 1:
            spread = float(np.std(self.draws, ddof=1)) / len(self.draws) ** 0.5
            half = float(student.ppf(0.975, len(self.draws) - 1)) * spread
            low, high = max(mean - half, 0.0), min(mean + half, 1.0)
        return {
            "n_per_class": self.n_per_class,
            "n_samples": self.n_samples,
            "draws": list(self.draws),
            "mean": mean,
            "low": low,
            "high": high,
        }


def accuracy_by_size(
    data: Prepared,
    best: Trial,
    *,
    sizes: Sequence[int] = SIZES,
    n_draws: int = 5,
    on_draw: Callable[[], None] = lambda: None,
) -> list[SizePoint]:
    """Fit a head on few, more and all training samples, and score each on the test split.

    Every draw chooses its setting anew among a few, on folds of its own samples; where a class has
    a single one nothing can be held out, and the setting of ``best`` is taken. The last point is
    all samples, once.

    Args:
        data: features of the layers of ``best``; a test split.
        best: the head, its scaling and its setting on all samples.
        sizes: samples a class; those beyond what the largest class has are left out.
        n_draws: of each size, with other samples.
        on_draw: is called before each draw; what it raises ends all.
    """
    rows = data.protocol.refit
    counts = np.bincount(data.codes[rows], minlength=len(data.known))
    points = []
    for n_per_class in [n for n in sizes if n < counts.max()]:
        scores = []
        for seed in range(n_draws):
            on_draw()
            kept = draw_rows(data, n_per_class, seed)
            scores.append(_accuracy(data, kept, best, seed))
        points.append(SizePoint(n_per_class, len(kept), tuple(scores)))
    on_draw()
    points.append(SizePoint(int(counts.max()), len(rows), (_accuracy(data, rows, best, 0),)))
    return points


def draw_rows(data: Prepared, n_per_class: int, seed: int) -> NDArray[np.intp]:
    """``n_per_class`` training rows of each class; larger draws of one seed hold the smaller ones.

    Args:
        data: samples with their protocol.
        n_per_class: of each class, or all of a class that has fewer.
        seed: of the draw.
    """
    order = np.random.default_rng([data.seed, seed]).permutation(data.protocol.refit)
    codes = data.codes[order]
    rank = np.empty(len(order), dtype=np.intp)
    for code in np.unique(codes):
        same = np.flatnonzero(codes == code)
        rank[same] = np.arange(len(same))
    return np.sort(order[rank < n_per_class])


def settings_tried(best: Trial) -> list[dict[str, Any]]:
    """Settings that each draw chooses among: that of all samples, and a few others."""
    return [best.candidate.setting, *GRIDS["quick"][best.candidate.head]]


def _accuracy(data: Prepared, kept: NDArray[np.intp], best: Trial, seed: int) -> float:
    """On test, of a head that knows only the rows ``kept``."""
    inputs, candidate = data.inputs, best.candidate
    splits = np.full(len(inputs.splits), "", dtype="U5")
    splits[kept], splits[data.protocol.test] = "train", "test"
    few = replace(
        data,
        inputs=replace(inputs, splits=splits),
        protocol=plan_protocol(inputs.ids, inputs.labels, splits, seed=seed, groups=inputs.groups),
        seed=seed,
    )
    if few.protocol.folds:
        frames = [(candidate.layers, candidate.scaling)]
        settings = settings_tried(best)
        best = Search(few).run(Grid(candidate.head, settings, frames)).best
    model = refit(best, inputs, data.codes, few.protocol, data.known)
    test = data.protocol.test
    predicted = model.predict_proba(inputs.X[test]).argmax(axis=1)
    return float((predicted == data.codes[test]).mean())
