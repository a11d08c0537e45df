"""Named grids of settings, from the simplest fit to the closest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

Setting = dict[str, Any]


def _grid(**values: Sequence[Any]) -> list[Setting]:
    return [dict(zip(values, row, strict=True)) for row in product(*values.values())]


def _log(low: float, high: float, count: int) -> list[float]:
    """Evenly spaced exponents, in six digits."""
    return [float(f"{value:.6g}") for value in np.geomspace(low, high, count)]


QUICK: dict[str, list[Setting]] = {
    "logreg": _grid(C=[1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]),
    "linear": _grid(lr=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "svm": [
        *_grid(kernel=["linear"], C=[1e-4, 1e-3, 1e-2]),
        *_grid(kernel=["rbf"], C=[1.0, 10.0]),
    ],
    "mlp": _grid(hidden=[256, 1024], lr=[1e-3, 3e-3]),
    "ridge": _grid(alpha=[1e5, 1e4, 1e3, 1e2, 10.0, 1.0]),
    "knn": _grid(k=[100, 50, 20, 10, 5, 1]),
    "prototype": [{}],
}
"""A few settings a head, for one fit."""

DEFAULT: dict[str, list[Setting]] = {
    "logreg": _grid(C=_log(1e-6, 1e4, 31)),
    "linear": _grid(weight_decay=[1e-2, 1.0], lr=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "svm": [
        *_grid(kernel=["linear"], C=_log(1e-6, 1.0, 19)),
        *_grid(kernel=["rbf"], C=[0.3, 1.0, 3.0, 10.0, 30.0]),
    ],
    "mlp": _grid(hidden=[256, 1024], dropout=[0.2, 0.5], lr=[1e-4, 3e-4, 1e-3]),
    "ridge": _grid(alpha=_log(1e6, 1e-2, 33)),
    "knn": _grid(
        metric=["cosine", "euclidean"],
        k=[200, 100, 50, 20, 10, 5, 3, 1],
        temperature=[0.02, 0.07, 0.2],
    ),
    "prototype": [{}],
}
"""What a sweep tries: wide enough that the best rarely lies at an edge."""

GRIDS: dict[str, dict[str, list[Setting]]] = {
    "default": DEFAULT,
    "quick": QUICK,
    # Radford et al., "Learning transferable visual models …", 2021, A.3: 96 values.
    "clip": {"logreg": _grid(C=_log(1e-6, 1e6, 96))},
    # Grill et al., "Bootstrap your own latent", 2020, D.1 (and SimCLR): 45 values.
    "byol": {"logreg": _grid(C=_log(1e-6, 1e5, 45))},
}
"""Settings by head, by the name of the grid; a head that a grid lacks takes the default one."""

_ENDS = {"k": 1}
"""A best value here is no reason to look further: there is nothing beyond it."""


def edge_note(chosen: Setting, settings: Sequence[Setting]) -> str | None:
    """Say where the chosen setting lies at the end of the range that was tried, or None.

    Looks at each number that took three values or more while the other parameters were as chosen.
    """
    notes = []
    for name, value in chosen.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        alike = [s.get(name) for s in settings if _others(s, name) == _others(chosen, name)]
        tried = sorted({other for other in alike if isinstance(other, int | float)})
        if len(tried) < 3 or _ENDS.get(name) == value:
            continue
        if value == tried[0]:
            notes.append(f"{name} = {value:g} is the smallest that was tried")
        elif value == tried[-1]:
            notes.append(f"{name} = {value:g} is the largest that was tried")
    if not notes:
        return None
    return f"The best setting lies at the edge of the grid: {', '.join(notes)}."


def _others(setting: Mapping[str, Any], name: str) -> Setting:
    return {key: value for key, value in setting.items() if key != name}
