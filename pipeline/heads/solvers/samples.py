"""Samples with weights, as the gradient solvers take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DataError

Array = NDArray[Any]


@dataclass
class Samples:
    """x (n, n_features) or (n, n_views, n_features); y (n,); weights (1 or n_members, n)."""

    x: Tensor
    y: Tensor
    weights: NDArray[np.float64]

    @classmethod
    def check(
        cls,
        name: str,
        X: Array | Tensor,
        y: Array,
        weights: Array | None,
        n_members: int,
        n_classes: int,
    ) -> Samples:
        """Samples that fit together, or DataError."""
        x = as_float32(X)
        labels = np.asarray(y)
        if x.ndim not in (2, 3) or not len(x) or labels.shape != (len(x),):
            raise DataError(
                f"{name} has shape {tuple(x.shape)} and its labels {labels.shape}, expected "
                "(n_samples, n_features) or (n_samples, n_views, n_features), and (n_samples,)."
            )
        check_finite(name, x)
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= n_classes:
            raise DataError(
                f"The labels of {name} are {labels.dtype} from {labels.min()} to {labels.max()}, "
                f"expected class indices from 0 to {n_classes - 1}."
            )
        table = np.atleast_2d(np.asarray(np.ones(len(x)) if weights is None else weights, float))
        if table.shape not in {(1, len(x)), (n_members, len(x))} or not (table >= 0).all():
            raise DataError(
                f"The weights of {name} have shape {table.shape}, expected ({len(x)},) or "
                f"({n_members}, {len(x)}), none negative or NaN."
            )
        return cls(x, torch.tensor(labels.astype(np.int64)), table)

    def weights_of(self, members: NDArray[np.intp], device: torch.device) -> Tensor:
        """(1 or n_members, n), float32."""
        table = self.weights if len(self.weights) == 1 else self.weights[members]
        return torch.tensor(table, dtype=torch.float32, device=device)


def as_float32(X: Array | Tensor) -> Tensor:
    """float32; a copy only where it is another type, or must not be written to."""
    if isinstance(X, Tensor):
        return X.detach().to(torch.float32)
    return torch.from_numpy(np.require(X, dtype=np.float32, requirements=["C", "W"]))


def check_finite(name: str, x: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        DataError: how many rows have one, and the first of them.
    """
    # A sum is finite only if all its terms are; it needs no table of the size of x.
    sums = x.flatten(1).sum(dim=1, dtype=torch.float64)
    bad = (~torch.isfinite(sums)).nonzero().flatten()
    if len(bad):
        raise DataError(
            f"{len(bad):,} of {len(x):,} rows of {name} hold NaN or infinity (the first is row "
            f"{int(bad[0])}), expected finite features. Look for damage with: tlpipe verify STORE"
        )


def class_factors(class_weight: Array, y: Tensor, n_classes: int) -> NDArray[np.float64]:
    """The weight of each sample's class (n,), or DataError."""
    factors = np.asarray(class_weight, dtype=np.float64)
    if factors.shape != (n_classes,) or not (factors >= 0).all():
        raise DataError(
            f"class_weight has shape {factors.shape}, expected ({n_classes},), none negative or "
            "NaN."
        )
    result: NDArray[np.float64] = factors[y.numpy()]
    return result


def mean_one(weights: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Rows of weights scaled to a mean of one, or DataError where one is all zero."""
    means = weights.mean(axis=1, keepdims=True)
    if not (means > 0).all() or not np.isfinite(means).all():
        raise DataError(
            f"The weights of {name} are all zero for member {int((~(means > 0)).argmax())}: "
            "it has no sample left."
        )
    result: NDArray[np.float64] = weights / means
    return result


def columns_of(x: Tensor, columns: tuple[tuple[int, int], ...]) -> Tensor:
    """The ranges of the last axis, side by side; all of it for ()."""
    if not columns:
        return x
    parts = [x[..., start:stop] for start, stop in columns]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=-1)
