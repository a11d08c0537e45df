"""One feature matrix, prepared once for every problem that is solved on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.heads.base import Array

_BLOCK_BYTES = 2**26


@dataclass(frozen=True)
class Design:
    """Features, centred and turned into the eigenbasis of their covariance.

    A penalty on the squared length of coefficients does not change under a rotation, and the
    intercept takes up a shift: problems solved here have the solutions of the original ones,
    in ``rank`` = min(n_samples, n_features) dimensions instead of n_features.

    Attributes:
        values: (n_samples, rank + 1), the rotated features and a last column of ones.
        basis: (n_features, rank) float64, orthonormal columns.
        mean: (n_features,) float64.
        eigenvalues: (rank,) float64, of the centred Gram matrix (weighted, where weights were
            given), ascending.
    """

    values: Tensor
    basis: Tensor
    mean: Tensor
    eigenvalues: Tensor
    _half: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def n_samples(self) -> int:
        """Rows."""
        return self.values.shape[0]

    @property
    def rank(self) -> int:
        """Dimensions that the features span."""
        return self.basis.shape[1]

    def half(self) -> Tensor:
        """``values`` in bfloat16, made once; rounding is relative to each axis of the basis."""
        if not self._half:
            self._half.append(self.values.to(torch.bfloat16))
        return self._half[0]

    def to_original(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients and intercepts for the features as they were given.

        Args:
            params: (..., rank + 1).

        Returns:
            (..., n_features) in the dtype of ``params``, and (...) float64.
        """
        coef = params[..., :-1] @ self.basis.T.to(params.dtype)
        shift = params[..., :-1].double() @ (self.mean @ self.basis)
        return coef, params[..., -1].double() - shift

    def from_original(self, coef: Tensor, intercept: Tensor) -> Tensor:
        """The way back: (..., rank + 1), in the dtype of ``values``."""
        coef = coef.double()
        last = (intercept + coef @ self.mean)[..., None]
        return torch.cat([coef @ self.basis, last], dim=-1).to(self.values.dtype)


def make_design(
    X: Array,
    *,
    sample_weight: Array | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Design:
    """Centre and rotate features.

    Args:
        X: (n_samples, n_features), float32 or float64.
        sample_weight: (n_samples,), ≥ 0, or None for equal ones; it decides the centre and the
            eigenbasis, and is no part of the rows.
        dtype: of the rows; that of X by default.
        device: where problems on it are solved.

    Raises:
        ValueError: X is not a matrix with a row and a column, or not finite; weights that do
            not fit.
    """
    X = np.asarray(X)
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X has shape {X.shape}, expected (n_samples, n_features), both above 0")
    if X.dtype not in (np.float32, np.float64):
        X = X.astype(np.float64)
    if not np.isfinite(X).all():
        n_bad = int((~np.isfinite(X)).sum())
        raise ValueError(f"X holds NaN or infinity in {n_bad:,} places, expected finite numbers")
    rows = torch.from_numpy(np.require(X, requirements=["C", "W"])).to(device)
    weights = _checked_weights(sample_weight, len(X), rows.device)
    n_samples, n_features = X.shape
    blocks = torch.split(
        torch.arange(n_samples, device=rows.device), max(1, _BLOCK_BYTES // (8 * n_features))
    )
    mean = torch.zeros(n_features, dtype=torch.float64, device=rows.device)
    for block in blocks:
        mean += weights[block] @ rows[block].double()
    mean /= weights.sum()
    dtype = dtype or rows.dtype
    eigenvalues, basis = _eigenbasis(rows, mean, weights, list(blocks), dtype)
    values = torch.ones(n_samples, basis.shape[1] + 1, dtype=dtype, device=device)
    for block in blocks:
        values[block, :-1] = ((rows[block].double() - mean) @ basis).to(values.dtype)
    return Design(values, basis, mean, eigenvalues)


def _eigenbasis(
    rows: Tensor, mean: Tensor, weights: Tensor, blocks: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (rank,) and eigenvectors (n_features, rank) of the centred Gram matrix.

    With fewer samples than features, all that is outside their span is dropped.
    """
    n_samples, n_features = rows.shape
    if n_samples > n_features:
        gram = torch.zeros(n_features, n_features, dtype=torch.float64, device=rows.device)
        for block in blocks:
            # Any orthonormal basis will do; in float32 it only follows the axes less closely.
            centred = (rows[block].double() - mean).to(dtype)
            gram += ((centred * weights[block, None].to(dtype)).T @ centred).double()
        eigenvalues, basis = torch.linalg.eigh(gram)
        return eigenvalues.clamp(min=0), basis
    # Rows of weight zero count too: another fold may give them a weight.
    span, scores = torch.linalg.qr((rows.double() - mean).T)
    eigenvalues, turn = torch.linalg.eigh((scores * weights) @ scores.T)
    return eigenvalues.clamp(min=0), span @ turn


def _checked_weights(sample_weight: Any, n_samples: int, device: torch.device) -> Tensor:
    """(n_samples,) float64; ones where none were given."""
    if sample_weight is None:
        return torch.ones(n_samples, dtype=torch.float64, device=device)
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (n_samples,):
        raise ValueError(f"sample_weight has shape {weights.shape}, expected ({n_samples},)")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError("sample_weight must be finite, not negative, and not all zero")
    return torch.tensor(weights, device=device)
