"""Ranges of parameters: as a user writes them, as a grid, and to draw from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import UnknownNameError, UsageError
from pipeline.heads import HEADS, head_class
from pipeline.sweep.grids import GRIDS, Setting

_DEFAULT_COUNT = 10


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, evenly spaced in their logarithm.

    Attributes:
        low: above 0.
        high: above ``low``.
        count: values of it in a grid.
        whole: integers only.
    """

    low: float
    high: float
    count: int = _DEFAULT_COUNT
    whole: bool = False

    def values(self) -> list[Any]:
        """As a grid."""
        if self.whole:
            rounded = np.rint(np.geomspace(self.low, self.high, self.count))
            return [int(value) for value in np.unique(rounded)]
        return [float(f"{value:.6g}") for value in np.geomspace(self.low, self.high, self.count)]

    def draw(self, rng: np.random.Generator) -> Any:
        """One at random."""
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return round(value) if self.whole else value


@dataclass(frozen=True)
class Choice:
    """One of a list.

    Attributes:
        options: in the order in which a grid goes through them.
    """

    options: tuple[Any, ...]

    def values(self) -> list[Any]:
        """As a grid."""
        return list(self.options)

    def draw(self, rng: np.random.Generator) -> Any:
        """One at random."""
        return self.options[int(rng.integers(len(self.options)))]


Space = dict[str, Range | Choice]

SPACES: dict[str, Space] = {
    "logreg": {"C": Range(1e-6, 1e4)},
    "linear": {"lr": Range(1e-6, 1e-1), "weight_decay": Range(1e-4, 1.0)},
    "svm": {"kernel": Choice(("linear", "rbf")), "C": Range(1e-5, 1e3)},
    "mlp": {
        "hidden": Choice((128, 256, 512, 1024)),
        "dropout": Choice((0.0, 0.2, 0.5)),
        "lr": Range(1e-4, 1e-2),
        "weight_decay": Range(1e-4, 1.0),
    },
    "ridge": {"alpha": Range(1e-2, 1e6)},
    "knn": {
        "k": Range(1, 200, whole=True),
        "metric": Choice(("cosine", "euclidean")),
        "temperature": Range(0.01, 1.0),
    },
    "prototype": {},
}
"""What random and guided searches draw from."""


def parse_param(text: str) -> tuple[str, str, Range | Choice]:
    """``"C=1e-4:1e4:30"``, ``"mlp.hidden=256,1024"`` -> head or "", parameter, values.

    ``low:high`` and ``low:high:count`` are evenly spaced in their logarithm; other values are
    separated by commas; ``256x128`` stands for two layers.

    Raises:
        UsageError: it cannot be read.
    """
    name, equals, values = text.partition("=")
    head, dot, param = name.strip().rpartition(".")
    if not equals or not param or not values.strip() or (dot and not head):
        raise UsageError(
            f"--param {text!r} is not of the form NAME=VALUES.\n"
            "  For example:  --param C=1e-4:1e4:30   --param mlp.hidden=256,1024"
        )
    if ":" in values:
        return head, param, _range(text, values.split(":"))
    options = tuple(_value(part.strip()) for part in values.split(",") if part.strip())
    return head, param, Choice(options)


def _range(text: str, parts: Sequence[str]) -> Range:
    try:
        low, high = float(parts[0]), float(parts[1])
        count = int(parts[2]) if len(parts) > 2 else _DEFAULT_COUNT
    except ValueError:
        low = high = count = 0
    if len(parts) > 3 or not 0 < low < high < math.inf or count < 2:
        raise UsageError(
            f"--param {text!r}: expected LOW:HIGH or LOW:HIGH:COUNT, with 0 < LOW < HIGH and "
            "2 values or more."
        )
    whole = all("." not in part and "e" not in part.lower() for part in parts[:2])
    return Range(low, high, count, whole)


def _value(text: str) -> Any:
    """A number, a truth, None, layers of a network, or a word."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    widths = text.split("x")
    if len(widths) > 1 and all(width.isdecimal() for width in widths):
        return tuple(int(width) for width in widths)
    return text


def params_of(
    heads: Sequence[str], params: Sequence[tuple[str, str, Range | Choice]]
) -> dict[str, Space]:
    """Parameters by head: those with no head go to every head that has them.

    Raises:
        UsageError: no head has such a parameter.
    """
    found: dict[str, Space] = {head: {} for head in heads}
    for head, param, values in params:
        if head and head not in heads:
            raise UnknownNameError("head of a parameter", head, heads)
        takers = [
            name
            for name in ([head] if head else heads)
            if param in head_class(name).parameter_names()
        ]
        if not takers:
            known = sorted({p for name in heads for p in head_class(name).parameter_names()})
            raise UnknownNameError(f"parameter of {' and '.join(heads)}", param, known)
        for name in takers:
            # A scale such as lr=1:10 has whole ends, but takes what lies between them.
            if isinstance(values, Range) and values.whole:
                default = _default_of(name, param)
                is_whole = isinstance(default, int) and not isinstance(default, bool)
                found[name][param] = Range(values.low, values.high, values.count, is_whole)
            else:
                found[name][param] = values
    return found


def _default_of(head: str, param: str) -> Any:
    return head_class(head)().get_params()[param]


def with_params(settings: Sequence[Setting], params: Mapping[str, Range | Choice]) -> list[Setting]:
    """A grid in which some parameters take other values, each with each."""
    grid: list[Setting] = []
    for setting in settings:
        rest = {name: value for name, value in setting.items() if name not in params}
        if rest not in grid:
            grid.append(rest)
    for name, values in params.items():
        grid = [{**setting, name: value} for setting in grid for value in values.values()]
    return grid


def space_of(head: str, params: Mapping[str, Range | Choice]) -> Space:
    """What to draw from: the head's own space, some parameters replaced."""
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    return {**SPACES[head], **params}


def grid_of(head: str, name: str, params: Mapping[str, Range | Choice]) -> list[Setting]:
    """The settings of a named grid, some parameters replaced.

    Args:
        head: a key of ``pipeline.heads.HEADS``.
        name: a key of :data:`GRIDS`.
        params: values that take the place of the grid's.

    Raises:
        UnknownNameError: there is no such head or grid.
    """
    if head not in HEADS:
        raise UnknownNameError("head", head, HEADS)
    if name not in GRIDS:
        raise UnknownNameError("grid", name, GRIDS)
    return with_params(GRIDS[name].get(head) or GRIDS["default"][head], params)


def check_settings(head: str, settings: Sequence[Setting]) -> None:
    """Refuse a grid of which nothing can be fitted; a part that cannot fails by itself.

    Raises:
        UsageError: every setting has a parameter that is out of its range or of another kind.
    """
    reasons = []
    for setting in settings:
        try:
            head_class(head)(**setting).check_params()
        except (TypeError, ValueError) as error:
            reasons.append(str(error))
        else:
            return
    raise UsageError(f"Head {head!r} cannot be fitted with these parameters: {reasons[0]}.")
