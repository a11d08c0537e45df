"""Ridge regression from the moments of stored rows: exact, and every fold from one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from pipeline.heads.scaling import Scaler
from pipeline.heads.streaming.moments import Moments

Floats = NDArray[np.float64]


def solve_ridge(
    moments: Moments,
    grams: Sequence[int],
    weights: Floats,
    scaler: Scaler,
    alphas: Sequence[float],
) -> list[tuple[Floats, Floats]]:
    """What :func:`pipeline.heads.solvers.ridge.fit_ridge` finds, from sums over the rows.

    Args:
        moments: of the rows as they are before ``scaler`` standardises them.
        grams: those of ``moments.grams`` whose sum is the fit's.
        weights: (n_parts, n_classes), of the fit.
        scaler: of the fit; its "l2" is in the moments already.
        alphas: penalties.

    Returns:
        For each penalty coefficients (n_outputs, n_features) and intercepts (n_outputs,), for the
        scaled features.
    """
    known = np.flatnonzero((weights * moments.counts).sum(axis=0))
    counts = (weights * moments.counts).sum(axis=0)[known]
    sums = np.einsum("pk,pkd->kd", weights, moments.sums)[known]
    total = counts.sum()
    mean = sums.sum(axis=0) / total
    scale, centre = np.ones_like(mean), moments.shift + mean
    if scaler.mean is not None and scaler.scale is not None:
        scale, centre = scaler.scale, (centre - scaler.mean) / scaler.scale
    slopes = 2 * (sums - counts[:, None] * mean) / scale
    targets = 2 * counts / total - 1
    if len(known) == 2:
        slopes, targets = slopes[1:], targets[1:]
    gram = moments.grams[grams[0]].copy(order="F")
    for i in grams[1:]:
        gram += moments.grams[i]
    for i in range(len(mean)):  # column by column: no second matrix
        gram[:, i] -= total * mean[i] * mean
        gram[:, i] /= scale[i] * scale
    found = []
    work = np.empty_like(gram)
    for alpha in alphas:
        np.copyto(work, gram)
        work[np.diag_indices_from(work)] += alpha
        coef = _solve(work, slopes.T).T
        found.append((coef, targets - coef @ centre))
    return found


def _solve(matrix: Floats, right: Floats) -> Floats:
    """matrix⁻¹ right; the upper triangle is used, and overwritten.

    Raises:
        ArithmeticError: rounding has made the matrix indefinite.
    """
    try:
        factor = cho_factor(matrix, lower=False, overwrite_a=True, check_finite=False)
    except LinAlgError as error:
        raise ArithmeticError(
            "the penalty drowns in the rounding of these features: try a larger alpha"
        ) from error
    solved: Floats = cho_solve(factor, right)
    return solved
