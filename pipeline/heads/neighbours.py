"""One exact search for nearest neighbours, at the largest k, for every k, metric and temperature.

Cosine and squared Euclidean distance come from one product of queries and samples, in blocks of
float32. Somewhat more neighbours are kept than are asked for; those that float32 cannot tell apart
are measured again in float64. The order is that of float64, equals by index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

METRICS = ("cosine", "euclidean")
_QUERY_ROWS = 512
_SAMPLE_ROWS = 8192
_SPARE = 8
_RECHECK_NUMBERS = 2**24


@dataclass(frozen=True)
class VoteSetting:
    """One way to count the neighbours.

    Attributes:
        k: neighbours that vote; all there are where there are fewer.
        metric: "cosine" or "euclidean".
        temperature: a vote is exp(similarity / temperature) (DINOv2: 0.07); None: all are equal.
            The similarity is the cosine, or minus half the squared distance over the variance of
            the samples.
    """

    k: int
    metric: str = "cosine"
    temperature: float | None = 0.07

    def __post_init__(self) -> None:
        """Refuse what cannot be counted."""
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}, expected one of {', '.join(METRICS)}")
        if self.k < 1 or not (self.temperature is None or self.temperature > 0):
            raise ValueError(
                f"k is {self.k} and temperature {self.temperature}, expected 1 or more, and above "
                "0 or None"
            )


@dataclass(frozen=True)
class Neighbours:
    """The nearest samples of each query.

    Attributes:
        index: (n_queries, k) rows of the samples, nearest first, equals by index; -1 where a
            query has fewer.
        similarity: (n_queries, k) float64: the cosine, or minus half the squared distance over
            the variance of the samples; -inf where there is none.
    """

    index: NDArray[np.int64]
    similarity: NDArray[np.float64]


def search(
    X: Array | Tensor,
    queries: Array | Tensor | None,
    k: int,
    *,
    metrics: Sequence[str] = METRICS,
    mask: Array | None = None,
    variance: float | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Neighbours]:
    """Find the k nearest samples of every query, by every metric.

    Memory beside the inputs and the result: a few blocks of products of at most 512 × 8,192, and
    2^24 float64 numbers while candidates are measured again.

    The order is that of distances in float64. A sample could only be missed if more than eight
    others crowd, within the rounding of float32, around the k-th distance; the search then looks
    at that query again over all samples, so that it is exact all the same. Similarities are as
    accurate as float32.

    Args:
        X: (n_samples, n_features); float32 is used as it is.
        queries: (n_queries, n_features); None for the samples themselves, each left out of its own
            neighbours.
        k: neighbours to find; as many as there are where there are fewer.
        metrics: of :data:`METRICS`. A vector of zeros has cosine 0 with everything.
        mask: (n_samples,) bool, samples that may be found: the training part of a fold.
        variance: of the samples; None to measure it.
        device: a torch device.

    Returns:
        Neighbours by metric.

    Raises:
        ValueError: no samples, values that are not finite, shapes that do not fit, k is below 1,
            or a metric is unknown.
    """
    for metric in metrics:
        VoteSetting(k, metric)
    x, kept = _checked("X", X), _kept(mask, len(X))
    n_others = len(kept) - (queries is None)
    if n_others < 1:
        raise ValueError(
            f"{len(kept)} of {len(x)} samples may be found, expected at least "
            f"{2 if queries is None else 1}"
        )
    q = x if queries is None else _checked("queries", queries)
    if q.shape[1] != x.shape[1]:
        raise ValueError(f"The queries have {q.shape[1]} features, expected {x.shape[1]} as X has")
    space = _Space(x, torch.from_numpy(kept), torch.device(device))
    if variance is None:
        variance = space.variance
    k = min(k, len(kept))
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {metric: [] for metric in metrics}
    for start in range(0, len(q), _QUERY_ROWS):
        own = start if queries is None else None
        found = _search_block(space, q[start : start + _QUERY_ROWS], k, metrics, own)
        for metric in metrics:
            parts[metric].append(found[metric])
    return {
        metric: _joined(blocks, k, None if metric == "cosine" else 2 * variance)
        for metric, blocks in parts.items()
    }


def vote(
    neighbours: Mapping[str, Neighbours],
    labels: Array,
    settings: Sequence[VoteSetting],
    *,
    n_classes: int,
    sample_weight: Array | None = None,
) -> Iterator[NDArray[np.float64]]:
    """Shares of the votes under each setting: (n_queries, n_classes), rows that sum to 1.

    One vote of k is spread evenly over the classes, so that no class is impossible and the
    negative log-likelihood stays finite.

    Args:
        neighbours: of :func:`search`, at the largest k or more.
        labels: (n_samples,), int class indices of the samples.
        settings: ways to count; one table is made at a time.
        n_classes: columns.
        sample_weight: (n_samples,), each neighbour's vote is multiplied by it; where those of all
            k are 0, no class is likelier than another.

    Raises:
        ValueError: labels that are no class indices, or a metric that was not searched for.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(
            f"The labels are {labels.dtype} from {labels.min()} to {labels.max()}, expected class "
            f"indices from 0 to {n_classes - 1}"
        )
    for setting in settings:
        if setting.metric not in neighbours:
            raise ValueError(
                f"metric is {setting.metric!r}, but neighbours were searched for by "
                f"{', '.join(neighbours)}"
            )
        found = neighbours[setting.metric]
        index, similarity = found.index[:, : setting.k], found.similarity[:, : setting.k]
        weights = (index >= 0).astype(np.float64)
        if setting.temperature is not None:
            weights = np.exp((similarity - similarity[:, :1]) / setting.temperature)
        if sample_weight is not None:
            weights *= np.asarray(sample_weight, np.float64)[index]
        total = weights.sum(axis=1, keepdims=True)
        weights /= np.where(total > 0, total, 1)
        n_queries = len(index)
        cells = np.arange(n_queries)[:, None] * n_classes + labels[index]
        votes = np.bincount(cells.ravel(), weights.ravel(), minlength=n_queries * n_classes)
        shares = votes.reshape(n_queries, n_classes) + 1 / (index.shape[1] * n_classes)
        yield shares / shares.sum(axis=1, keepdims=True)


# What goes in


def _checked(name: str, X: Array | Tensor) -> Tensor:
    x = X.detach().float() if isinstance(X, Tensor) else _shared(X)
    if x.ndim != 2 or not x.numel():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (n_samples, n_features), none of them 0"
        )
    # A sum of squares is finite only if all its terms are; float32 could overflow.
    bad = (~torch.isfinite(x.sum(dim=1, dtype=torch.float64))).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad):,} of {len(x):,} rows of {name} hold NaN or infinity (the first is row "
            f"{int(bad[0])}), expected finite features. Look for damage with: tlpipe verify STORE"
        )
    return x


def _shared(X: Array) -> Tensor:
    """float32; a copy only where it is another type, or must not be written to."""
    return torch.from_numpy(np.require(X, dtype=np.float32, requirements=["C", "W"]))


def _kept(mask: Array | None, n_samples: int) -> NDArray[np.int64]:
    if mask is None:
        return np.arange(n_samples)
    chosen = np.asarray(mask)
    if chosen.shape != (n_samples,) or chosen.dtype != bool:
        raise ValueError(
            f"The mask has shape {chosen.shape} of {chosen.dtype}, expected ({n_samples},) of bool"
        )
    return np.flatnonzero(chosen)


# The search


class _Space:
    """The samples that may be found, shifted to their mean for Euclidean distances.

    A common offset does not change distances, but would drown them in the rounding of float32.
    """

    def __init__(self, x: Tensor, kept: Tensor, device: torch.device) -> None:
        self.x = x
        self.kept = kept
        self.device = device
        self.is_whole = len(kept) == len(x)
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for _, block in self.blocks():
            total += block.sum(dim=0, dtype=torch.float64).cpu()
        self.mean = (total / len(kept)).float().to(device)
        norms, squares = [], []
        for _, block in self.blocks():
            norms.append(torch.linalg.vector_norm(block, dim=1))
            squares.append((block - self.mean).square().sum(dim=1))
        self.norms, self.squares = torch.cat(norms), torch.cat(squares)
        self.variance = float(self.squares.mean(dtype=torch.float64)) or 1.0

    def rounding(self, q: Tensor, metric: str) -> Tensor:
        """How far two distances of a query must be apart to be told apart: (n,), float64.

        Products in float32 were seen to be off by up to 4e-7 of the product of the lengths, at 16
        features as at 4,096; for two of them, 1e-6 is allowed for.
        """
        unit = 8 * torch.finfo(torch.float32).eps
        lengths = torch.linalg.vector_norm(q - self.mean, dim=1).cpu().double()
        if metric == "cosine":
            norms = torch.linalg.vector_norm(q, dim=1).cpu().double()
            mean = float(torch.linalg.vector_norm(self.mean))
            return torch.mul(1 + (lengths + mean) / norms.clamp(min=1e-30), unit)
        # The products of q - m are with x, not with x - m.
        largest = float(self.squares.max()) ** 0.5 + float(self.norms.max())
        return torch.mul((lengths + largest).square(), unit)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, rows) of the samples that may be found."""
        for start in range(0, len(self.kept), _SAMPLE_ROWS):
            stop = start + _SAMPLE_ROWS
            rows = self.x[start:stop] if self.is_whole else self.x[self.kept[start:stop]]
            yield start, rows.to(self.device)


def _search_block(
    space: _Space, q: Tensor, k: int, metrics: Sequence[str], own: int | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Nearest samples of some queries by each metric: (n, k) indices and distances, float64.

    Distances are minus the cosine, and squared Euclidean.
    """
    n_wanted = min(k + _SPARE, len(space.kept))
    q = q.to(space.device)
    norms = torch.linalg.vector_norm(q, dim=1, keepdim=True)
    # (q - m)·(x - m) = (q - m)·x - (q - m)·m, and q·x = (q - m)·x + m·x: one product serves both.
    shifted = q - space.mean
    squares = shifted.square().sum(dim=1, keepdim=True)
    best: dict[str, tuple[Tensor, Tensor]] = {}
    for start, block in space.blocks():
        part = slice(start, start + len(block))
        by_mean = block @ space.mean
        products = shifted @ block.T
        for metric in metrics:
            if metric == "cosine":
                scale = norms * space.norms[part]
                rough = (products + by_mean).neg_().div_(scale.clamp_(min=1e-30))
            else:
                rough = torch.add(space.squares[part], products - (shifted @ space.mean)[:, None],
                                  alpha=-2)  # fmt: skip
                rough += squares
            best[metric] = _merged(best.get(metric), rough, start, n_wanted)
    return {
        metric: _sorted_exactly(space, q, metric, distances, places, k, own)
        for metric, (distances, places) in best.items()
    }


def _merged(
    best: tuple[Tensor, Tensor] | None, rough: Tensor, start: int, n_wanted: int
) -> tuple[Tensor, Tensor]:
    """The nearest so far: (n, n_wanted) distances and places."""
    distances, places = rough.topk(min(n_wanted, rough.shape[1]), dim=1, largest=False)
    places = places + start
    if best is None:
        return distances, places
    distances, places = torch.cat([best[0], distances], 1), torch.cat([best[1], places], 1)
    distances, order = distances.topk(min(n_wanted, distances.shape[1]), dim=1, largest=False)
    return distances, places.gather(1, order)


def _sorted_exactly(
    space: _Space,
    q: Tensor,
    metric: str,
    rough: Tensor,
    places: Tensor,
    k: int,
    own: int | None,
) -> tuple[Tensor, Tensor]:
    """Part candidates that are too close, leave the query itself out, sort, and cut to k."""
    exact, order = rough.cpu().double().sort(dim=1)
    index = space.kept[places.cpu().gather(1, order)]
    rounding = space.rounding(q, metric)
    farthest = exact[:, -1].clone()
    too_close = exact.diff(dim=1) <= rounding[:, None]
    unclear = torch.zeros_like(exact, dtype=torch.bool)
    unclear[:, 1:] |= too_close
    unclear[:, :-1] |= too_close
    rows, columns = unclear.nonzero(as_tuple=True)
    step = max(1, _RECHECK_NUMBERS // q.shape[1])
    for start in range(0, len(rows), step):
        i, j = rows[start : start + step], columns[start : start + step]
        candidates = space.x[index[i, j]].double()[:, None]
        exact[i, j] = _distances(q.cpu()[i].double(), candidates, metric)[:, 0]
    index, exact = _ranked(index, exact, k, own)
    if places.shape[1] < len(space.kept):
        # Who was no candidate is not nearer than the farthest one, but for rounding.
        unsure = exact[:, -1] >= farthest - rounding
        _search_again(space, q, metric, unsure.nonzero().flatten().tolist(), index, exact, own)
    return index, exact


def _distances(q: Tensor, x: Tensor, metric: str) -> Tensor:
    """(n, n_candidates) in float64, of q (n, d) and x (n or 1, n_candidates, d)."""
    if metric == "euclidean":
        return (x - q[:, None]).square_().sum(dim=2)
    products = (x * q[:, None]).sum(dim=2)
    scale = torch.linalg.vector_norm(q, dim=1, keepdim=True) * torch.linalg.vector_norm(x, dim=2)
    return torch.where(scale > 0, -products / scale, 0.0)


def _ranked(index: Tensor, exact: Tensor, k: int, own: int | None) -> tuple[Tensor, Tensor]:
    """Sort by distance, equals by index; a query's own row comes last, as -1."""
    if own is not None:
        itself = index == torch.arange(own, own + len(index))[:, None]
        exact = exact.masked_fill(itself, torch.inf)
    index, order = index.sort(dim=1)
    exact, order = exact.gather(1, order).sort(dim=1, stable=True)
    index = index.gather(1, order)
    return index[:, :k].masked_fill(exact[:, :k].isinf(), -1), exact[:, :k].contiguous()


def _search_again(
    space: _Space,
    q: Tensor,
    metric: str,
    rows: Sequence[int],
    index: Tensor,
    exact: Tensor,
    own: int | None,
) -> None:
    """Search for some of the queries among all samples in float64; in place."""
    for row in rows:
        query = q[row : row + 1].cpu().double()
        distances = torch.cat(
            [_distances(query, block.cpu().double()[None], metric) for _, block in space.blocks()],
            dim=1,
        )
        index[row : row + 1], exact[row : row + 1] = _ranked(
            space.kept[None], distances, index.shape[1], None if own is None else own + row
        )


def _joined(blocks: Sequence[tuple[Tensor, Tensor]], k: int, scale: float | None) -> Neighbours:
    """All queries; ``scale`` divides squared distances, None where they are minus a cosine."""
    index = torch.cat([index for index, _ in blocks]).numpy()
    distances = torch.cat([distances for _, distances in blocks]).numpy()
    return Neighbours(index[:, :k], -distances / (scale or 1.0))
