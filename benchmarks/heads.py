"""Heads beside scikit-learn: many penalties, folds and classes on one X.

Both sides run in turns in one process on the same features. scikit-learn fits one value at a
time; its total for a grid is estimated from values evenly spaced over it, as the table says.
Features: --features FOLDER with X_train.npy, y_train.npy, X_test.npy and y_test.npy, else drawn.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _bench import print_header, print_table, spread
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC, LinearSVC

from pipeline.heads.folds import Fold
from pipeline.heads.logistic import LogisticHead
from pipeline.heads.solvers.design import make_design
from pipeline.heads.solvers.linear import Solution, fit_logistic, fit_svm
from pipeline.heads.solvers.ridge import fit_ridge
from pipeline.heads.svm import SVMHead

Array = NDArray[Any]
PARTS = ("grid", "intelex", "folds", "single", "small", "cv", "svm", "kernel", "ridge")


class Bench:
    """The features, the options and the rows of the last table."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[list[str]] = []
        X, y, X_test, y_test = features(options)
        mean, scale = X.mean(axis=0), X.std(axis=0)
        scale[scale == 0] = 1
        self.X, self.X_test = (X - mean) / scale, (X_test - mean) / scale
        self.y, self.y_test = y, y_test

    def verdict(self, what: str, target: str, found: str, met: bool) -> None:
        self.rows.append(
            [what, target, found, "—" if target == "—" else "met" if met else "missed"]
        )


def features(options: argparse.Namespace) -> tuple[Array, Array, Array, Array]:
    """Train and test; drawn ones have a spectrum that falls as 1 / rank, as networks' do."""
    if options.features:
        names = ("X_train", "y_train", "X_test", "y_test")
        X, y, X_test, y_test = (np.load(options.features / f"{name}.npy") for name in names)
        if options.rows > len(X):  # nothing that is scored on may be fitted on
            raise SystemExit(f"{options.features} holds {len(X):,} rows to fit on: use --rows.")
        order = np.random.default_rng(0).permutation(len(X))  # files are often sorted by class
        X, y = X[order], y[order]
    else:
        X, y = drawn(options.rows + 2_000, options.columns, 10)
        X, X_test, y, y_test = X[:-2_000], X[-2_000:], y[:-2_000], y[-2_000:]
    rows, columns = options.rows, options.columns
    return X[:rows, :columns], y[:rows], X_test[:, :columns], y_test


def drawn(n_samples: int, n_features: int, n_classes: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    y = np.arange(n_samples) % n_classes
    spectrum = 1 / np.sqrt(1 + np.arange(n_features))
    scores = rng.standard_normal((n_samples, n_features)) * spectrum
    scores += 1.2 * (rng.standard_normal((n_classes, n_features)) * spectrum)[y]
    turn = np.linalg.qr(rng.standard_normal((n_features, n_features)))[0]
    return (scores @ turn).astype(np.float32), y


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def sampled(grid: Array, n_values: int) -> list[int]:
    """Places of evenly spaced values, both ends among them."""
    return sorted({round(i) for i in np.linspace(0, len(grid) - 1, min(n_values, len(grid)))})


def objective(bench: Bench, C: float, coef: Array, intercept: Array, X: Array, y: Array) -> float:
    """scikit-learn's objective of a softmax fit, in float64."""
    scores = X.astype(np.float64) @ coef.T.astype(np.float64) + intercept
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(y)), y]
    return float(C * losses.sum() + 0.5 * np.square(coef, dtype=np.float64).sum())


def logistic(C: float, X: Array, y: Array) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=C, tol=1e-6, max_iter=1000).fit(X, y)


def against_logistic(bench: Bench, name: str, X: Array, y: Array, grid: Array, n_theirs: int,
                     least: float, test: tuple[Array, Array] | None) -> None:  # fmt: skip
    ours: list[float] = []
    for _ in range(bench.options.repeats):
        seconds, found = timed(lambda: fit_logistic(X, y, grid))
        ours.append(seconds)
        print(f"  {name}: ours {seconds:.1f} s", flush=True)
    places = sampled(grid, n_theirs)
    theirs, behind, gaps = [], [], []
    for i in places:
        seconds, model = timed(lambda i=i: logistic(grid[i], X, y))
        theirs.append(seconds)
        best = objective(bench, grid[i], model.coef_, model.intercept_, X, y)
        own = objective(bench, grid[i], found.coef[0, i], found.intercept[0, i], X, y)
        behind.append(own / best - 1)
        line = f"  C = {grid[i]:.2g}: theirs {seconds:.1f} s, objective {behind[-1]:+.1e}"
        if test is not None:
            scores = test[0] @ found.coef[0, i].T + found.intercept[0, i]
            gaps.append(100 * (np.mean(scores.argmax(1) == test[1]) - model.score(*test)))
            line += f", accuracy {gaps[-1]:+.2f} points"
        print(line, flush=True)
    total = float(np.mean(theirs)) * len(grid)
    ratios = [total / seconds for seconds in ours]
    what = f"{name} (theirs {total:.0f} s from {len(places)} values; ours {spread(ours, 1)} s)"
    bench.verdict(what, f"≥ {least:g}×", f"{spread(ratios, 1)}×", np.median(ratios) >= least)
    worst = max(behind)
    bench.verdict(f"{name}: objective", "≤ 1e-4 above", f"{worst:+.1e}", worst <= 1e-4)
    n_bad = int((~found.converged).sum())
    bench.verdict(f"{name}: not converged", "0", str(n_bad), n_bad == 0)
    # Where scikit-learn stopped far above the optimum there is no accuracy to agree with.
    at_optimum = np.abs(behind) <= 1e-3
    if gaps and at_optimum.any():
        mean = float(np.mean(np.array(gaps)[at_optimum]))
        what = f"{name}: accuracy at {at_optimum.sum()} values where theirs is at the optimum"
        bench.verdict(what, "within 0.1", f"{mean:+.3f}", abs(mean) <= 0.1)
    if gaps and not at_optimum.all():
        mean = float(np.mean(np.array(gaps)[~at_optimum]))
        most = 1 / (1 + min(behind))
        what = f"{name}: accuracy elsewhere (their objective up to {most:.0f}× ours)"
        bench.verdict(what, "—", f"{mean:+.3f}", True)


def grid(bench: Bench) -> None:
    values = np.logspace(-6, 6, 12 if bench.options.quick else 96)
    n_theirs = 4 if bench.options.quick else 16
    test = bench.X_test, bench.y_test
    against_logistic(
        bench, f"{len(values)} values of C", bench.X, bench.y, values, n_theirs, 30, test
    )


def intelex(bench: Bench) -> None:
    """The grid again, beside scikit-learn-intelex where that is installed."""
    try:
        from sklearnex.linear_model import LogisticRegression as IntelLogisticRegression
    except ModuleNotFoundError:
        bench.verdict("scikit-learn-intelex", "≥ 15×", "not installed", False)
        return
    values = np.logspace(-6, 6, 12 if bench.options.quick else 96)
    ours, found = timed(lambda: fit_logistic(bench.X, bench.y, values))
    print(f"  {len(values)} values of C: ours {ours:.1f} s", flush=True)
    theirs, behind = [], []
    for i in sampled(values, 4 if bench.options.quick else 8):
        model = IntelLogisticRegression(C=values[i], tol=1e-6, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            seconds, _ = timed(lambda model=model: model.fit(bench.X, bench.y))
        theirs.append(seconds)
        best = objective(bench, values[i], model.coef_, model.intercept_, bench.X, bench.y)
        own = objective(bench, values[i], found.coef[0, i], found.intercept[0, i], bench.X, bench.y)
        behind.append(own / best - 1)
        print(
            f"  C = {values[i]:.2g}: theirs {seconds:.1f} s, objective {behind[-1]:+.1e}",
            flush=True,
        )
    total = float(np.mean(theirs)) * len(values)
    what = f"{len(values)} values of C, scikit-learn-intelex ({total:.0f} s from {len(theirs)})"
    bench.verdict(what, "≥ 15×", f"{total / ours:.1f}×", total / ours >= 15)


def small(bench: Bench) -> None:
    X, y = drawn(500, 2_048, 100)
    X = (X - X.mean(0)) / X.std(0)
    values = np.logspace(-6, 5, 45)
    n_theirs = 4 if bench.options.quick else 16
    against_logistic(bench, "500 × 2,048, 100 classes, 45 C", X, y, values, n_theirs, 30, None)


def folds(bench: Bench) -> None:
    values = np.logspace(-6, 5, 12 if bench.options.quick else 45)
    kept = np.random.default_rng(0).integers(0, 5, len(bench.y)) != np.arange(5)[:, None]
    ratios = []
    for _ in range(bench.options.repeats):
        design = make_design(bench.X)
        fit = partial(fit_logistic, design, bench.y, values)
        alone, whole = timed(fit)
        more, found = timed(partial(fit, sample_weight=kept, start=whole))
        ratios.append(more / alone)
        print(f"  folds: alone {alone:.1f} s, folds {more:.1f} s", flush=True)
        print(f"  folds that did not converge: {int((~found.converged).sum())}")
    what = f"5 folds at {len(values)} values, against the {len(values)} alone"
    bench.verdict(what, "≤ 3.5×", f"{spread(ratios)}×", np.median(ratios) <= 3.5)
    both = [1 + ratio for ratio in ratios]
    bench.verdict("the same, with the 45 alone counted in", "—", f"{spread(both)}×", True)


def single(bench: Bench) -> None:
    for C in (1e-3, 1.0):
        ratios = []
        for _ in range(bench.options.repeats):
            ours, _ = timed(lambda C=C: fit_logistic(bench.X, bench.y, [C]))
            theirs, _ = timed(lambda C=C: logistic(C, bench.X, bench.y))
            ratios.append(theirs / ours)
            print(f"  one C = {C:g}: ours {ours:.1f} s, theirs {theirs:.1f} s", flush=True)
        bench.verdict(f"one fit, C = {C:g}", "≥ 2×", f"{spread(ratios)}×", np.median(ratios) >= 2)


def cv(bench: Bench) -> None:
    """What a sweep does over folds, scores included, beside LogisticRegressionCV."""
    rows = slice(0, 2_000 if bench.options.quick else 5_000)
    X, y = bench.X[rows], bench.y[rows]
    values = np.logspace(-5, 1, 10)
    folds = [Fold(*parts) for parts in StratifiedKFold(5).split(X, y)]
    settings = [{"C": value} for value in values]
    n_classes = int(y.max()) + 1
    ours, results = timed(
        lambda: list(LogisticHead.try_settings(settings, X, y, folds, n_classes=n_classes))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, model = timed(
            lambda: LogisticRegressionCV(
                Cs=values, cv=[(f.fit, f.choose) for f in folds], max_iter=1000, refit=False
            ).fit(X, y)
        )
    right = np.zeros((5, 10))
    for r in results:
        right[r.fold, r.setting] = np.mean(r.logits.argmax(1) == y[folds[r.fold].choose])
    scores = model.scores_
    scores = np.asarray(next(iter(scores.values())) if isinstance(scores, dict) else scores)
    apart = float(np.abs(right.mean(0) - scores.reshape(5, 10).mean(0)).max())
    what = f"{len(X):,} rows, 10 C × 5 folds, against LogisticRegressionCV ({theirs:.0f} s)"
    bench.verdict(what, "—", f"{theirs / ours:.1f}×", True)
    bench.verdict("LogisticRegressionCV: accuracy of folds", "—", f"≤ {apart:.4f} apart", True)


def kernel(bench: Bench) -> None:
    """The RBF kernel made once for every C, scores included, beside one SVC after the other."""
    rows = slice(0, 2_000 if bench.options.quick else 8_000)
    X, y = bench.X[rows], bench.y[rows]
    cut = len(X) * 4 // 5
    fold = Fold(np.arange(cut), np.arange(cut, len(X)))
    values = [0.3, 1.0, 3.0, 10.0, 30.0]
    settings = [{"kernel": "rbf", "C": value} for value in values]
    n_classes = int(y.max()) + 1
    ours, results = timed(
        lambda: list(SVMHead.try_settings(settings, X, y, [fold], n_classes=n_classes))
    )
    theirs, agree = 0.0, []
    for i in (0, 2, 4):
        seconds, predicted = timed(
            lambda i=i: SVC(C=values[i]).fit(X[:cut], y[:cut]).predict(X[cut:])
        )
        theirs += seconds
        own = next(r for r in results if r.setting == i).logits.argmax(1)
        agree.append(float(np.mean(own == predicted)))
    total = theirs * len(values) / 3
    what = f"RBF SVC, {cut:,} rows, 5 values of C (theirs {total:.0f} s from 3)"
    bench.verdict(what, "—", f"{total / ours:.1f}×", True)
    bench.verdict("RBF SVC: same predictions", "—", f"{min(agree):.4f} of samples", True)


def svm(bench: Bench) -> None:
    values = np.logspace(-6, 2, 25)
    scaling = 10.0
    ours, found = timed(lambda: fit_svm(bench.X, bench.y, values))
    print(f"  svm: ours {ours:.1f} s", flush=True)
    places = sampled(values[:17], 2 if bench.options.quick else 5)
    theirs, behind = [], []
    for i in places:
        model = LinearSVC(C=values[i], dual=False, intercept_scaling=scaling)
        seconds, _ = timed(lambda model=model: model.fit(bench.X, bench.y))
        theirs.append(seconds)
        best = hinge(bench, values[i], model.coef_, model.intercept_)
        behind.append(hinge(bench, values[i], found.coef[0, i], found.intercept[0, i]) / best - 1)
        print(f"  C = {values[i]:.2g}: theirs {seconds:.1f} s, objective {behind[-1]:+.1e}")
    # The weaker the penalty the longer it takes, soon many minutes: counted as the last measured.
    total = float(np.interp(np.arange(len(values)), places, theirs).sum())
    what = f"linear SVM, 25 C (theirs at least {total:.0f} s, from {len(places)} of the first 17)"
    bench.verdict(what, "≥ 50×", f"{total / ours:.1f}×", total / ours >= 50)
    bench.verdict(
        "linear SVM: objective", "≤ 1e-3 above", f"{max(behind):+.1e}", max(behind) <= 1e-3
    )
    bench.verdict("linear SVM: not converged", "0", str(_unfinished(found)), found.converged.all())


def _unfinished(found: Solution) -> int:
    return int((~found.converged).sum())


def hinge(bench: Bench, C: float, coef: Array, intercept: Array) -> float:
    """The objective without a penalty on the intercept, in float64, summed over classes."""
    signs = np.where(bench.y[:, None] == np.arange(len(coef)), 1.0, -1.0)
    margin = np.maximum(0, 1 - signs * (bench.X.astype(np.float64) @ coef.T + intercept))
    return float(C * np.square(margin).sum() + 0.5 * np.square(coef, dtype=np.float64).sum())


def ridge(bench: Bench) -> None:
    values = np.logspace(-3, 6, 100)
    ours, found = timed(lambda: fit_ridge(bench.X, bench.y, values))
    print(f"  ridge: ours {ours:.1f} s", flush=True)
    n_theirs = 10 if bench.options.quick else 100
    seconds, model = timed(
        lambda: RidgeClassifierCV(alphas=values[:: 100 // n_theirs]).fit(bench.X, bench.y)
    )
    print(f"  ridge: theirs {seconds:.1f} s for {n_theirs} values", flush=True)
    bench.verdict(
        f"ridge, 100 values (theirs: {n_theirs} values)",
        "≥ 20×",
        f"{seconds / ours:.1f}×",
        seconds / ours >= 20,
    )
    i = int(np.flatnonzero(values == model.alpha_)[0])
    far = float(np.abs(found.coef[i] - model.coef_).max() / np.abs(model.coef_).max())
    bench.verdict("ridge: coefficients", "≤ 1e-3 apart", f"{far:.1e}", far <= 1e-3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--features", type=Path, help="folder of X_train.npy and so on")
    parser.add_argument("--rows", type=int, default=20_000, help="training samples")
    parser.add_argument("--columns", type=int, default=1_280, help="features")
    parser.add_argument("--repeats", type=int, default=2, help="turns of our side")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="try it: 3,000 × 320, few values")
    parser.add_argument("--gpu", action="store_true", help="1,280,000 × 2,048, 1,000 classes")
    parser.add_argument("--device", default="cuda", help="of --gpu; cpu tries it with little")
    options = parser.parse_args()
    if options.gpu:
        whole = options.device != "cpu"
        options.rows, options.columns, options.classes = (
            (1_280_000, 2_048, 1_000) if whole else (4_000, 64, 10)
        )
        return options
    if options.quick:
        options.rows, options.columns, options.repeats = 3_000, 320, 1
    if unknown := set(options.only.split(",")) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    return options


def main() -> None:
    options = parse()
    if options.gpu:
        import _heads_gpu

        _heads_gpu.run(options)
        return
    print_header("Heads beside scikit-learn: ratios are theirs / ours, median (least–most)")
    bench = Bench(options)
    print(f"  features: {bench.X.shape[0]:,} × {bench.X.shape[1]:,}, {bench.y.max() + 1} classes\n")
    parts = {p.__name__: p for p in (grid, intelex, folds, single, small, cv, svm, kernel, ridge)}
    for name in PARTS:
        if name in options.only.split(","):
            parts[name](bench)
    print("\nTargets\n")
    print_table(["what", "target", "found", "verdict"], bench.rows)


if __name__ == "__main__":
    main()
