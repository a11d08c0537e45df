"""Logistic regression of many classes on a GPU: what `heads.py --gpu` runs.

Drawn features, made on the device. Ours for one C and for a grid; beside it a loop of torch's own
L-BFGS over the whole matrix, and scikit-learn through its array API on torch tensors, for which the
environment needs SCIPY_ARRAY_API=1.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _bench import print_header, print_table
from numpy.typing import NDArray

from pipeline.heads.solvers.linear import fit_logistic

_C = 1e-4
_MAX_ITER = 100
_GRID = np.logspace(-6, 5, 45)


@dataclass(frozen=True)
class Found:
    """How long a fit took, and where it arrived.

    Attributes:
        seconds: of it.
        objective: scikit-learn's, in float64.
        note: what else there is to say.
    """

    seconds: float
    objective: float
    note: str = ""


def run(options: argparse.Namespace) -> None:
    """Print the tables."""
    device = torch.device(options.device)
    print_header("Logistic regression on a GPU")
    if device.type == "cuda":
        print(f"  device: {torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    n, d, k = options.rows, options.columns, options.classes
    print(f"  features: {n:,} × {d:,}, {k:,} classes, drawn; C = {_C:g}\n")
    X, y = drawn(n, d, k, device)
    host, truth = X.cpu().numpy(), y.cpu().numpy()
    warm = min(n, 20 * k)  # kernels are chosen and loaded on a small part
    ours(host[:warm], truth[:warm], device)
    one = ours(host, truth, device)
    sides: dict[str, Callable[[], Found]] = {
        "torch.optim.LBFGS": lambda: torch_loop(X, y, k),
        "scikit-learn, array API": lambda: array_api(X, y),
    }
    rows = [["ours", f"{one.seconds:.2f}", "1.0", f"{one.objective:.6g}", one.note]]
    for name, fit in sides.items():
        try:
            found = fit()
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            rows.append([name, "—", "—", "—", str(error).splitlines()[0][:60]])
            continue
        ratio = f"{found.seconds / one.seconds:.1f}"
        rows.append([name, f"{found.seconds:.2f}", ratio, f"{found.objective:.6g}", found.note])
    print_table(["one C", "seconds", "× ours", "objective", ""], rows)
    torch.cuda.empty_cache()  # of the loops; nothing without a GPU
    grid = _GRID[:: 1 if n > 100_000 else 9]
    started = time.perf_counter()
    swept = fit_logistic(host, truth, grid, max_iter=_MAX_ITER, device=device)
    seconds = time.perf_counter() - started
    print(f"\n{len(grid)} values of C: {seconds:.1f} s, {seconds / one.seconds:.1f}× one")
    print(f"not converged: {int((~swept.converged).sum())}")
    if device.type != "cuda":
        return  # the targets are those of a GPU
    targets = [
        ["one C", "≤ 15 s", f"{one.seconds:.1f} s", verdict(one.seconds <= 15)],
        [
            f"{len(grid)} values against one",
            "≤ 10×",
            f"{seconds / one.seconds:.1f}×",
            verdict(seconds <= 10 * one.seconds),
        ],
    ]
    print("\nTargets (1,280,000 × 2,048, 1,000 classes, on an H200)\n")
    print_table(["what", "target", "found", "verdict"], targets)


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def drawn(n: int, d: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, d) float32 with a spectrum that falls as networks' do, and (n,) classes."""
    generator = torch.Generator(device).manual_seed(0)
    spectrum = 1 / torch.sqrt(1 + torch.arange(d, device=device))
    centers = 1.2 * torch.randn(k, d, generator=generator, device=device) * spectrum
    y = torch.arange(n, device=device) % k
    X = torch.empty(n, d, device=device)
    for rows in torch.split(torch.arange(n, device=device), 65_536):
        noise = torch.randn(len(rows), d, generator=generator, device=device)
        X[rows] = noise * spectrum + centers[y[rows]]
    return X, y


def ours(X: NDArray[Any], y: NDArray[Any], device: torch.device) -> Found:
    """From the host's memory to the host's memory."""
    started = time.perf_counter()
    found = fit_logistic(X, y, [_C], max_iter=_MAX_ITER, device=device)
    seconds = time.perf_counter() - started
    state = "converged" if found.converged.all() else "not converged"
    return Found(seconds, float(found.objective[0, 0]), f"{found.n_iter[0, 0]} steps, {state}")


def torch_loop(X: torch.Tensor, y: torch.Tensor, k: int) -> Found:
    """The loop that most people write."""
    weight = torch.zeros(k, X.shape[1], device=X.device, requires_grad=True)
    bias = torch.zeros(k, device=X.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MAX_ITER, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(X @ weight.T + bias, y, reduction="sum")
        loss: torch.Tensor = (losses + weight.square().sum() / (2 * _C)) / len(X)
        torch.autograd.backward(loss)
        return loss

    synchronise(X.device)
    started = time.perf_counter()
    optimizer.step(closure)
    synchronise(X.device)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        value = objective(X, y, weight, bias)
    n_steps = optimizer.state[weight]["n_iter"]
    return Found(seconds, value, f"{n_steps} steps")


def array_api(X: torch.Tensor, y: torch.Tensor) -> Found:
    """scikit-learn on tensors, where its version can."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    with sklearn.config_context(array_api_dispatch=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=_C, max_iter=_MAX_ITER, tol=1e-6)
        synchronise(X.device)
        started = time.perf_counter()
        model.fit(X, y)
        synchronise(X.device)
        seconds = time.perf_counter() - started
    weight, bias = (torch.as_tensor(a, device=X.device) for a in (model.coef_, model.intercept_))
    return Found(seconds, objective(X, y, weight, bias), f"{int(max(model.n_iter_))} steps")


def objective(X: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
    """scikit-learn's, summed in float64."""
    total = weight.double().square().sum() / 2
    for rows in torch.split(torch.arange(len(X), device=X.device), 65_536):
        scores = X[rows] @ weight.T.to(X.dtype) + bias.to(X.dtype)
        losses = torch.nn.functional.cross_entropy(scores.double(), y[rows], reduction="sum")
        total += _C * losses
    return float(total)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
