"""One exact search for nearest neighbours, at the largest k, for every k, metric and temperature.

Cosine and squared Euclidean distance come from one product of queries and samples, in blocks of
float32. Somewhat more neighbours are kept than are asked for; those that float32 cannot tell apart
are measured again in float64. The order is that of float64, equals by index.

The samples are gone through block by block, once, and once more where some have to be measured
again: they may as well lie on a disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

METRICS = ("cosine", "euclidean")
_QUERY_ROWS = 512
_SAMPLE_ROWS = 8192
_SPARE = 8
_RECHECK_NUMBERS = 2**22


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


class SampleBlocks(Protocol):
    """Samples that may be found, numbered from 0, wherever they are.

    Attributes:
        mean: (n_features,) float32, theirs or near it: distances are measured from there.
    """

    mean: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n_samples, n_features)."""

    def blocks(self, only: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through all samples, or through ``only`` some numbers.

        Yields:
            Numbers (n,) int64 and samples (n, n_features) float32, finite, in any order.
        """


def search(
    X: Array | Tensor | SampleBlocks,
    queries: Array | Tensor | None,
    k: int,
    *,
    metrics: Sequence[str] = METRICS,
    mask: Array | None = None,
    variance: float | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Neighbours]:
    """Find the k nearest samples of every query, by every metric.

    Memory beside the inputs and the result: a few blocks of products of at most 512 × 8,192 (or as
    many samples as a block of X has), candidates as large as the result, and 2^22 float64 numbers
    while some are measured again.

    The order is that of distances in float64. A sample could only be missed if more than eight
    others crowd, within the rounding of float32, around the k-th distance; the search then looks
    at that query again over all samples, so that it is exact all the same. Similarities are as
    accurate as float32.

    Args:
        X: (n_samples, n_features), float32 is used as it is; or where they are.
        queries: (n_queries, n_features); None for the samples themselves, each left out of its own
            neighbours, where X is a matrix.
        k: neighbours to find; as many as there are where there are fewer.
        metrics: of :data:`METRICS`. A vector of zeros has cosine 0 with everything.
        mask: (n_samples,) bool, samples of a matrix that may be found: the training part of a fold.
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
    space: SampleBlocks
    if isinstance(X, np.ndarray | Tensor):
        held = _Held(_checked("X", X), _kept(mask, len(X)), leaves_one_out=queries is None)
        space, q = held, held.x if queries is None else _checked("queries", queries)
    elif queries is None:
        raise ValueError("queries is None, expected a matrix: the samples are read block by block")
    else:
        space, q = X, _checked("queries", queries)
    n_samples, n_features = space.shape
    if q.shape[1] != n_features:
        raise ValueError(f"The queries have {q.shape[1]} features, expected {n_features} as X has")
    k = min(k, n_samples)
    companies = [
        _Company(q[start : start + _QUERY_ROWS], start if queries is None else None)
        for start in range(0, len(q), _QUERY_ROWS)
    ]
    extent = _approach(space, companies, metrics, min(k + _SPARE, n_samples), torch.device(device))
    found = [
        _Candidates.of(company, metric, space.mean, extent)
        for company in companies
        for metric in metrics
    ]
    _settle(space, found)
    for one in found:
        one.cut(k)
    _search_again(space, found)
    scale = 2 * (extent.variance if variance is None else variance)
    return {
        metric: _joined([one for one in found if one.metric == metric],
                        1.0 if metric == "cosine" else scale)
        for metric in metrics
    }  # fmt: skip


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
    # A sum is finite only if all its terms are. Float32 could overflow; for float64 torch makes
    # a copy of what it sums up.
    blocks = torch.split(x, _SAMPLE_ROWS)
    sums = torch.cat([block.sum(dim=1, dtype=torch.float64) for block in blocks])
    bad = (~torch.isfinite(sums)).nonzero().flatten()
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


class _Held:
    """Some rows of a matrix; without a copy of it, where they are all.

    Args:
        x: (n_rows, n_features).
        kept: rows that may be found.
        leaves_one_out: whether the rows are the queries too.

    Raises:
        ValueError: there are too few.
    """

    def __init__(self, x: Tensor, kept: NDArray[np.int64], *, leaves_one_out: bool) -> None:
        n_least = 2 if leaves_one_out else 1
        if len(kept) < n_least:
            raise ValueError(
                f"{len(kept)} of {len(x)} samples may be found, expected at least {n_least}"
            )
        self.x = x
        self.kept = torch.from_numpy(kept)
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for _, block in self.blocks():
            total += block.sum(dim=0, dtype=torch.float64).cpu()
        self.mean = (total / len(kept)).float()

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.kept), self.x.shape[1]

    def blocks(self, only: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = self.kept if only is None else only
        is_whole = len(numbers) == len(self.x)
        for start in range(0, len(numbers), _SAMPLE_ROWS):
            part = slice(start, start + _SAMPLE_ROWS)
            yield numbers[part], self.x[part] if is_whole else self.x[numbers[part]]


class _Company:
    """Queries that are multiplied at once, and the nearest samples so far.

    Args:
        queries: (n, n_features).
        own: number of the first among the samples, where they are some of them.
    """

    def __init__(self, queries: Tensor, own: int | None) -> None:
        self.queries, self.own = queries, own
        self.nearest: dict[str, tuple[Tensor, Tensor]] = {}

    def meet(self, metric: str, distances: Tensor, numbers: Tensor, n_wanted: int) -> None:
        """Keep the nearest of those so far and of some samples, by their distances (n, n_met)."""
        distances, places = distances.topk(min(n_wanted, len(numbers)), dim=1, largest=False)
        found = numbers[places]
        if metric in self.nearest:
            before = self.nearest[metric]
            distances, found = (
                torch.cat([before[0], distances], 1),
                torch.cat([before[1], found], 1),
            )
            n_kept = min(n_wanted, distances.shape[1])
            distances, order = distances.topk(n_kept, dim=1, largest=False)
            found = found.gather(1, order)
        self.nearest[metric] = distances, found


@dataclass
class _Extent:
    """How far the samples reach: the longest, and the farthest from the mean."""

    n_samples: int = 0
    norm: float = 0.0
    square: float = 0.0
    squares: float = 0.0

    def add(self, norms: Tensor, squares: Tensor) -> None:
        self.n_samples += len(norms)
        self.norm = max(self.norm, float(norms.max()))
        self.square = max(self.square, float(squares.max()))
        self.squares += float(squares.sum(dtype=torch.float64))

    @property
    def variance(self) -> float:
        return self.squares / self.n_samples or 1.0

    def rounding(self, q: Tensor, mean: Tensor, metric: str) -> Tensor:
        """How far two distances of a query must be apart to be told apart: (n,), float64.

        Products in float32 were seen to be off by up to 4e-7 of the product of the lengths, at 16
        features as at 4,096; for two of them, 1e-6 is allowed for.
        """
        unit = 8 * torch.finfo(torch.float32).eps
        lengths = torch.linalg.vector_norm(q - mean, dim=1).double()
        if metric == "cosine":
            norms = torch.linalg.vector_norm(q, dim=1).double()
            length = float(torch.linalg.vector_norm(mean))
            return torch.mul(1 + (lengths + length) / norms.clamp(min=1e-30), unit)
        # The products of q - m are with x, not with x - m.
        return torch.mul((lengths + self.square**0.5 + self.norm).square(), unit)


def _approach(
    space: SampleBlocks,
    companies: Sequence[_Company],
    metrics: Sequence[str],
    n_wanted: int,
    device: torch.device,
) -> _Extent:
    """Every query meets every sample, in float32.

    Distances are minus the cosine, and squared Euclidean from the mean: a common offset does not
    change them, but would drown them in the rounding.
    """
    extent = _Extent()
    mean = space.mean.to(device)
    for numbers, rows in space.blocks():
        block, numbers = rows.to(device), numbers.to(device)
        norms = torch.linalg.vector_norm(block, dim=1)
        squares = (block - mean).square_().sum(dim=1)
        extent.add(norms, squares)
        by_mean = block @ mean
        for company in companies:
            q = company.queries.to(device)
            # (q - m)·(x - m) = (q - m)·x - (q - m)·m, and q·x = (q - m)·x + m·x: one product
            # serves both.
            shifted = q - mean
            products = shifted @ block.T
            for metric in metrics:
                if metric == "cosine":
                    scale = torch.linalg.vector_norm(q, dim=1, keepdim=True) * norms
                    rough = (products + by_mean).neg_().div_(scale.clamp_(min=1e-30))
                else:
                    turned = products - (shifted @ mean)[:, None]
                    rough = torch.add(squares, turned, alpha=-2)
                    rough += shifted.square().sum(dim=1, keepdim=True)
                company.meet(metric, rough, numbers, n_wanted)
    return extent


@dataclass
class _Candidates:
    """More neighbours of some queries than are asked for, and how far they are.

    Attributes:
        queries: (n, n_features).
        own: number of the first among the samples, where they are some of them.
        metric: of the distances.
        numbers: (n, n_wanted), of the samples; nearest first.
        exact: (n, n_wanted) float64, distances.
        n_met: how many there were.
        farthest: (n,), the last of them, before any was measured again.
        rounding: (n,), distances of float32 that are nearer to each other cannot be told apart.
    """

    queries: Tensor
    own: int | None
    metric: str
    numbers: Tensor
    exact: Tensor
    n_met: int
    farthest: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, company: _Company, metric: str, mean: Tensor, extent: _Extent) -> _Candidates:
        distances, numbers = company.nearest.pop(metric)
        exact, order = distances.cpu().double().sort(dim=1)
        queries = company.queries.cpu()
        return cls(
            queries,
            company.own,
            metric,
            numbers.cpu().gather(1, order),
            exact,
            exact.shape[1],
            exact[:, -1].clone(),
            extent.rounding(queries, mean.cpu(), metric),
        )

    def unclear(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of distances that are too close to a neighbour's."""
        too_close = self.exact.diff(dim=1) <= self.rounding[:, None]
        unclear = torch.zeros_like(self.exact, dtype=torch.bool)
        unclear[:, 1:] |= too_close
        unclear[:, :-1] |= too_close
        rows, columns = unclear.nonzero(as_tuple=True)
        return rows, columns

    def measure(self, rows: Tensor, columns: Tensor, numbers: Tensor, samples: Tensor) -> None:
        """Measure those of some unclear distances that are to these samples."""
        numbers, order = numbers.sort()
        wanted = self.numbers[rows, columns]
        places = torch.searchsorted(numbers, wanted).clamp_(max=len(numbers) - 1)
        here = (numbers[places] == wanted).nonzero().flatten()
        for some in torch.split(here, max(1, _RECHECK_NUMBERS // samples.shape[1])):
            i, j = rows[some], columns[some]
            others = samples[order[places[some]]].double()[:, None]
            self.exact[i, j] = _distances(self.queries[i].double(), others, self.metric)[:, 0]

    def cut(self, k: int) -> None:
        """Leave the query itself out, sort, and keep k."""
        self.numbers, self.exact = _ranked(self.numbers, self.exact, k, self._themselves())

    def unsure(self) -> list[int]:
        """Queries that may have a neighbour which was no candidate.

        Who was none is not nearer than the farthest one, but for rounding.
        """
        return (self.exact[:, -1] >= self.farthest - self.rounding).nonzero().flatten().tolist()

    def forget(self, row: int) -> None:
        """Begin anew with one query."""
        self.numbers[row], self.exact[row] = -1, torch.inf

    def meet(self, row: int, numbers: Tensor, samples: Tensor) -> None:
        """One query meets some samples, in float64."""
        distances = _distances(self.queries[row : row + 1].double(), samples[None], self.metric)
        own = self._themselves()
        found, exact = _ranked(
            torch.cat([self.numbers[row], numbers])[None],
            torch.cat([self.exact[row], distances[0]])[None],
            self.exact.shape[1],
            None if own is None else own[row : row + 1],
        )
        self.numbers[row], self.exact[row] = found[0], exact[0]

    def _themselves(self) -> Tensor | None:
        """(n, 1), the queries' numbers among the samples."""
        if self.own is None:
            return None
        return torch.arange(self.own, self.own + len(self.queries))[:, None]


def _settle(space: SampleBlocks, found: Sequence[_Candidates]) -> None:
    """Measure in float64 what float32 cannot tell apart."""
    unclear = [one.unclear() for one in found]
    pairs = zip(found, unclear, strict=True)
    wanted = torch.cat([one.numbers[rows, columns] for one, (rows, columns) in pairs])
    needed = torch.from_numpy(np.unique(wanted.numpy()))
    if not len(needed):
        return
    for numbers, samples in space.blocks(needed):
        for one, (rows, columns) in zip(found, unclear, strict=True):
            one.measure(rows, columns, numbers, samples.cpu())


def _search_again(space: SampleBlocks, found: Sequence[_Candidates]) -> None:
    """Let the queries that may have missed a neighbour meet all samples in float64."""
    again = [(one, one.unsure()) for one in found if one.n_met < space.shape[0]]
    again = [(one, rows) for one, rows in again if rows]
    if not again:
        return
    for one, rows in again:
        for row in rows:
            one.forget(row)
    n_rows = max(1, _RECHECK_NUMBERS // space.shape[1])
    for numbers, samples in space.blocks():
        parts = zip(torch.split(numbers, n_rows), torch.split(samples, n_rows), strict=True)
        for some, block in parts:
            exact = block.cpu().double()
            for one, rows in again:
                for row in rows:
                    one.meet(row, some, exact)


def _distances(q: Tensor, x: Tensor, metric: str) -> Tensor:
    """(n, n_candidates) in float64, of q (n, d) and x (n or 1, n_candidates, d)."""
    if metric == "euclidean":
        return (x - q[:, None]).square_().sum(dim=2)
    products = (x * q[:, None]).sum(dim=2)
    scale = torch.linalg.vector_norm(q, dim=1, keepdim=True) * torch.linalg.vector_norm(x, dim=2)
    return torch.where(scale > 0, -products / scale, 0.0)


def _ranked(
    numbers: Tensor, exact: Tensor, k: int, themselves: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sort by distance, equals by number; a query itself comes last, as -1."""
    if themselves is not None:
        exact = exact.masked_fill(numbers == themselves, torch.inf)
    numbers, order = numbers.sort(dim=1)
    exact, order = exact.gather(1, order).sort(dim=1, stable=True)
    numbers = numbers.gather(1, order)
    return numbers[:, :k].masked_fill(exact[:, :k].isinf(), -1), exact[:, :k].contiguous()


def _joined(found: Sequence[_Candidates], scale: float) -> Neighbours:
    """All queries; ``scale`` divides the distances."""
    numbers = torch.cat([one.numbers for one in found]).numpy()
    distances = torch.cat([one.exact for one in found]).numpy()
    return Neighbours(numbers, -distances / scale)
