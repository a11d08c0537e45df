"""Counts, sums and Gram matrices of stored rows, from one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dsyrk, ssyrk
from scipy.sparse import csr_array

from pipeline.heads.scaling import Scaler
from pipeline.heads.streaming.rows import StoredRows

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """Labelled samples, parted.

    Attributes:
        codes: (n_samples,) class codes.
        numbers: (n_samples,) the part of each; -1 for samples that nothing is fitted on.
        n_parts: how many there are. Part 0 is in every fit; each other one is left out of one.
        n_classes: codes of the parts are below it.
    """

    codes: NDArray[np.int64]
    numbers: NDArray[np.int8]
    n_parts: int
    n_classes: int

    def counts(self) -> Floats:
        """Samples (n_parts, n_classes)."""
        used = self.numbers >= 0
        flat = self.numbers[used].astype(np.int64) * self.n_classes + self.codes[used]
        counts = np.bincount(flat, minlength=self.n_parts * self.n_classes)
        return counts.reshape(self.n_parts, self.n_classes).astype(np.float64)

    def weights(self, left_out: int, class_weight: Any) -> Floats:
        """Weight (n_parts, n_classes) of each sample in the fit without a part; 0 is no part."""
        counts = self.counts()
        if left_out:
            counts[left_out] = 0
        totals = counts.sum(axis=0)
        by_class = np.ones(self.n_classes)
        if isinstance(class_weight, dict):
            by_class = np.array([class_weight.get(k, 1.0) for k in range(self.n_classes)])
        elif class_weight is not None:
            by_class = totals.sum() / (np.count_nonzero(totals) * np.maximum(totals, 1))
        weights = np.where(totals > 0, by_class, 0.0)[None].repeat(self.n_parts, axis=0)
        if left_out:
            weights[left_out] = 0
        return weights

    def by_sample(self, weights: Floats) -> Floats:
        """Weight (n_samples,) of each sample; 0 for those of no part, whose class may be unknown.

        Args:
            weights: (n_parts, n_classes).
        """
        found, used = np.zeros(len(self.codes)), self.numbers >= 0
        found[used] = weights[self.numbers[used], self.codes[used]]
        return found


@dataclass(frozen=True)
class Moments:
    """Sums over rows x - shift.

    Attributes:
        shift: (n_features,), near the mean, so that no variance drowns in a large one.
        counts: (n_parts, n_classes).
        sums: (n_parts, n_classes, n_features).
        squares: (n_parts, n_features).
        grams: (n_features, n_features) each, upper triangle, Σ w x xᵀ; one a table of weights.
    """

    shift: Floats
    counts: Floats
    sums: Floats
    squares: Floats
    grams: list[Array]

    @classmethod
    def empty(cls, shift: Floats, n_classes: int) -> Moments:
        """Of no samples yet, in one part with one Gram matrix."""
        d = len(shift)
        gram = np.zeros((d, d), order="F")
        return cls(shift, np.zeros((1, n_classes)), np.zeros((1, n_classes, d)),
                   np.zeros((1, d)), [gram])  # fmt: skip

    def add(self, X: Array, codes: NDArray[np.intp], weights: Floats) -> None:
        """Add samples X (n, n_features) of classes (n,), as often as their weights (n,) say."""
        rows = X.astype(np.float64) - self.shift
        weighted = rows * weights[:, None]
        n_classes = self.counts.shape[1]
        self.counts[0] += np.bincount(codes, weights, minlength=n_classes)
        self.sums[0] += class_sums(weighted, codes.astype(np.int64), n_classes)
        self.squares[0] += np.einsum("ij,ij->j", weighted, rows)
        rows *= np.sqrt(weights)[:, None]
        dsyrk(1.0, rows.T, beta=1.0, c=self.grams[0], overwrite_c=True)

    def scaler(self, kind: str, widths: tuple[int, ...], parts: list[int]) -> Scaler:
        """The scaling that some parts teach; as :func:`pipeline.heads.scaling.fit_scaler`."""
        if kind != "standardise":
            return Scaler(kind, widths)
        n = self.counts[parts].sum()
        mean = self.sums[parts].sum(axis=(0, 1)) / n
        variance = self.squares[parts].sum(axis=0) / n - np.square(mean)
        scale = np.sqrt(np.maximum(variance, 0))
        mean += self.shift
        scale[scale <= 1e-6 * np.abs(mean)] = 1.0
        scale[scale == 0] = 1.0
        return Scaler(kind, widths, mean, scale)


def gather(
    rows: StoredRows,
    parts: Parts,
    rescale: Scaler,
    weights: Floats,
    *,
    dtype: type[np.float32] | type[np.float64] = np.float64,
) -> Moments:
    """Go through all parts once.

    Args:
        rows: stored features.
        parts: classes and parts of them.
        rescale: applied to each row first; one that needs not be fitted.
        weights: (n_grams, n_parts, n_classes), ≥ 0; (0, …) for no Gram matrix.
        dtype: of the Gram matrices; all else is float64.
    """
    d = rows.n_features
    product = dsyrk if dtype is np.float64 else ssyrk
    grams = [np.zeros((d, d), dtype, order="F") for _ in weights]
    sums = np.zeros((parts.n_parts, parts.n_classes, d))
    squares = np.zeros((parts.n_parts, d))
    shift = None
    for samples, raw in rows.blocks(parts.numbers >= 0):
        X = rescale(raw).astype(np.float64)
        if shift is None:
            shift = X.mean(axis=0)
        X -= shift
        numbers, codes = parts.numbers[samples], parts.codes[samples]
        for part in range(parts.n_parts):
            mine = numbers == part
            if mine.any():
                own = X if mine.all() else X[mine]
                sums[part] += class_sums(own, codes[mine], parts.n_classes)
                squares[part] += np.einsum("ij,ij->j", own, own)
        for gram, table in zip(grams, weights, strict=True):
            weight = table[numbers, codes]
            kept = weight > 0
            if not kept.any():
                continue
            weighted = X if kept.all() else X[kept]
            if not (weight[kept] == 1).all():
                weighted = weighted * np.sqrt(weight[kept])[:, None]
            weighted = weighted.astype(dtype, copy=False)
            product(1.0, weighted.T, beta=1.0, c=gram, overwrite_c=True)
    if shift is None:
        shift = np.zeros(d)
    return Moments(shift, parts.counts(), sums, squares, grams)


def class_sums(X: Array, codes: NDArray[np.int64], n_classes: int) -> Floats:
    """Sums (n_classes, n_features) of the rows of each class, in float64."""
    picked = csr_array((np.ones(len(X)), (codes, np.arange(len(X)))), shape=(n_classes, len(X)))
    sums: Floats = picked @ X
    return sums
