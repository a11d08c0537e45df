"""How much memory a fit takes that holds all features at once.

Each head is counted in the arrays that its solver holds at the same time. Where that depends on
the data, such as how many rows an anchor of Newton's steps keeps, it is counted at its largest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log, prod
from typing import Any

from pipeline.heads import head_class
from pipeline.heads.folds import FIT_ERRORS

Setting = Mapping[str, Any]

_BLOCK = 2**26
_EIGH = 6  # matrices that an eigendecomposition holds
_STATES = 7  # of a network's parameters: theirs, gradients, two moments, best ones, two copies
_SCORES = 12  # tables of scores that Newton's steps hold
_FACTOR_BYTES = 2.0**30  # as in solvers.path
_BATCH_BYTES = 2**25  # of one such table, where one problem needs less
_KERNELS_BYTES = 2**30  # kernels that are made at a time
_CACHE_BYTES = 500e6  # of libsvm
_SEARCH_NUMBERS = 2**22  # float64, of candidates that are measured again
_SCALER_ROWS = 8192
_SEARCH_ROWS = 8192
_SEARCH_QUERIES = 512


@dataclass(frozen=True)
class FitSize:
    """What a fit is made of.

    Attributes:
        n_samples: all that are read.
        n_fitted: samples of train and val.
        n_chosen: samples that choose, of all folds.
        n_test: samples of test.
        n_features: columns.
        n_classes: of them.
        n_folds: of the selection.
        n_fold: samples that the smallest fold fits on; ``n_fitted`` without folds.
        n_pair: samples of the two largest classes.
        n_views: of each sample that is learned from; the plain one is also held alone.
    """

    n_samples: int
    n_fitted: int
    n_chosen: int
    n_test: int
    n_features: int
    n_classes: int
    n_folds: int
    n_fold: int
    n_pair: int
    n_views: int = 1

    @property
    def raw_bytes(self) -> float:
        """All samples as they were read, in float32."""
        held = self.n_views + (self.n_views > 1)
        return 4.0 * self.n_samples * held * self.n_features

    @property
    def matrix_bytes(self) -> float:
        """One copy in float32 of the samples that are fitted on."""
        return 4.0 * self.n_fitted * self.n_views * self.n_features

    @property
    def scaler_bytes(self) -> float:
        """A block of features, and its squares, in float64: means and variances are learned so."""
        return 16.0 * min(_SCALER_ROWS, self.n_fitted) * self.n_features


def held_bytes(name: str, settings: Sequence[Setting], size: FitSize) -> float:
    """The most that a selection, the fit after it and its scores hold, features included.

    Args:
        name: of a head.
        settings: that will be tried; those that ``check_params`` refuses take nothing.
        size: of the data.
    """
    heads = [head for head in (_made(name, setting) for setting in settings) if head is not None]
    table = 8.0 * size.n_classes
    # Each setting's scores of every fold, and the probabilities of two of them.
    scores = table * size.n_chosen * (len(heads) * (size.n_folds > 1) + 6)
    solving = _SOLVERS[name](heads, size) if heads else 0.0
    solving = max(solving, size.scaler_bytes)
    scoring = size.n_test * (8.0 * size.n_features + 6 * table)
    scoring += _SCORING.get(name, _nothing)(heads, size)
    return size.raw_bytes + scores + max(size.matrix_bytes + solving, scoring)


def _made(name: str, setting: Setting) -> Any:
    head: Any = head_class(name)(**setting)
    try:
        head.check_params()
    except FIT_ERRORS:  # the fit will say so
        return None
    return head


def _nothing(_heads: Sequence[Any], _size: FitSize) -> float:
    return 0.0


def _side_by_side(n_jobs: int) -> int:
    """How many of them run at a time."""
    return min(n_jobs, os.cpu_count() or 1)


def _turned(n_rows: int, n_features: int, item_bytes: int) -> float:
    """Features in the eigenbasis of their covariance, while it is made."""
    rank = min(n_rows, n_features)
    values, square = item_bytes * n_rows * (rank + 1.0), 8.0 * n_features * rank
    block = 4.5 * min(_BLOCK, 8.0 * n_rows * n_features)
    made = max(values + square + block, 2 * square + block, _EIGH * square)
    if n_rows <= 1.25 * n_features:  # some fold may have fewer rows than features
        made = max(made, values + 8.0 * n_rows * (4 * n_features + _EIGH * n_rows))
    return made


def _ridge(heads: Sequence[Any], size: FitSize) -> float:
    """Designs in float64: of two folds, where there are several; weighted rows are copied again."""
    n_outputs = size.n_classes if size.n_classes > 2 else 1
    earlier = 0.0
    if size.n_folds > 1:
        rank = min(size.n_fitted, size.n_features)
        earlier = 8.0 * rank * (size.n_fitted + size.n_features)
    params = 8.0 * len(heads) * max(1, size.n_folds) * n_outputs * size.n_features
    targets = 16.0 * size.n_fitted * size.n_classes
    design = _turned(size.n_fitted, size.n_features, 8)
    weighted = size.n_folds > 1 or any(head.class_weight is not None for head in heads)
    return (1 + weighted) * size.matrix_bytes + design + earlier + 3 * params + targets


def _newton(heads: Sequence[Any], size: FitSize, *, one_vs_rest: bool) -> float:
    """A design in float32 and its half in bfloat16, preconditioners, scores of many problems."""
    n, d = size.n_fitted, size.n_features
    n_outputs = size.n_classes if size.n_classes > 2 else 1
    n_folds = max(1, size.n_folds)
    values = 4.0 * n * (min(n, d) + 1)
    square = 8.0 * min(n, d) ** 2
    if one_vs_rest:  # a Hessian and its factor for every lane that advances
        n_lanes = min(n_folds * n_outputs, max(1, int(_FACTOR_BYTES / square)))
        at_work = (n_lanes + 2) * square + n_lanes * 8.0 * n
    else:
        at = [log(head.C) for head in heads]
        n_anchors = min(len(set(at)), 2 + int(0.8 * (max(at) - min(at))))
        # To make a preconditioner takes its rows twice, or an eigendecomposition.
        at_work = n_anchors * square / 2 + max(2 * values, _EIGH * square)
    columns = 4.0 * n * n_folds * n_outputs
    tables = _SCORES * max(columns, min(columns * len(heads), _BATCH_BYTES))
    params = 4.0 * len(heads) * n_folds * n_outputs * (d + 1)
    solving = 1.5 * values + square + at_work + tables + 8 * params
    return size.matrix_bytes + columns + max(_turned(n, d, 4), solving)


def _logistic(heads: Sequence[Any], size: FitSize) -> float:
    smooth = [head for head in heads if head.penalty == "l2"]
    found = _newton(smooth, size, one_vs_rest=False) if smooth else 0.0
    if len(smooth) == len(heads):
        return found
    n_outputs = size.n_classes if size.n_classes > 2 else 1
    columns = 4.0 * size.n_fitted * max(1, size.n_folds) * n_outputs
    tables = 1.5 * _SCORES * max(columns, min(columns * len(heads), _BATCH_BYTES))
    # While the means are taken, the features are there in float64.
    return max(found, 4 * size.matrix_bytes + tables)


def _svm(heads: Sequence[Any], size: FitSize) -> float:
    smooth = [head for head in heads if head.kernel == "linear" and head.loss == "squared_hinge"]
    hinge = [head for head in heads if head.kernel == "linear" and head.loss == "hinge"]
    exact = [h for h in heads if h.kernel == "rbf" and h.max_exact_rows >= size.n_fitted]
    # A fold has fewer samples than the fit after it, and may have an exact kernel.
    rest = [h for h in heads if h.kernel == "rbf" and h.max_exact_rows < size.n_fitted]
    found = _newton(smooth, size, one_vs_rest=True) if smooth else 0.0
    if hinge:
        # liblinear: the fold, in float64, and 16 bytes a value of its own.
        n_jobs = _side_by_side(len(hinge) * max(1, size.n_folds))
        found = max(found, 7 * n_jobs * size.matrix_bytes)
    if exact:
        found = max(found, _kernels(exact, size, size.n_fitted))
    if rest:
        found = max(found, _landmarks(rest, size))
        n_rows = max(head.max_exact_rows for head in rest)
        if size.n_fold <= n_rows:
            found = max(found, _kernels(rest, size, n_rows))
    return found


def _kernels(heads: Sequence[Any], size: FitSize, n_rows: int) -> float:
    """Kernels in float64 of several widths and folds, from distances in float32."""
    groups = {repr({**head.get_params(), "C": None}) for head in heads}
    n_jobs = len(groups) * max(1, size.n_folds)
    one = 8.0 * n_rows * min(size.n_fitted, n_rows + size.n_chosen)
    kernels = min(n_jobs * one, max(one, _KERNELS_BYTES))
    distances = one / 2 + one if n_jobs > 1 else 0.0  # and the last kernel of those before
    n_threads = _side_by_side(len(heads) * max(1, size.n_folds))
    caches = n_threads * min(_CACHE_BYTES, 4.0 * min(size.n_pair, n_rows) ** 2)
    # While one is made there are its distances and their exponentials, in float32.
    return kernels + one + distances + caches + 2 * kernels / one * size.matrix_bytes


def _landmarks(heads: Sequence[Any], size: FitSize) -> float:
    """A linear machine on kernel values with some samples."""
    n_landmarks = min(size.n_fitted, max(int(head.n_components) for head in heads))
    mapped = replace(size, n_features=n_landmarks, n_folds=1)
    solving = max(_EIGH * 8.0 * n_landmarks**2, _newton(heads, mapped, one_vs_rest=True))
    chosen = 16.0 * size.n_chosen * n_landmarks
    return 2 * size.matrix_bytes + mapped.matrix_bytes + solving + chosen


def _networks(heads: Sequence[Any], size: FitSize) -> float:
    """All networks with their gradients and moments; scores of a block of samples."""
    widths = [(size.n_features, *head.widths(), size.n_classes) for head in heads]
    n_params: float = sum(sum(map(prod, pairwise(own))) for own in widths)
    batches: float = sum(
        head.batch_size * sum(own) for head, own in zip(heads, widths, strict=True)
    )
    scores = 12.0 * min(2**24, size.n_chosen * sum(sum(own[1:]) for own in widths))
    # Freed parameters are kept for the next ones, also while the last fit learns its scaling.
    training = 16.0 * batches + scores + size.matrix_bytes
    return 4.0 * _STATES * n_params + max(training, size.scaler_bytes)


def _hidden(heads: Sequence[Any], size: FitSize) -> float:
    """Activations of all samples of test."""
    widest = max((max(head.widths(), default=0) for head in heads), default=0)
    return 12.0 * size.n_test * widest


def _knn(heads: Sequence[Any], size: FitSize) -> float:
    """The kept samples, and their distances to the mean in float64; or a search."""
    return max(5 * size.matrix_bytes, size.matrix_bytes + _search(heads, size))


def _search(heads: Sequence[Any], size: FitSize) -> float:
    """Blocks of samples, products with them, and candidates that are measured again."""
    n_queries = max(size.n_chosen, size.n_test)
    k = max((head.k for head in heads), default=1)
    rows = min(_SEARCH_ROWS, size.n_fitted)
    block = 4.0 * rows * size.n_features
    products = 6 * 4.0 * rows * min(n_queries, _SEARCH_QUERIES)
    again = min(_SEARCH_NUMBERS, n_queries * (k + 8) * size.n_features)
    # Candidates by each metric, with the places of those that are measured again, and the result.
    found = 48.0 * len({head.metric for head in heads}) * n_queries * (k + 8)
    return max(5 * block, block + products + 28.0 * again) + found


def _scored_knn(heads: Sequence[Any], size: FitSize) -> float:
    return size.matrix_bytes + _search(heads, size)


def _prototypes(heads: Sequence[Any], size: FitSize) -> float:
    """Each job has the rows of its fold, centred, squared and of length one; a class in float64."""
    n_jobs = _side_by_side(len(heads) * max(1, size.n_folds))
    return (3 + 3 * min(1.0, size.n_pair / size.n_fitted)) * n_jobs * size.matrix_bytes


def _centred(_heads: Sequence[Any], size: FitSize) -> float:
    return 8.0 * size.n_test * size.n_features


_SOLVERS: dict[str, Callable[[Sequence[Any], FitSize], float]] = {
    "logreg": _logistic,
    "linear": _networks,
    "svm": _svm,
    "mlp": _networks,
    "ridge": _ridge,
    "knn": _knn,
    "prototype": _prototypes,
}
_SCORING: dict[str, Callable[[Sequence[Any], FitSize], float]] = {
    "mlp": _hidden,
    "knn": _scored_knn,
    "prototype": _centred,
}
