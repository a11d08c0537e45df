"""Support vector machines."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from pipeline.errors import CorruptStoreError
from pipeline.heads.base import (
    Array,
    Head,
    decision,
    fit_inputs,
    linear_logits,
    predict_inputs,
    sample_weights,
    solver_device,
)
from pipeline.heads.folds import FIT_ERRORS, Fold, FoldResult, fit_one_by_one, fold_result
from pipeline.heads.kernels import (
    KernelMachine,
    fit_libsvm,
    fit_nystroem,
    kernel_logits,
    rbf_of,
    scale_gamma,
    squared_distances,
)
from pipeline.heads.linear_path import try_linear_settings
from pipeline.heads.threads import one_thread_each

KERNELS = ("linear", "rbf")
LOSSES = ("squared_hinge", "hinge")
_KERNEL_BYTES = 2**30


class SVMHead(Head):
    """Support vectors, linear (one-vs-rest) or with an RBF kernel (one-vs-one, libsvm).

    An RBF kernel is exact up to ``max_exact_rows`` samples, which takes 8 bytes for each pair of
    them. Beyond, it is approximated from ``n_components`` landmarks (Nyström), with the squared
    hinge, one-vs-rest, on top; ``approximation_`` says so.

    Args:
        kernel: "linear" or "rbf".
        C: inverse strength of the penalty on the summed loss.
        loss: of the linear kernel. "squared_hinge" leaves the intercept without a penalty;
            "hinge" is scikit-learn's LinearSVC, with a slight one.
        gamma: width of the RBF kernel exp(-gamma ‖x - s‖²), or "scale" for
            1 / (n_features · variance of X).
        class_weight: None, "balanced" or {class: weight}.
        tol: the solver's tolerance: the distance to the optimum relative to the objective, for
            the squared hinge; libsvm's and liblinear's own for the others.
        max_iter: iterations at most; libsvm has no limit.
        max_exact_rows: samples with a weight that an exact RBF kernel is made of at most.
        n_components: landmarks beyond that.
        seed: of the choice of landmarks, and of the order of liblinear.
        device: where the squared hinge is solved: "cpu", "cuda" or "auto".

    Attributes:
        approximation_: "nystroem", or "" where the kernel is exact.
        coef_, intercept_: the linear map; of an RBF kernel, ``intercept_`` is one a pair of
            classes, or one an output where it is approximated.
        support_vectors_: (n_vectors, n_features), grouped by class; or the landmarks. RBF only.
        dual_coef_: (n_classes - 1, n_vectors) as libsvm orders them; or (n_outputs, n_vectors),
            coefficients of the kernel values with the landmarks. RBF only.
        n_support_: (n_classes,), vectors of each class; none for landmarks. RBF only.
        gamma_: the kernel's width; RBF only.
        n_iter_: iterations that were made.
    """

    approximation_: str

    def __init__(
        self,
        kernel: str = "rbf",
        C: float = 1.0,
        *,
        loss: str = "squared_hinge",
        gamma: float | str = "scale",
        class_weight: Any = None,
        tol: float = 1e-3,
        max_iter: int = 1000,
        max_exact_rows: int = 20_000,
        n_components: int = 2048,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.kernel = kernel
        self.C = C
        self.loss = loss
        self.gamma = gamma
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.max_exact_rows = max_exact_rows
        self.n_components = n_components
        self.seed = seed
        self.device = device

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> Self:
        """Fit on X (n_samples, n_features), y (n_samples,)."""
        self.check_params()
        X, index = fit_inputs(self, X, y)
        problem = _Problem.of(self, X, index, self.classes_, sample_weight)
        if self.kernel == "rbf":
            return self._fit_rbf(problem)
        self.approximation_ = ""
        return self._fit_hinge(problem) if self.loss == "hinge" else self._fit_linear(problem)

    def check_params(self) -> None:
        """Raise ValueError where a parameter is out of its range."""
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is {self.kernel!r}, expected one of {', '.join(KERNELS)}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}, expected one of {', '.join(LOSSES)}")
        if not 0 < self.C < np.inf:
            raise ValueError(f"C is {self.C}, expected a number above 0")
        if self.gamma != "scale" and (
            isinstance(self.gamma, str) or not 0 < float(self.gamma) < np.inf
        ):
            raise ValueError(f"gamma is {self.gamma!r}, expected 'scale' or a number above 0")
        if not self.n_components >= 1:
            raise ValueError(f"n_components is {self.n_components}, expected 1 or more")
        if not self.max_exact_rows >= 0:
            raise ValueError(f"max_exact_rows is {self.max_exact_rows}, expected 0 or more")

    def _fit_linear(self, problem: _Problem) -> Self:
        from pipeline.heads.solvers.linear import fit_svm

        found = fit_svm(
            problem.X, problem.index, np.array([self.C]), sample_weight=problem.weights[None],
            tol=self.tol, max_iter=self.max_iter, device=solver_device(self.device),
        )  # fmt: skip
        self.coef_ = found.coef[0, 0]
        self.intercept_ = found.intercept[0, 0].astype(self.coef_.dtype)
        self.n_iter_, self.converged_ = int(found.n_iter[0, 0]), bool(found.converged[0, 0])
        return self

    def _fit_hinge(self, problem: _Problem) -> Self:
        solver = LinearSVC(
            loss="hinge",
            C=self.C,
            tol=self.tol,
            max_iter=self.max_iter,
            intercept_scaling=problem.row_length(),
            random_state=self.seed,
        )
        with warnings.catch_warnings():
            # converged_ says it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            solver.fit(problem.X, problem.index, sample_weight=problem.weights)
        self.coef_ = solver.coef_.astype(problem.X.dtype)
        self.intercept_ = np.atleast_1d(solver.intercept_).astype(problem.X.dtype)
        self.n_iter_ = int(solver.n_iter_)
        self.converged_ = self.n_iter_ < self.max_iter
        return self

    def _fit_rbf(self, problem: _Problem) -> Self:
        if problem.is_exact(self):
            kernel = rbf_of(squared_distances(problem.X, problem.X), problem.gamma)
            machine = fit_libsvm(kernel, problem.index, self.C, problem.weights, self.tol)
        else:
            (machine,) = problem.nystroem(self, [self.C])
        self.approximation_ = "" if len(machine.n_support) else "nystroem"
        self.support_vectors_ = problem.X[machine.rows]
        self.dual_coef_, self.intercept_ = machine.dual_coef, machine.intercept
        self.n_support_, self.gamma_ = machine.n_support, np.float64(problem.gamma)
        self.n_iter_, self.converged_ = machine.n_iter, machine.converged
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
        """Fit every setting on every fold; those that differ in C only share their work."""
        several = {"linear": _try_linear, "hinge": _try_hinge, "rbf": _try_rbf}
        kinds: dict[str, list[int]] = {}
        for i, setting in enumerate(settings):
            head = cls(**setting)
            try:
                head.check_params()
            except FIT_ERRORS as error:
                failure = f"{type(error).__name__}: {error}"
                yield from (FoldResult(i, f, 0.0, failure=failure) for f in range(len(folds)))
            else:
                is_hinge = head.kernel == "linear" and head.loss == "hinge"
                kinds.setdefault("hinge" if is_hinge else head.kernel, []).append(i)
        for kind, places in kinds.items():
            mine = [settings[i] for i in places]
            for result in several[kind](cls, mine, X, y, folds, n_classes):
                yield replace(result, setting=places[result.setting])

    def logits(self, X: Array) -> Array:
        """Decision values (n_samples, n_classes); no log-probabilities."""
        X = predict_inputs(self, X)
        if self.kernel == "linear":
            return linear_logits(X, self.coef_, self.intercept_)
        return kernel_logits(
            X,
            self.support_vectors_,
            float(self.gamma_),
            self.dual_coef_,
            self.intercept_,
            self.n_support_,
        )

    def decision_function(self, X: Array) -> Array:
        """scikit-learn's scores: (n_samples, n_classes), or (n_samples,) for two classes."""
        return decision(self.logits(X))

    def array_shapes(self) -> dict[str, tuple[str, ...]]:
        """Names and axes of the fitted arrays; exact and approximated kernels have the same."""
        if self.kernel == "linear":
            return {"coef_": ("outputs", "features"), "intercept_": ("outputs",)}
        return {
            "support_vectors_": ("vectors", "features"),
            "dual_coef_": ("rows", "vectors"),
            "intercept_": ("decisions",),
            "n_support_": ("groups",),
            "gamma_": (),
        }

    @classmethod
    def from_arrays(cls, params: Any, arrays: Any) -> Self:
        """Rebuild a fitted head; also checks that the arrays of a kernel fit each other."""
        head = super().from_arrays(params, arrays)
        head.approximation_ = ""
        if head.kernel == "rbf":
            head.approximation_ = "" if len(head.n_support_) else "nystroem"
            if not head._fits_together():
                raise CorruptStoreError(
                    f"The support vectors of the model do not fit its {len(head.classes_)} classes."
                )
        return head

    def _fits_together(self) -> bool:
        """Whether the arrays of an RBF kernel are those of one machine."""
        n_classes, n_vectors = len(self.classes_), len(self.support_vectors_)
        n_rows, n_decisions = len(self.dual_coef_), len(self.intercept_)
        counts = self.n_support_
        if not n_vectors or not self.gamma_ > 0 or counts.dtype.kind not in "iu":
            return False
        if self.approximation_:
            return n_rows == n_decisions == (1 if n_classes == 2 else n_classes)
        # The sum of huge counts could come out right by overflow.
        return bool(
            (n_rows, n_decisions) == (n_classes - 1, n_classes * (n_classes - 1) // 2)
            and len(counts) == n_classes
            and ((counts >= 0) & (counts <= n_vectors)).all()
            and counts.sum() == n_vectors
        )


@dataclass(frozen=True)
class _Problem:
    """Samples that weigh something.

    Attributes:
        X: (n_samples, n_features).
        index: (n_samples,), class indices.
        weights: (n_samples,), above 0.
        gamma: width of the kernel.
    """

    X: Array
    index: NDArray[np.intp]
    weights: NDArray[np.float64]
    gamma: float

    @classmethod
    def of(
        cls,
        head: SVMHead,
        X: Array,
        index: NDArray[np.intp],
        classes: Array,
        sample_weight: Array | None = None,
    ) -> _Problem:
        """Leave out what has no weight: libsvm would lose count of it.

        Raises:
            ValueError: a class without a weight above 0, or a negative weight.
        """
        own = sample_weights(X, classes[index], None, sample_weight)
        weights = own * sample_weights(X, classes[index], head.class_weight)
        if (weights < 0).any():
            raise ValueError("sample_weight and class_weight hold a value below 0")
        kept = weights > 0
        missing = np.setdiff1d(np.arange(len(classes)), index[kept])
        if len(missing):
            raise ValueError(f"class {classes[missing[0]]} has no sample with a weight above 0")
        gamma = scale_gamma(X, own) if head.gamma == "scale" else float(head.gamma)
        if kept.all():
            return cls(X, index, weights, gamma)
        return cls(X[kept], index[kept], weights[kept], gamma)

    def is_exact(self, head: SVMHead) -> bool:
        """Whether the head makes an exact kernel of so many samples."""
        return len(self.X) <= head.max_exact_rows

    def row_length(self) -> float:
        """Root of the mean squared length of a sample, or 1: as long an intercept is no burden."""
        mean = np.average(np.square(self.X).sum(axis=1, dtype=np.float64), weights=self.weights)
        return float(np.sqrt(mean)) or 1.0

    def nystroem(self, head: SVMHead, C: Sequence[float]) -> list[KernelMachine]:
        """The head at several C, on landmarks."""
        return fit_nystroem(
            self.X, self.index, C, self.weights,
            gamma=self.gamma, n_components=head.n_components, seed=head.seed,
            tol=head.tol, max_iter=head.max_iter, device=head.device,
        )  # fmt: skip


# Many settings


def _try_linear(
    cls: type[SVMHead],
    settings: Sequence[Mapping[str, Any]],
    X: Array,
    y: Array,
    folds: Sequence[Fold],
    n_classes: int,
) -> Iterator[FoldResult]:
    """Squared hinge: every C and fold in one call."""
    from pipeline.heads.solvers.linear import fit_svm

    return try_linear_settings(
        cls, settings, X, y, folds, n_classes=n_classes, solver=lambda _: fit_svm
    )


def _try_hinge(
    cls: type[SVMHead],
    settings: Sequence[Mapping[str, Any]],
    X: Array,
    y: Array,
    folds: Sequence[Fold],
    n_classes: int,
) -> list[FoldResult]:
    """Hinge: each by itself."""
    with warnings.catch_warnings():
        # Threads that set filters one by one would leave them in disorder: this puts them back.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return list(fit_one_by_one(cls, settings, X, y, folds, n_classes))


def _try_rbf(
    cls: type[SVMHead],
    settings: Sequence[Mapping[str, Any]],
    X: Array,
    y: Array,
    folds: Sequence[Fold],
    n_classes: int,
) -> Iterator[FoldResult]:
    """RBF: one kernel for every C, from distances that all widths and folds share.

    The fits run side by side, of as many kernels as fit in memory.
    """
    groups: dict[str, list[int]] = {}
    for i, setting in enumerate(settings):
        others = {name: value for name, value in cls(**setting).get_params().items() if name != "C"}
        groups.setdefault(repr(others), []).append(i)
    jobs = [(places, f) for places in groups.values() for f in range(len(folds))]
    largest = max((len(fold.fit) + len(fold.choose)) * len(fold.fit) for fold in folds)
    n_at_once = max(1, _KERNEL_BYTES // (8 * max(1, largest)))
    most = max(cls(**setting).max_exact_rows for setting in settings)
    some_exact = min(len(fold.fit) for fold in folds) <= most
    # Where few rows of X are used, a table of all would be larger than what it saves.
    worth = len(jobs) > 1 and some_exact and len(X) ** 2 <= 2 * largest
    distances = squared_distances(X, X) if worth else None
    for start in range(0, len(jobs), n_at_once):
        tasks = []
        for places, f in jobs[start : start + n_at_once]:
            heads = [cls(**settings[i]) for i in places]
            try:
                shared = _Shared.of(heads, X, y, folds[f], distances)
            except FIT_ERRORS:
                mine = [settings[i] for i in places]
                for result in fit_one_by_one(cls, mine, X, y, [folds[f]], n_classes):
                    yield replace(result, setting=places[result.setting], fold=f)
                continue
            tasks += [delayed(shared.result)(k, i, f, n_classes) for k, i in enumerate(places)]
        with one_thread_each():
            yield from Parallel(n_jobs=-1, prefer="threads", return_as="generator")(tasks)


@dataclass(frozen=True)
class _Shared:
    """What heads that differ in C share on one fold.

    Attributes:
        heads: not fitted.
        classes: (n_classes,), codes that the fold has.
        problem: its samples.
        machines: of each head, on landmarks; none where the kernel is exact.
        fitted: kernel of the samples among themselves, or (0, 0) on landmarks.
        chosen: kernel of the rows that choose with the samples, or with the landmarks.
        seconds: a head's share of the time.
    """

    heads: Sequence[SVMHead]
    classes: Array
    problem: _Problem
    machines: Sequence[KernelMachine]
    fitted: NDArray[np.float64]
    chosen: NDArray[np.float64]
    seconds: float

    @classmethod
    def of(
        cls, heads: Sequence[SVMHead], X: Array, y: Array, fold: Fold, distances: Array | None
    ) -> _Shared:
        """Make the kernel, or solve on landmarks.

        Args:
            heads: not fitted, different in C only.
            X, y: all rows.
            fold: those that fit and those that choose.
            distances: squared, of all rows; None to measure those of the fold.

        Raises:
            ValueError: not two classes, or one without a weight.
        """
        started = time.perf_counter()
        classes, index = np.unique(y[fold.fit], return_inverse=True)
        if len(classes) < 2:
            raise ValueError("the fold has one class only")
        # Each class has a weight, and so each row has one: none is left out.
        problem = _Problem.of(heads[0], X[fold.fit], index, classes)
        machines: list[KernelMachine] = []
        fitted, columns = np.zeros((0, 0)), fold.fit
        if problem.is_exact(heads[0]):
            within = _between(X, fold.fit, fold.fit, distances)
            fitted = rbf_of(within, problem.gamma)
        else:
            machines = problem.nystroem(heads[0], [head.C for head in heads])
            columns = fold.fit[machines[0].rows]
        chosen = rbf_of(_between(X, fold.choose, columns, distances), problem.gamma)
        share = (time.perf_counter() - started) / len(heads)
        return cls(heads, classes, problem, machines, fitted, chosen, share)

    def result(self, k: int, i: int, f: int, n_classes: int) -> FoldResult:
        """Of head ``k``, which is setting number ``i``, on fold number ``f``."""
        started = time.perf_counter()
        head, problem = self.heads[k], self.problem
        try:
            if self.machines:
                machine, kernel = self.machines[k], self.chosen
            else:
                machine = fit_libsvm(self.fitted, problem.index, head.C, problem.weights, head.tol)
                kernel = self.chosen[:, machine.rows]
            logits = machine.logits(kernel)
        except FIT_ERRORS as error:
            failure = f"{type(error).__name__}: {error}"
            return FoldResult(i, f, self.seconds + time.perf_counter() - started, failure=failure)
        seconds = self.seconds + time.perf_counter() - started
        return fold_result(i, f, seconds, logits, self.classes, n_classes, machine.converged)


def _between(
    X: Array, rows: NDArray[np.intp], columns: NDArray[np.intp], distances: Array | None
) -> Array:
    """Squared distances of some rows of X to others, from the table of all where there is one."""
    if distances is None:
        return squared_distances(X[rows], X[columns])
    return np.asarray(distances[np.ix_(rows, columns)])
