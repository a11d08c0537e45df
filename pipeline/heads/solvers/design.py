"""One feature matrix, prepared once for every problem that is solved on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.heads.base import Array
from pipeline.heads.solvers.targets import checked_features, checked_weights

_BLOCK_BYTES = 2**26


@dataclass(frozen=True)
class Design:
    """Features, centred and, where that pays, turned into the eigenbasis of their covariance.

    A penalty on the squared length of coefficients does not change under a rotation, and the
    intercept takes up a shift: problems solved here have the solutions of the original ones,
    in ``rank`` = min(n_samples, n_features) dimensions instead of n_features.

    Attributes:
        values: (n_samples, rank + 1), the rotated features and a last column of ones.
        basis: (n_features, rank) float64, orthonormal columns; None where they were not turned,
            and rank is n_features.
        mean: (n_features,) float64.
        eigenvalues: (rank,) float64, of the centred Gram matrix (weighted, where weights were
            given), ascending; where they were not turned, its diagonal.
    """

    values: Tensor
    basis: Tensor | None
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
        return self.values.shape[1] - 1

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
        coef = params[..., :-1]
        shift = coef.double() @ (self.mean if self.basis is None else self.mean @ self.basis)
        if self.basis is not None:
            coef = coef @ self.basis.T.to(params.dtype)
        return coef, params[..., -1].double() - shift

    def from_original(self, coef: Tensor, intercept: Tensor) -> Tensor:
        """The way back: (..., rank + 1), in the dtype of ``values``."""
        coef = coef.double()
        last = (intercept + coef @ self.mean)[..., None]
        inner = coef if self.basis is None else coef @ self.basis
        return torch.cat([inner, last], dim=-1).to(self.values.dtype)


def make_design(
    X: Array,
    *,
    sample_weight: Array | None = None,
    dtype: torch.dtype | None = None,
    turn: bool = True,
    device: str | torch.device = "cpu",
) -> Design:
    """Centre features and turn them into their eigenbasis.

    Args:
        X: (n_samples, n_features), float32 or float64.
        sample_weight: (n_samples,), ≥ 0, or None for equal ones; it decides the centre and the
            eigenbasis, and is no part of the rows.
        dtype: of the rows; that of X by default.
        turn: False to only centre them: few problems do not earn an eigendecomposition back.
        device: where problems on it are solved.

    Raises:
        ValueError: X is not a matrix with a row and a column, or not finite; weights that do
            not fit.
    """
    X = checked_features(X)
    rows = torch.from_numpy(np.require(X, requirements=["C", "W"])).to(device)
    weights = torch.ones(len(X), dtype=torch.float64)
    if sample_weight is not None:
        weights = torch.tensor(checked_weights(sample_weight, len(X)))
    weights = weights.to(rows.device)
    n_samples, n_features = X.shape
    blocks = torch.split(
        torch.arange(n_samples, device=rows.device), max(1, _BLOCK_BYTES // (8 * n_features))
    )
    mean = torch.zeros(n_features, dtype=torch.float64, device=rows.device)
    for block in blocks:
        mean += weights[block] @ rows[block].double()
    mean /= weights.sum()
    dtype = dtype or rows.dtype
    if not turn:
        values = torch.ones(n_samples, n_features + 1, dtype=dtype, device=device)
        diagonal = torch.zeros_like(mean)
        for block in blocks:
            centred = (rows[block].double() - mean).to(dtype)
            diagonal += weights[block].to(dtype) @ centred.square()
            values[block, :-1] = centred
        return Design(values, None, mean, diagonal)
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
