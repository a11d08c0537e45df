"""Votes of the nearest training samples."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError
from pipeline.heads.base import Array, Head, fit_inputs, predict_inputs, softmax
from pipeline.heads.scaling import l2_normalise

METRICS = ("cosine", "euclidean")
_BLOCK_ROWS = 1024


class KNNHead(Head):
    """k nearest neighbours with softmax-weighted votes (Oquab et al., DINOv2, 2023, B.3).

    One vote of k is spread evenly over the classes, so that no class is impossible and the
    negative log-likelihood stays finite; the winner is the same.

    Args:
        k: neighbours; all of them where there are fewer.
        metric: "cosine" or "euclidean".
        temperature: a neighbour's vote is exp(similarity / temperature); the similarity is the
            cosine, or minus half the squared distance over the training variance.

    Attributes:
        features_: (n_train, n_features), L2-normalised for "cosine".
        index_: (n_train,), class indices.
        variance_: mean squared distance of the training samples to their mean.
        k_: neighbours that are asked.
    """

    def __init__(self, k: int = 20, *, metric: str = "cosine", temperature: float = 0.07) -> None:
        self.k = k
        self.metric = metric
        self.temperature = temperature

    def fit(self, X: Array, y: Array) -> Self:
        """Keep X (n_samples, n_features), y (n_samples,)."""
        self.check_params()
        X, index = fit_inputs(self, X, y)
        self.features_ = l2_normalise(X) if self.metric == "cosine" else X.copy()
        self.index_ = index.astype(np.int64)
        centred = X - X.mean(axis=0, dtype=np.float64)
        self.variance_ = np.float64(np.square(centred).sum(axis=1).mean() or 1.0)
        self.k_ = min(self.k, len(X))
        self.converged_ = True
        return self

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}, expected one of {', '.join(METRICS)}")
        if self.k < 1 or not self.temperature > 0:
            raise ValueError(
                f"k is {self.k} and temperature {self.temperature}, expected at least 1 and above 0"
            )

    def _similarity(self, X: Array) -> Array:
        """(n_samples, n_train)."""
        products: Array
        if self.metric == "cosine":
            products = l2_normalise(X) @ self.features_.T
            return products
        products = X @ self.features_.T
        squares = (
            np.square(X).sum(axis=1)[:, None] + np.square(self.features_).sum(axis=1) - 2 * products
        )
        similarity: Array = -np.maximum(squares, 0) / (2 * self.variance_)
        return similarity

    def _block_votes(self, X: Array) -> Array:
        similarity = self._similarity(X)
        n_train = similarity.shape[1]
        nearest = np.argpartition(similarity, n_train - self.k_, axis=1)[:, n_train - self.k_ :]
        weights = softmax(np.take_along_axis(similarity, nearest, axis=1) / self.temperature)
        n_classes = len(self.classes_)
        votes = np.full((len(X), n_classes), 1 / (self.k_ * n_classes))
        np.add.at(votes, (np.arange(len(X))[:, None], self.index_[nearest]), weights)
        result: Array = votes / votes.sum(axis=1, keepdims=True)
        return result

    def predict_proba(self, X: Array) -> NDArray[Any]:
        """Shares of the votes (n_samples, n_classes)."""
        X = predict_inputs(self, X)
        blocks = [
            self._block_votes(X[start : start + _BLOCK_ROWS])
            for start in range(0, len(X), _BLOCK_ROWS)
        ]
        shares: Array = np.concatenate(blocks)
        return shares

    def logits(self, X: Array) -> Array:
        """Log shares of the votes (n_samples, n_classes)."""
        logits: Array = np.log(self.predict_proba(X))
        return logits

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays."""
        return {"features_": ("samples", "features"), "index_": ("samples",), "variance_": ()}

    @classmethod
    def from_arrays(cls, params: Any, arrays: Any) -> Self:
        """Rebuild a fitted head; also checks that the class indices are some."""
        head = super().from_arrays(params, arrays)
        index = head.index_
        if index.dtype.kind not in "iu" or not len(index):
            raise CorruptStoreError("The class indices of the model's samples are not integers.")
        if index.min() < 0 or index.max() >= len(head.classes_):
            raise CorruptStoreError(
                f"The model's samples name class {index.max()}, but it has {len(head.classes_)}."
            )
        head.k_ = min(int(head.k), len(index))
        return head
