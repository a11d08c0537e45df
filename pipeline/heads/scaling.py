"""Scaling of features, learned on the training samples and saved with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, StoreFormatError, UnknownNameError

SCALINGS = ("standardise", "l2", "none")
_BLOCK_ROWS = 8192

Array = NDArray[Any]


def l2_normalise(X: Array) -> Array:
    """Rows of length one along the last axis; a row of zeros stays one."""
    norms = np.sqrt(np.square(X).sum(axis=-1, keepdims=True))
    result: Array = X / np.maximum(norms, np.finfo(X.dtype).tiny)
    return result


@dataclass(frozen=True)
class Scaler:
    """A fitted scaling.

    Attributes:
        kind: "standardise", "l2" or "none".
        widths: features of each block (one a store and layer), side by side; "l2" gives each
            block its own length, so that a wide or loud layer does not drown another.
        mean: (n_features,) float64, "standardise" only.
        scale: (n_features,) float64, "standardise" only; 1 for a constant feature.
    """

    kind: str
    widths: tuple[int, ...]
    mean: NDArray[np.float64] | None = None
    scale: NDArray[np.float64] | None = None

    def __call__(self, X: Array, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Scale X (n_samples, n_features), or (…, n_features), into a float32 array.

        Args:
            X: what to scale.
            out: where to write it, shaped as X; None for a new array.
        """
        result = np.empty(X.shape, np.float32) if out is None else out
        values = torch.from_numpy(result)
        if X.dtype == np.float16 and X.flags.writeable and X.flags.c_contiguous:
            values.copy_(torch.from_numpy(X))  # numpy converts halves one by one
        else:
            np.copyto(result, X, casting="same_kind")
        if self.kind == "standardise":
            assert self.mean is not None
            assert self.scale is not None
            values.sub_(torch.from_numpy(self.mean.astype(np.float32)))
            values.div_(torch.from_numpy(self.scale.astype(np.float32)))
        if self.kind == "l2":
            start = 0
            for width in self.widths:
                block = result[..., start : start + width]
                block[...] = l2_normalise(block)
                start += width
        return result

    def rows(self, X: Array, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Scale some rows of X; nothing but the result is as large as they are."""
        result = np.empty((len(rows), *X.shape[1:]), np.float32)
        for start in range(0, len(rows), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            self(X[rows[block]], out=result[block])
        return result

    def to_arrays(self) -> dict[str, Array]:
        """What was learned."""
        if self.mean is None or self.scale is None:
            return {}
        return {"mean": self.mean, "scale": self.scale}


def fit_scaler(X: Array, kind: str, widths: Sequence[int] = ()) -> Scaler:
    """Learn a scaling.

    Args:
        X: (n_samples, n_features), the training samples only.
        kind: one of :data:`SCALINGS`.
        widths: features of each block; () for one block.

    Raises:
        UnknownNameError: no scaling is called ``kind``.
    """
    widths = tuple(widths) or (X.shape[1],)
    if kind not in SCALINGS:
        raise UnknownNameError("scaling", kind, SCALINGS)
    if kind != "standardise":
        return Scaler(kind, widths)
    mean = X.mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for start in range(0, len(X), _BLOCK_ROWS):
        squares += np.square(X[start : start + _BLOCK_ROWS] - mean).sum(axis=0)
    scale = np.sqrt(squares / len(X))
    # What is left of a constant feature is rounding, and must not be blown up to unit variance.
    scale[scale <= 1e-6 * np.abs(mean)] = 1.0
    scale[scale == 0] = 1.0
    return Scaler(kind, widths, mean, scale)


def scaler_from_arrays(kind: str, widths: Sequence[int], arrays: Mapping[str, Array]) -> Scaler:
    """Rebuild a saved scaling.

    Raises:
        StoreFormatError: a kind of scaling that this release does not know.
        CorruptStoreError: arrays that do not fit.
    """
    if kind not in SCALINGS:
        raise StoreFormatError(
            f"The model scales its features by {kind!r}; known: {', '.join(SCALINGS)}."
        )
    if kind != "standardise":
        return Scaler(kind, tuple(widths))
    n_features = sum(widths)
    for name in ("mean", "scale"):
        array = arrays.get(name)
        if array is None or array.shape != (n_features,) or array.dtype.kind != "f":
            found = "nothing" if array is None else f"{array.dtype} of shape {array.shape}"
            raise CorruptStoreError(
                f"Array {name!r} of the model's scaling holds {found}, "
                f"expected {n_features} float numbers."
            )
        if not np.isfinite(array).all():
            raise CorruptStoreError(f"Array {name!r} of the model's scaling is not finite.")
    if not (arrays["scale"] > 0).all():
        raise CorruptStoreError("Array 'scale' of the model's scaling is not above zero.")
    return Scaler(kind, tuple(widths), arrays["mean"], arrays["scale"])
