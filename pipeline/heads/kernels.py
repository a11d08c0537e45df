"""RBF kernels, machines that sum over them, and landmarks for more rows than a kernel can hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC

from pipeline.heads.base import Array, linear_logits, solver_device

Floats = NDArray[np.float64]

_BLOCK_NUMBERS = 2**22
_CACHE_MB = 500
_FLOOR = 1e-6
_DECISION_ERROR = 1e-4


@dataclass(frozen=True)
class KernelMachine:
    """Scores that are weighted sums of kernel values: libsvm's, or linear ones on landmarks.

    Attributes:
        rows: (n_vectors,), which samples the kernel values are taken with; libsvm groups them by
            class.
        dual_coef: (n_classes - 1, n_vectors) as libsvm orders them: a vector of class i has its
            coefficient against class j in row j - 1 if j > i, else in row j. On landmarks
            (n_outputs, n_vectors).
        intercept: one a pair of classes; on landmarks one an output.
        n_support: (n_classes,), vectors of each class; on landmarks (0,).
        n_iter: iterations of the solver, of the pair that took the most.
        converged: whether its tolerance was met.
    """

    rows: NDArray[np.intp]
    dual_coef: Floats
    intercept: Floats
    n_support: NDArray[np.int64]
    n_iter: int
    converged: bool

    def logits(self, kernel: Array) -> Array:
        """Scores (n_samples, n_classes) from kernel values (n_samples, n_vectors)."""
        return machine_logits(kernel, self.dual_coef, self.intercept, self.n_support)


# Kernels


def scale_gamma(X: Array, weights: Floats) -> float:
    """1 / (n_features · variance over all entries), a sample counting as its weight says."""
    share = weights / weights.sum()
    mean = square = 0.0
    for block in _row_blocks(len(X), X.shape[1]):
        rows = X[block].astype(np.float64)
        mean += float(share[block] @ rows.mean(axis=1))
        square += float(share[block] @ np.square(rows).mean(axis=1))
    variance = square - mean**2
    return 1.0 / (X.shape[1] * variance) if variance > 0 else 1.0


def squared_distances(rows: Array, columns: Array) -> Array:
    """‖row - column‖²: (n_rows, n_columns), in the dtype of ``columns``, of which there is one.

    Products are made of features less their mean: distances stay what they are, and lose fewer
    digits.
    """
    mean = columns.mean(axis=0, dtype=np.float64).astype(columns.dtype)
    centred = columns - mean
    squares = np.square(centred).sum(axis=1)
    distances = np.empty((len(rows), len(columns)), columns.dtype)
    for block in _row_blocks(len(rows), len(columns)):
        part, out = rows[block].astype(columns.dtype) - mean, distances[block]
        np.matmul(part, centred.T, out=out)
        out *= -2
        out += np.square(part).sum(axis=1)[:, None]
        out += squares
        np.maximum(out, 0, out=out)
    return distances


def rbf_of(distances: Array, gamma: float) -> Floats:
    """exp(-gamma · distance), in float64 as libsvm wants it; of float32, to its accuracy."""
    scaled = distances * distances.dtype.type(-gamma)
    return np.asarray(np.exp(scaled, out=scaled), dtype=np.float64)


def rbf_kernel(rows: Array, columns: Array, gamma: float) -> Array:
    """exp(-gamma ‖row - column‖²): (n_rows, n_columns), in the dtype of ``columns``.

    float32 leaves an error of about 1e-7 · (1 + gamma ‖x‖²).
    """
    kernel = squared_distances(rows, columns)
    kernel *= kernel.dtype.type(-gamma)
    return np.exp(kernel, out=kernel)


def _row_blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    n_at_once = max(1, _BLOCK_NUMBERS // max(1, n_columns))
    return (slice(start, start + n_at_once) for start in range(0, n_rows, n_at_once))


# Machines


def fit_libsvm(
    kernel: Floats, index: Array, C: float, weights: Floats, tol: float
) -> KernelMachine:
    """Support vectors, one-vs-one, on a kernel that is there already.

    Args:
        kernel: (n_samples, n_samples) float64.
        index: (n_samples,), class indices, each below the largest with a sample.
        C: inverse strength of the penalty on the summed hinge losses.
        weights: (n_samples,), above 0, of the losses.
        tol: of libsvm.

    Raises:
        ValueError: a kernel that is not finite, or coefficients that are not.
    """
    solver = SVC(kernel="precomputed", C=C, tol=tol, cache_size=_CACHE_MB)
    solver.fit(kernel, index, sample_weight=weights)
    return KernelMachine(
        np.asarray(solver.support_, dtype=np.intp),
        np.asarray(solver.dual_coef_),
        np.asarray(solver.intercept_),
        np.asarray(solver.n_support_, dtype=np.int64),
        int(np.max(solver.n_iter_)),
        solver.fit_status_ == 0,
    )


def fit_nystroem(
    X: Array,
    index: Array,
    C: Sequence[float],
    weights: Floats,
    *,
    gamma: float,
    n_components: int,
    seed: int,
    tol: float,
    max_iter: int,
    device: str,
) -> list[KernelMachine]:
    """A squared hinge, one-vs-rest, on features whose products are nearly the kernel.

    Kernel values with some of the samples, the landmarks, are turned by K⁻½ of the landmarks among
    themselves (Williams and Seeger, NIPS 2000); eigenvalues are floored at 1e-6 of the largest,
    below which rounding would speak. The turn is multiplied into the coefficients afterwards.

    Args:
        X: (n_samples, n_features).
        index: (n_samples,), class indices.
        C: inverse strengths of the penalty, solved together.
        weights: (n_samples,), above 0; a landmark is drawn as often as its weight says.
        gamma: width of the kernel.
        n_components: landmarks; fewer where there are fewer distinct samples.
        seed: of the draw.
        tol, max_iter, device: see :func:`~pipeline.heads.solvers.linear.fit_svm`.

    Returns:
        A machine for each C.
    """
    # torch is slow to load, and exact kernels do without.
    from pipeline.heads.solvers.linear import fit_svm

    rows = _landmarks(X, weights, n_components, seed)
    among = rbf_kernel(X[rows].astype(np.float64), X[rows].astype(np.float64), gamma)
    values, turn = np.linalg.eigh(among)
    turn /= np.sqrt(np.maximum(values, _FLOOR * values[-1]))
    features = np.empty((len(X), len(rows)), X.dtype)
    for block in _row_blocks(len(X), len(rows)):
        features[block] = rbf_kernel(X[block], X[rows], gamma) @ turn.astype(X.dtype)
    found = fit_svm(
        features, index, np.array(C), sample_weight=weights[None],
        tol=tol, max_iter=max_iter, device=solver_device(device),
    )  # fmt: skip
    return [
        KernelMachine(
            rows,
            found.coef[0, i].astype(np.float64) @ turn.T,
            found.intercept[0, i],
            np.zeros(0, dtype=np.int64),
            int(found.n_iter[0, i]),
            bool(found.converged[0, i]),
        )
        for i in range(len(C))
    ]


def _landmarks(X: Array, weights: Floats, n_components: int, seed: int) -> NDArray[np.intp]:
    """Distinct rows, in an order that does not depend on how often they are there."""
    rows = np.arange(len(X))
    if n_components < len(X):
        share = weights / weights.sum()
        rows = np.random.default_rng(seed).choice(len(X), n_components, replace=False, p=share)
    return rows[np.unique(X[rows], axis=0, return_index=True)[1]]


# Scores


def kernel_logits(
    X: Array, vectors: Array, gamma: float, dual_coef: Array, intercept: Array, n_support: Array
) -> Array:
    """Scores (n_samples, n_classes) of features, block by block.

    Products are in float32 where both sides are and an estimate says that it moves no decision of
    two classes by more than 1e-4; else in float64.

    Args:
        X: (n_samples, n_features).
        vectors: (n_vectors, n_features).
        gamma: width of the kernel.
        dual_coef, intercept, n_support: see :class:`KernelMachine`.
    """
    if X.dtype != np.float32 or not _bears_float32(vectors, gamma, dual_coef):
        vectors = vectors.astype(np.float64)
    logits = [
        machine_logits(rbf_kernel(X[block], vectors, gamma), dual_coef, intercept, n_support)
        for block in _row_blocks(len(X), len(vectors))
    ]
    return np.concatenate(logits)


def _bears_float32(vectors: Array, gamma: float, dual_coef: Array) -> bool:
    if vectors.dtype != np.float32:
        return False
    squares = np.square(vectors - vectors.mean(axis=0)).sum(axis=1, dtype=np.float64)
    of_kernel = np.finfo(np.float32).eps * (1 + gamma * squares.max(initial=0))
    # Rounding errors are independent: they add up as squares. A pair takes from two rows at most.
    # The largest error of some thousand decisions was measured at 1.1 to 1.4 times that.
    of_decision = 1.5 * of_kernel * np.sqrt(2 * np.square(dual_coef).sum(axis=1).max())
    return bool(of_decision <= _DECISION_ERROR)


def machine_logits(kernel: Array, dual_coef: Array, intercept: Array, n_support: Array) -> Array:
    """Scores (n_samples, n_classes) from kernel values (n_samples, n_vectors).

    See :class:`KernelMachine` for the rest.
    """
    dual_coef, intercept = dual_coef.astype(kernel.dtype), intercept.astype(kernel.dtype)
    if len(n_support) < 3:
        return linear_logits(kernel, dual_coef, intercept)
    against = _against_classes(dual_coef, n_support)
    scores = [
        _votes(_pairwise(kernel[block], against, n_support), intercept)
        for block in _row_blocks(len(kernel), 8 * len(n_support) ** 2)
    ]
    return np.concatenate(scores)


def _against_classes(dual_coef: Array, n_support: Array) -> Array:
    """Coefficient of each vector against each class: (n_vectors, n_classes), 0 for its own."""
    n_vectors, n_classes = dual_coef.shape[1], len(n_support)
    owner = np.repeat(np.arange(n_classes), n_support)
    row = np.arange(n_classes - 1)[:, None]
    against = np.zeros((n_vectors, n_classes), dual_coef.dtype)
    against[np.arange(n_vectors), row + (owner <= row)] = dual_coef
    return against


def _pairwise(kernel: Array, against: Array, n_support: Array) -> Array:
    """What the vectors of class i add to its decision against j: (n_samples, n_classes, n_classes).

    One product a class, not a pair.
    """
    n_classes, ends = len(n_support), np.cumsum(n_support)
    parts = np.empty((len(kernel), n_classes, n_classes), kernel.dtype)
    for i, (n, end) in enumerate(zip(n_support, ends, strict=True)):
        own = slice(end - n, end)
        parts[:, i] = kernel[:, own] @ against[own]
    return parts


def _votes(parts: Array, intercept: Array) -> Array:
    """Votes of the pairs, and within equal votes their confidence, squeezed below a vote.

    That is scikit-learn's shape "ovr" of one-vs-one decisions; a decision is for the first class of
    its pair where it is 0 or above.
    """
    n_classes = parts.shape[1]
    upper = np.triu(np.ones((n_classes, n_classes), dtype=bool), k=1)
    bias = np.zeros((n_classes, n_classes), parts.dtype)
    bias[upper] = intercept
    decisions = parts + parts.transpose(0, 2, 1)
    decisions += bias + bias.T
    for_row = np.where(upper, decisions, -decisions)
    for_row[:, np.arange(n_classes), np.arange(n_classes)] = 0
    votes = np.where(upper, for_row >= 0, for_row > 0).sum(axis=2)
    confidence = for_row.sum(axis=2)
    result: Array = votes + confidence / (3 * (np.abs(confidence) + 1))
    return result
