"""Which heads can be fitted by passes over stored rows, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.heads import head_class
from pipeline.heads.base import Head, solver_device
from pipeline.heads.folds import FIT_ERRORS
from pipeline.heads.scaling import Scaler, l2_normalise
from pipeline.heads.streaming.moments import Moments, Parts, gather
from pipeline.heads.streaming.newton import Basis, LinearProblem, solve_linear
from pipeline.heads.streaming.ridge import solve_ridge
from pipeline.heads.streaming.rows import StoredRows

Setting = Mapping[str, Any]
Floats = NDArray[np.float64]

_VECTORS = 12
"""Copies of its parameters that a problem of Newton steps holds at most."""


@dataclass(frozen=True)
class Fitted:
    """A head for one setting and one way to leave a part out.

    Attributes:
        setting: place among the settings.
        left_out: the part that it has not seen; 0 where it has seen all.
        head: fitted; None where that failed.
        failure: why.
    """

    setting: int
    left_out: int
    head: Head | None = None
    failure: str = ""


@dataclass
class StreamedFit:
    """Heads of one kind on stored rows.

    Args:
        name: of the head.
        rows: stored features.
        parts: classes and parts of them.
        kind: of scaling.
        widths: features of each layer.
        room_bytes: what a fit may hold at a time, beyond the blocks.
    """

    name: str
    rows: StoredRows
    parts: Parts
    kind: str
    widths: tuple[int, ...]
    room_bytes: float

    def __post_init__(self) -> None:
        # Rows of length one can be had a block at a time; means and variances have to be learned.
        self._plain = Scaler("none" if self.kind == "standardise" else self.kind, self.widths)
        self._moments: Moments | None = None
        self._bases: dict[bytes, Basis] = {}

    def learn(self, settings: Sequence[Setting]) -> None:
        """The first pass: what the scaling, and closed forms, are made of."""
        tables, dtype = self._gram_weights(settings)
        self._moments = gather(self.rows, self.parts, self._plain, tables, dtype=dtype)

    @property
    def moments(self) -> Moments:
        """Of the first pass."""
        assert self._moments is not None
        return self._moments

    def scaler(self, parts: Sequence[int]) -> Scaler:
        """The scaling that some parts teach."""
        return self.moments.scaler(self.kind, self.widths, list(parts))
