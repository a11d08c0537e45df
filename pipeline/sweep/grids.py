"""Settings that are tried by default, a few a head, from the simplest fit to the closest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

Setting = dict[str, Any]


def _grid(**values: Sequence[Any]) -> list[Setting]:
    return [dict(zip(values, row, strict=True)) for row in product(*values.values())]


GRIDS: dict[str, list[Setting]] = {
    "logreg": _grid(C=[1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]),
    "linear": _grid(lr=[1e-3, 1e-2, 1e-1], weight_decay=[1e-2, 1.0]),
    "svm": [
        *_grid(kernel=["linear"], C=[1e-4, 1e-3, 1e-2]),
        *_grid(kernel=["rbf"], C=[1.0, 10.0]),
    ],
    "mlp": _grid(hidden=[256, 1024], weight_decay=[1e-2, 1.0]),
    "ridge": _grid(alpha=[1e5, 1e4, 1e3, 1e2, 10.0, 1.0]),
    "knn": _grid(k=[100, 50, 20, 10, 5, 1]),
    "prototype": [{}],
}

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
        tried = sorted({s[name] for s in settings if _others(s, name) == _others(chosen, name)})
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


def describe_setting(setting: Mapping[str, Any]) -> str:
    """``{"kernel": "rbf", "C": 10.0, "seed": 0}`` -> ``"kernel=rbf, C=10"``."""
    parts = [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in setting.items()
        if name != "seed"
    ]
    return ", ".join(parts) or "nothing to choose"
