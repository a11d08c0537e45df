"""Votes of the nearest training samples."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError
from pipeline.heads.base import (
    Array,
    Head,
    fit_inputs,
    predict_inputs,
    sample_weights,
    solver_device,
)
from pipeline.heads.folds import FIT_ERRORS, Fold, FoldResult, fit_fold, fold_result
from pipeline.heads.neighbours import Neighbours, SampleBlocks, VoteSetting, search, vote


class KNNHead(Head):
    """k nearest neighbours with softmax-weighted votes (Oquab et al., DINOv2, 2023, B.3).

    One vote of k is spread evenly over the classes, so that no class is impossible and the
    negative log-likelihood stays finite; the winner is the same.

    A sample's weight multiplies its vote; a sample of weight 0 is no neighbour.

    Args:
        k: neighbours; all of them where there are fewer.
        metric: "cosine" or "euclidean".
        temperature: a neighbour's vote is exp(similarity / temperature); the similarity is the
            cosine, or minus half the squared distance over the training variance. None: all votes
            are equal.
        device: "cpu", "cuda[:N]" or "auto", where neighbours are searched for.

    Attributes:
        features_: (n_train, n_features) float32.
        index_: (n_train,), class indices.
        weights_: (n_train,) float64, of the votes.
        variance_: mean squared distance of the training samples to their mean.
        k_: neighbours that are asked.
    """

    def __init__(
        self,
        k: int = 20,
        *,
        metric: str = "cosine",
        temperature: float | None = 0.07,
        device: str = "cpu",
    ) -> None:
        self.k = k
        self.metric = metric
        self.temperature = temperature
        self.device = device

    def vote_setting(self) -> VoteSetting:
        """How the neighbours are counted."""
        return VoteSetting(self.k, self.metric, self.temperature)

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        self.vote_setting()

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Keep X (n_samples, n_features), y (n_samples,) and the weights (n_samples,)."""
        self.check_params()
        X, index = fit_inputs(self, X, y)
        weights = sample_weights(X, index, None, sample_weight)
        if (weights < 0).any():
            raise ValueError(f"sample_weight holds {weights.min()}, expected 0 or more")
        kept = weights > 0
        self.features_ = X[kept].astype(np.float32)
        self.index_ = index[kept].astype(np.int64)
        self.weights_ = weights[kept]
        centred = self.features_ - self.features_.mean(axis=0, dtype=np.float64)
        self.variance_ = np.float64(np.square(centred).sum(axis=1).mean() or 1.0)
        self.k_ = min(self.k, len(self.index_))
        self.converged_ = True
        return self

    @classmethod
    def try_settings(
        cls,
        settings: Sequence[Mapping[str, Any]],
        X: Array,
        y: Array,
        folds: Sequence[Fold],
        *,
        n_classes: int,
    ) -> Iterator[FoldResult]:
        """Search each fold once, at the largest k, and count the votes of every setting.

        See :meth:`pipeline.heads.base.Head.try_settings`.
        """
        heads = [cls(**setting) for setting in settings]
        companies: defaultdict[Any, list[int]] = defaultdict(list)
        for i, head in enumerate(heads):
            companies[_company(head) or i].append(i)
        for f, part in enumerate(folds):
            for company in companies.values():
                started = time.perf_counter()
                try:
                    shares, classes = _fold_shares([heads[i] for i in company], X, y, part)
                    first = next(shares)
                except FIT_ERRORS:
                    for i in company:
                        yield fit_fold(cls, settings[i], X, y, part, n_classes, i, f)
                    continue
                seconds = (time.perf_counter() - started) / len(company)
                for i, table in zip(company, (first, *shares), strict=True):
                    yield fold_result(i, f, seconds, np.log(table), classes, n_classes)

    def predict_proba(self, X: Array) -> NDArray[Any]:
        """Shares of the votes (n_samples, n_classes)."""
        return next(self.shares([self], self.neighbours([self], X)))

    @classmethod
    def neighbours(cls, heads: Sequence[Self], X: Array) -> dict[str, Neighbours]:
        """Search once for all that some heads ask for.

        Args:
            heads: with the same samples; they differ in their parameters alone.
            X: (n_samples, n_features).
        """
        first = heads[0]
        queries = predict_inputs(first, X)
        return search(
            first.samples(),
            queries,
            max(head.k_ for head in heads),
            metrics=sorted({head.metric for head in heads}),
            variance=float(first.variance_),
            device=solver_device(first.device),
        )

    @classmethod
    def shares(
        cls, heads: Sequence[Self], found: Mapping[str, Neighbours]
    ) -> Iterator[NDArray[np.float64]]:
        """Shares of the votes (n_samples, n_classes) of each head, from :meth:`neighbours`."""
        first = heads[0]
        return vote(
            found,
            first.index_,
            [head.vote_setting() for head in heads],
            n_classes=len(first.classes_),
            sample_weight=first.weights_,
        )

    def samples(self) -> Array | SampleBlocks:
        """Where the neighbours are found."""
        return self.features_

    def logits(self, X: Array) -> Array:
        """Log shares of the votes (n_samples, n_classes)."""
        logits: Array = np.log(self.predict_proba(X))
        return logits

    def n_trained(self) -> int:
        """None: the samples are kept as they are."""
        return 0

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {
            "features_": ("samples", "features"),
            "index_": ("samples",),
            "weights_": ("samples",),
            "variance_": (),
        }

    @classmethod
    def from_arrays(cls, params: Any, arrays: Any) -> Self:
        """Rebuild a fitted head; also checks what its samples are counted with.

        A model that was saved before votes had weights has none: they are all one. One that was
        fitted by passes over a store holds the places of its samples there.
        """
        if "rows" in arrays and cls is KNNHead:
            from pipeline.heads.streaming.knn import StoredKNNHead

            return StoredKNNHead.from_arrays(params, arrays)
        head = super().from_arrays(
            params, {"weights": np.ones(np.shape(arrays.get("index", ()))), **arrays}
        )
        index = head.index_
        if index.dtype.kind not in "iu" or not len(index):
            raise CorruptStoreError("The class indices of the model's samples are not integers.")
        if index.min() < 0 or index.max() >= len(head.classes_):
            raise CorruptStoreError(
                f"The model's samples name class {index.max()}, but it has {len(head.classes_)}."
            )
        if not (head.weights_ > 0).all() or not head.variance_ > 0:
            raise CorruptStoreError(
                "The weights or the variance of the model's samples are not above 0."
            )
        head.k_ = min(int(head.k), len(index))
        return head


def _company(head: KNNHead) -> str | None:
    """The device of a head that can be asked with others; None where it cannot be."""
    try:
        head.check_params()
        return str(solver_device(head.device))
    except FIT_ERRORS:
        return None


def _fold_shares(
    heads: Sequence[KNNHead], X: Array, y: Array, part: Fold
) -> tuple[Iterator[NDArray[np.float64]], Array]:
    """Shares of the votes of each head on one fold, and the classes that the fold has.

    Raises:
        ValueError: the fold has one class, or samples that do not fit.
    """
    classes = np.unique(y[part.fit])
    if len(classes) < 2:
        raise ValueError(f"The fold has samples of {len(classes)} class, expected at least 2")
    votes = [head.vote_setting() for head in heads]
    mask = np.zeros(len(X), dtype=bool)
    mask[part.fit] = True
    found = search(
        X,
        X[part.choose],
        max(setting.k for setting in votes),
        metrics=sorted({setting.metric for setting in votes}),
        mask=mask,
        device=solver_device(heads[0].device),
    )
    # Samples outside the fold may be of no class of it, and are never found.
    labels = np.minimum(np.searchsorted(classes, y), len(classes) - 1)
    return vote(found, labels, votes, n_classes=len(classes)), classes
