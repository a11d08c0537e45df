"""Which heads can be fitted by passes over stored rows, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.heads import head_class
from pipeline.heads.base import Head, solver_device
from pipeline.heads.features import StoredFeatures
from pipeline.heads.folds import FIT_ERRORS
from pipeline.heads.scaling import Scaler, l2_normalise
from pipeline.heads.streaming.moments import Moments, Parts, class_sums, gather
from pipeline.heads.streaming.newton import Basis, LinearProblem, solve_linear
from pipeline.heads.streaming.ridge import solve_ridge
from pipeline.heads.streaming.rows import StoredRows

Setting = Mapping[str, Any]
Floats = NDArray[np.float64]

STREAMED = ("logreg", "ridge", "svm", "prototype")
"""Heads with settings that can be fitted this way."""

_VECTORS = 12  # copies of its parameters that a problem of Newton steps holds at most
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
        n_problems: of those solved by Newton steps, how many at a time.
        gram_dtype: of the Gram matrix that preconditions them; None for none.
    """

    needed_bytes: float
    block_rows: int
    n_problems: int
    gram_dtype: type[np.float32] | type[np.float64] | None

    @classmethod
    def of(
        cls, name: str, n_features: int, n_classes: int, n_parts: int, n_settings: int, room: float
    ) -> MemoryPlan:
        """Part ``room`` bytes."""
        table = 8.0 * n_features * n_classes
        square = 8.0 * n_features**2
        row = 40.0 * n_features + (64 + 4 * n_settings) * n_classes
        kept = table * (n_parts + 1 + n_settings * max(1, n_parts - 1) / 2)
        vectors = 0.0
        gram_dtype: type[np.float32] | type[np.float64] | None = None
        if name == "ridge":
            kept += square * (n_parts + 2)
        elif name != "prototype":
            vectors = _VECTORS * (table / 2 + 4 * n_classes)
        least = kept + vectors + _MIN_BLOCK_ROWS * row
        if vectors:
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
        block_bytes = min(_BLOCK_BYTES, left / 2)
        n_problems = 1 + int(max(0.0, left - block_bytes) // max(1.0, vectors))
        # A pass holds the scores of all problems at once.
        row += 32.0 * n_classes * (min(n_problems, n_settings) - 1 if vectors else 0)
        block_rows = int(min(max(block_bytes // row, _MIN_BLOCK_ROWS), _MAX_BLOCK_ROWS))
        return cls(least, block_rows, n_problems, gram_dtype)


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
        for first in range(0, len(jobs), self.plan.n_problems):
            batch = jobs[first : first + self.plan.n_problems]
            fitted += self._newton(heads, batch, scaler, start)
        return fitted

    def _gram_tables(self) -> tuple[Floats, dict[tuple[str, int], list[int]]]:
        """Weights (n_grams, n_parts, n_classes), and which to add up for a fit."""
        parts = self.parts
        shape = (parts.n_parts, parts.n_classes)
        if self.name == "prototype" or (self.name != "ridge" and self.plan.gram_dtype is None):
            return np.zeros((0, *shape)), {}
        if self.name != "ridge":
            return np.ones((1, *shape)), {}
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
        jobs: Sequence[tuple[int, int]],
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

    def _prototypes(
        self, heads: Mapping[int, Any], jobs: Sequence[tuple[int, int]], scaler: Scaler
    ) -> list[Fitted]:
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
