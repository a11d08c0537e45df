"""Which heads can be fitted by passes over stored rows, and how."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.heads import head_class
from pipeline.heads.base import Head, solver_device
from pipeline.heads.features import StoredFeatures
from pipeline.heads.folds import FIT_ERRORS
from pipeline.heads.neighbours import Neighbours
from pipeline.heads.scaling import Scaler, l2_normalise
from pipeline.heads.solvers.mlp import Training
from pipeline.heads.streaming.knn import StoredKNNHead, StoredSamples
from pipeline.heads.streaming.moments import Moments, Parts, class_sums, gather
from pipeline.heads.streaming.newton import Basis, LinearProblem, solve_linear
from pipeline.heads.streaming.ridge import solve_ridge
from pipeline.heads.streaming.rows import StoredRows
from pipeline.heads.streaming.softmax import SoftmaxSteps

Setting = Mapping[str, Any]
Floats = NDArray[np.float64]

Jobs = Sequence[tuple[int, int]]

STREAMED = ("logreg", "linear", "ridge", "svm", "knn", "prototype")
"""Heads with settings that can be fitted this way."""

_VECTORS = {"logreg": 12, "svm": 12, "linear": 7}
"""Copies of its parameters that a problem of Newton or gradient steps holds at most."""
_HELD_BYTES = 2.0**30
_MIN_HELD_ROWS = 512
_PRODUCT_BYTES = 24.0 * 512  # of a sample, with the queries that are multiplied at once
_AGAIN_BYTES = 28.0 * 2**22  # while candidates are measured again
_BLOCK_BYTES = 2.0**26
_MIN_BLOCK_ROWS = 64
_MAX_BLOCK_ROWS = 16_384


def can_stream(name: str, setting: Setting) -> bool:
    """Whether a head with this setting can be fitted by passes over stored rows."""
    if name == "svm":
        given = {"kernel": "rbf", "loss": "squared_hinge", **setting}
        return bool(given["kernel"] == "linear" and given["loss"] == "squared_hinge")
    return name in STREAMED and setting.get("penalty", "l2") == "l2"


@dataclass(frozen=True)
class MemoryPlan:
    """How the memory that a fit may take is parted.

    Attributes:
        needed_bytes: what it takes at least.
        block_rows: rows of a block.
        n_problems: of those solved by Newton or gradient steps, how many at a time.
        gram_dtype: of the Gram matrix that preconditions them; None for none.
        held_rows: that are held as they are stored: a shuffled part of an epoch, or the samples
            whose neighbours are searched for in one pass. 1 where there is no need to.
    """

    needed_bytes: float
    block_rows: int
    n_problems: int
    gram_dtype: type[np.float32] | type[np.float64] | None
    held_rows: int = 1

    @classmethod
    def of(
        cls,
        name: str,
        n_features: int,
        n_classes: int,
        n_parts: int,
        n_settings: int,
        room: float,
        n_neighbours: int = 0,
    ) -> MemoryPlan:
        """Part ``room`` bytes."""
        table = 8.0 * n_features * n_classes
        square = 8.0 * n_features**2
        row = 56.0 * n_features + (64 + 4 * n_settings) * n_classes
        kept = table * (n_parts + 1 + n_settings * max(1, n_parts - 1) / 2)
        vectors = _VECTORS.get(name, 0) * (table / 2 + 4 * n_classes)
        held_row = 0.0
        gram_dtype: type[np.float32] | type[np.float64] | None = None
        if name == "ridge":
            kept += square * (n_parts + 2)
        elif name == "linear":
            held_row = 8.0 * n_features  # and as much for the next ones
        elif name == "knn":
            kept = table * (n_parts + 1) + _AGAIN_BYTES
            row += _PRODUCT_BYTES
            held_row = 16.0 * n_features + 80.0 * (n_neighbours + 8)
        least = kept + vectors + _MIN_BLOCK_ROWS * row + _MIN_HELD_ROWS * held_row
        if name in ("logreg", "svm"):
            # Without a Gram matrix it works too, in more passes.
            fitting: list[tuple[type[np.float32] | type[np.float64], float]] = [
                (dtype, size)
                for dtype, size in ((np.float64, 3.0 * square), (np.float32, 1.5 * square))
                if least + size <= 0.8 * room
            ]
            if fitting:
                gram_dtype, size = fitting[0]
                kept += size
        # What is freed is not all given back: a third of the rest stays unplanned.
        left = (room - kept - vectors) / 1.5
        held_rows = 1
        if held_row:
            held_rows = int(max(_MIN_HELD_ROWS, min(_HELD_BYTES, left / 2) // held_row))
            left -= held_rows * held_row
        block_bytes = min(_BLOCK_BYTES, left / 2)
        n_problems = 1 + int(max(0.0, left - block_bytes) // max(1.0, vectors))
        # A pass holds the scores of all problems at once.
        row += 32.0 * n_classes * (min(n_problems, n_settings) - 1 if vectors else 0)
        block_rows = int(min(max(block_bytes // row, _MIN_BLOCK_ROWS), _MAX_BLOCK_ROWS))
        return cls(least, block_rows, n_problems, gram_dtype, held_rows)


@dataclass(frozen=True)
class Fitted:
    """A head with one setting that has not seen one part.

    Attributes:
        setting: place among the settings.
        left_out: the part; 0 where it has seen all.
        head: fitted; None where that failed.
        failure: why.
    """

    setting: int
    left_out: int
    head: Any = None
    failure: str = ""


class StreamedFit:
    """Heads of one kind on stored rows.

    Args:
        name: of :data:`STREAMED`.
        features: where the rows are.
        parts: classes and parts of them.
        kind: of scaling.
        widths: features of each layer.
        settings: that will be fitted; all of them can be streamed.
        plan: of the memory.
    """

    def __init__(
        self,
        name: str,
        features: StoredFeatures,
        parts: Parts,
        kind: str,
        widths: tuple[int, ...],
        settings: Sequence[Setting],
        plan: MemoryPlan,
    ) -> None:
        self.name, self.parts, self.kind, self.widths = name, parts, kind, widths
        self.settings, self.plan = settings, plan
        self.rows = StoredRows(features, plan.block_rows)
        self._basis: Basis | None = None
        # Rows of length one can be had a block at a time; means and variances have to be learned.
        plain = Scaler("none" if kind == "standardise" else kind, widths)
        tables, self._grams = self._gram_tables()
        self.moments: Moments = gather(
            self.rows, parts, plain, tables, dtype=plan.gram_dtype or np.float64
        )

    def scaler(self, parts: Sequence[int]) -> Scaler:
        """The scaling that some parts teach."""
        return self.moments.scaler(self.kind, self.widths, list(parts))

    def fit(
        self,
        chosen: Sequence[int],
        left_out: Sequence[int],
        scaler: Scaler,
        start: tuple[Head, Scaler] | None = None,
    ) -> list[Fitted]:
        """Fit some settings, each on all parts but one.

        Args:
            chosen: places of the settings.
            left_out: parts, each left out once; 0 for none.
            scaler: of the features.
            start: a head that is near, and its scaling.
        """
        fitted, heads = [], {}
        for i in chosen:
            head: Any = head_class(self.name)(**self.settings[i])
            try:
                head.check_params()
            except FIT_ERRORS as error:
                failure = f"{type(error).__name__}: {error}"
                fitted += [Fitted(i, part, failure=failure) for part in left_out]
            else:
                heads[i] = head
        jobs = [(i, part) for i in heads for part in left_out]
        if self.name == "ridge":
            return fitted + [self._ridge(i, part, heads[i], scaler) for i, part in jobs]
        if self.name == "prototype":
            return fitted + self._prototypes(heads, jobs, scaler)
        if self.name == "knn":
            return fitted + self._neighbours(heads, jobs, scaler)
        if self.name == "linear":
            return fitted + self._gradient(heads, jobs, scaler)
        for first in range(0, len(jobs), self.plan.n_problems):
            batch = jobs[first : first + self.plan.n_problems]
            fitted += self._newton(heads, batch, scaler, start)
        return fitted

    def queries(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.intp], Any]]:
        """One pass over samples that will be scored; as many at a time as the plan allows."""
        return self.rows.gathered(wanted, self.plan.held_rows if self.name == "knn" else 1)

    def logits(
        self, heads: Mapping[int, Head], X: NDArray[np.float32]
    ) -> Iterator[tuple[slice, dict[int, Any]]]:
        """Scores of some heads, fitted on the same samples.

        Args:
            heads: by setting.
            X: (n, n_features), scaled.

        Yields:
            Rows of X, and their scores (n_rows, n_classes) by setting.
        """
        if self.name != "knn":
            yield slice(None), {i: head.logits(X) for i, head in heads.items()}
            return
        asked: list[Any] = list(heads.values())
        found = StoredKNNHead.neighbours(asked, X)
        for start in range(0, len(X), self.plan.block_rows):
            own = slice(start, start + self.plan.block_rows)
            part = {
                metric: Neighbours(one.index[own], one.similarity[own])
                for metric, one in found.items()
            }
            shares = StoredKNNHead.shares(asked, part)
            yield own, {i: np.log(one) for i, one in zip(heads, shares, strict=True)}

    def _gram_tables(self) -> tuple[Floats, dict[tuple[str, int], list[int]]]:
        """Weights (n_grams, n_parts, n_classes), and which to add up for a fit."""
        parts = self.parts
        shape = (parts.n_parts, parts.n_classes)
        if self.name != "ridge":
            return np.ones((int(self.plan.gram_dtype is not None), *shape)), {}
        tables: list[Floats] = []
        places: dict[tuple[str, int], list[int]] = {}
        weights = {repr(w): w for w in (s.get("class_weight") for s in self.settings)}
        occupied = np.flatnonzero(parts.counts().sum(axis=1))
        for key, class_weight in weights.items():
            if class_weight is None:
                # Every fit is a sum of parts.
                first = len(tables)
                tables += [np.eye(parts.n_parts)[:, [p]].repeat(shape[1], 1) for p in occupied]
                for part in range(parts.n_parts):
                    places[key, part] = [
                        first + i for i, p in enumerate(occupied) if not part or p != part
                    ]
            else:
                for part in range(parts.n_parts):
                    places[key, part] = [len(tables)]
                    tables.append(parts.weights(part, class_weight))
        return np.array(tables), places

    def _finish(self, head: Any, classes: NDArray[np.intp]) -> Any:
        head.classes_ = classes
        head.n_features_in_ = self.rows.n_features
        head.converged_ = True
        return head

    def _ridge(self, i: int, part: int, head: Any, scaler: Scaler) -> Fitted:
        weights = self.parts.weights(part, head.class_weight)
        grams = self._grams[repr(head.class_weight), part]
        try:
            ((coef, intercept),) = solve_ridge(self.moments, grams, weights, scaler, [head.alpha])
        except FIT_ERRORS as error:
            return Fitted(i, part, failure=f"{type(error).__name__}: {error}")
        self._finish(head := type(head)(**head.get_params()), _known(self.parts, weights))
        head.coef_, head.intercept_ = coef.astype(np.float32), intercept.astype(np.float32)
        return Fitted(i, part, head)

    def _newton(
        self,
        heads: Mapping[int, Any],
        jobs: Jobs,
        scaler: Scaler,
        start: tuple[Head, Scaler] | None,
    ) -> list[Fitted]:
        device = solver_device(heads[jobs[0][0]].device)
        if self._basis is None:
            self._basis = Basis.of(self.moments, scaler, device)
        problems = []
        for i, part in jobs:
            head = heads[i]
            weights = self.parts.weights(part, head.class_weight)
            known = _known(self.parts, weights)
            problem = LinearProblem(
                self.name == "svm", 1 / head.C, weights, known, tol=head.tol, max_iter=head.max_iter
            )
            problems.append(_started(problem, start, scaler, device))
        fits = solve_linear(self.rows, self.parts, scaler, problems, self._basis, device)
        done = []
        for (i, part), problem, fit in zip(jobs, problems, fits, strict=True):
            params = fit.params.reshape(problem.n_columns, -1).cpu().numpy()
            if not np.isfinite(params).all():
                done.append(Fitted(i, part, failure="ArithmeticError: its scores are not numbers"))
                continue
            head = self._finish(type(heads[i])(**heads[i].get_params()), problem.classes)
            head.coef_ = np.ascontiguousarray(params[:, :-1])
            head.intercept_ = params[:, -1].copy()
            head.n_iter_, head.converged_ = fit.n_iter, fit.converged
            if self.name == "svm":
                head.approximation_ = ""
            done.append(Fitted(i, part, head))
        return done

    def _gradient(self, heads: Mapping[int, Any], jobs: Jobs, scaler: Scaler) -> list[Fitted]:
        """Softmax layers: those that train alike share their passes, an epoch each."""
        companies: defaultdict[Any, list[int]] = defaultdict(list)
        for i, part in jobs:
            training = heads[i].training(solver_device(heads[i].device))
            companies[part, training, repr(heads[i].class_weight)].append(i)
        fitted = []
        for (part, training, _), members in companies.items():
            for first in range(0, len(members), self.plan.n_problems):
                chosen = members[first : first + self.plan.n_problems]
                weights = self.parts.weights(part, heads[chosen[0]].class_weight)
                known = _known(self.parts, weights)
                settings = [heads[i].member() for i in chosen]
                steps = SoftmaxSteps(
                    settings, self.rows.n_features, len(known),
                    optimizer=training.optimizer, device=training.device,
                )  # fmt: skip
                self._train(steps, training, weights, known, scaler)
                for place, i in enumerate(chosen):
                    failure = steps.failure(place)
                    if failure:
                        fitted.append(Fitted(i, part, failure=f"ArithmeticError: {failure}"))
                        continue
                    head = self._finish(type(heads[i])(**heads[i].get_params()), known)
                    head.weight_, head.bias_ = steps.arrays(place)
                    head.n_iter_ = training.n_epochs
                    fitted.append(Fitted(i, part, head))
        return fitted

    def _train(
        self,
        steps: SoftmaxSteps,
        training: Training,
        weights: Floats,
        known: NDArray[np.intp],
        scaler: Scaler,
    ) -> None:
        """All epochs. Where a block holds all rows, the batches are those of a fit in memory."""
        by_sample = self.parts.by_sample(weights)
        wanted = by_sample > 0
        by_sample /= by_sample[wanted].mean()
        n_batches = math.ceil(wanted.sum() / training.batch_size)
        held_rows = max(1, self.plan.held_rows // training.batch_size) * training.batch_size
        order = torch.Generator().manual_seed(training.seed)
        stretches = np.random.default_rng(training.seed)
        for _ in range(training.n_epochs):
            for samples, raw in self.rows.shuffled(wanted, held_rows, stretches):
                mixed = torch.randperm(len(samples), generator=order).numpy()
                for start in range(0, len(mixed), training.batch_size):
                    batch = mixed[start : start + training.batch_size]
                    own = samples[batch]
                    steps.step(
                        scaler(raw[batch]),
                        np.searchsorted(known, self.parts.codes[own]),
                        by_sample[own],
                        training.lr_factor(steps.n_steps, n_batches * training.n_epochs),
                    )

    def _neighbours(self, heads: Mapping[int, Any], jobs: Jobs, scaler: Scaler) -> list[Fitted]:
        """Nothing is learned but where the samples are."""
        fitted = []
        for part in dict.fromkeys(part for _, part in jobs):
            chosen = [i for i, own in jobs if own == part]
            weights = self.parts.weights(part, None)
            samples = np.flatnonzero(self.parts.by_sample(weights))
            stored = StoredSamples(self.rows, samples, scaler, self._mean(weights, scaler))
            made = StoredKNNHead.over(
                [heads[i] for i in chosen], stored, self.parts.codes[samples],
                self._variance(weights, scaler),
            )  # fmt: skip
            fitted += [Fitted(i, part, head) for i, head in zip(chosen, made, strict=True)]
        return fitted

    def _prototypes(self, heads: Mapping[int, Any], jobs: Jobs, scaler: Scaler) -> list[Fitted]:
        """The mean of each class, after the head's own scaling."""
        tables = [self.parts.weights(part, None) for _, part in jobs]
        means = [
            self._mean(table, scaler)
            if heads[i].normalise == "cl2n"
            else np.zeros(self.rows.n_features, np.float32)
            for (i, _), table in zip(jobs, tables, strict=True)
        ]
        shape = (len(jobs), self.parts.n_classes, self.rows.n_features)
        sums = np.zeros(shape)
        for samples, raw in self.rows.blocks(self.parts.numbers >= 0):
            X = scaler(raw)
            codes, numbers = self.parts.codes[samples], self.parts.numbers[samples]
            for j, (i, _) in enumerate(jobs):
                seen = tables[j][numbers, codes] > 0
                own = X[seen]
                if heads[i].normalise != "none":
                    own = l2_normalise(own - means[j])
                sums[j] += class_sums(own, codes[seen], self.parts.n_classes)
        fitted = []
        for j, (i, part) in enumerate(jobs):
            known = _known(self.parts, tables[j])
            counts = (tables[j] * self.moments.counts).sum(axis=0)[known]
            head = self._finish(type(heads[i])(**heads[i].get_params()), known)
            head.mean_ = means[j]
            head.prototypes_ = (sums[j, known] / counts[:, None]).astype(np.float32)
            fitted.append(Fitted(i, part, head))
        return fitted

    def _mean(self, weights: Floats, scaler: Scaler) -> NDArray[np.float32]:
        """Of the scaled samples that have a weight."""
        sums = np.einsum("pk,pkd->d", weights, self.moments.sums)
        mean = self.moments.shift + sums / (weights * self.moments.counts).sum()
        if scaler.mean is not None and scaler.scale is not None:
            mean = (mean - scaler.mean) / scaler.scale
        result: NDArray[np.float32] = mean.astype(np.float32)
        return result

    def _variance(self, weights: Floats, scaler: Scaler) -> float:
        """Mean squared distance to their mean of the scaled samples of the parts with a weight."""
        parts = weights.any(axis=1)
        total = self.moments.counts[parts].sum()
        mean = self.moments.sums[parts].sum(axis=(0, 1)) / total
        variance = self.moments.squares[parts].sum(axis=0) / total - np.square(mean)
        scale = 1.0 if scaler.scale is None else np.square(scaler.scale)
        return float((np.maximum(variance, 0) / scale).sum())


def _known(parts: Parts, weights: Floats) -> NDArray[np.intp]:
    """Codes of the classes that have a sample with a weight.

    Raises:
        ValueError: fewer than two.
    """
    known: NDArray[np.intp] = np.flatnonzero((weights * parts.counts()).sum(axis=0))
    return known


def _started(
    problem: LinearProblem, start: tuple[Head, Scaler] | None, scaler: Scaler, device: torch.device
) -> LinearProblem:
    """The problem, begun at the same map of the raw features; at zero where there is none."""
    if start is None or not np.array_equal(start[0].classes_, problem.classes):
        return problem
    head: Any = start[0]
    coef, intercept = head.coef_.astype(np.float64), head.intercept_.astype(np.float64)
    old = start[1]
    if old.mean is not None and old.scale is not None:
        assert scaler.mean is not None
        assert scaler.scale is not None
        raw = coef / old.scale
        intercept = intercept + raw @ (scaler.mean - old.mean)
        coef = raw * scaler.scale
    params = np.concatenate([coef, intercept[:, None]], axis=1)
    shape = (problem.n_lanes, problem.n_columns // problem.n_lanes, params.shape[1])
    begun = torch.tensor(params.reshape(shape), dtype=torch.float32, device=device)
    return replace(problem, start=begun)
