"""``--lr auto``: a few learning rates on a few per cent of the steps, by successive halving.

Every candidate goes through the whole schedule, warm-up to zero, squeezed into its few steps: a
rate is judged by where its cosine ends and not by how fast it falls at first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import TlpipeError
from pipeline.finetune.evaluate import outputs_of
from pipeline.finetune.images import Batches
from pipeline.finetune.optim import restore, snapshot
from pipeline.finetune.settings import Settings
from pipeline.finetune.trainer import Trainer

# Share of all steps and fewest steps of each round; the better half goes on to the next.
ROUNDS = ((0.025, 8), (0.05, 16))
MAX_CHOOSING = 512
MAX_SHARE = 0.25
"""Of a budget of time, for all rounds together."""

_ADAMW = {
    "head": (1e-3, 3e-3, 1e-2, 3e-2),
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
    "scratch": (3e-4, 1e-3, 3e-3, 1e-2),
}
_SGD_TIMES = 30.0
N_TRIALS = 6


def candidates(settings: Settings) -> list[float]:
    """Learning rates that may suit a policy and its optimiser, rising."""
    kind = "head" if settings.policy == "head" else "full"
    if settings.policy in ("scratch", "bitfit", "norm", "lora"):
        kind = "scratch"
    times = 1.0 if settings.optimizer == "adamw" else _SGD_TIMES
    return [float(f"{lr * times:.3g}") for lr in _ADAMW[kind]]


def search_lr(
    make_trainer: Callable[[float, int], Trainer],
    choose: Batches | None,
    settings: Settings,
    n_steps: int,
    trials: list[dict[str, Any]],
    *,
    keep: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda _: None,
) -> float:
    """Find a learning rate; the network is left as it was.

    Args:
        make_trainer: from a learning rate and a number of steps, on the network as it is.
        choose: samples that choose; None lets the training loss choose.
        settings: which policy and optimiser.
        n_steps: of the training to come.
        trials: of the same search before it was stopped, which are not repeated; what is tried is
            added: lr, steps, loss (None where it diverged), seconds.
        keep: is called after each trial.
        note: is told what was tried, a line each.

    Raises:
        TlpipeError: every rate diverged.
    """
    lrs, before = candidates(settings), list(trials)
    for share, fewest in ROUNDS:
        n_round = min(n_steps, max(fewest, round(share * n_steps)))
        losses = {}
        for lr in lrs:
            if before:
                loss = before.pop(0)["loss"]
                losses[lr] = math.inf if loss is None else loss
                continue
            started = time.perf_counter()
            losses[lr] = _try(make_trainer(lr, n_round), choose)
            trial = {
                "lr": lr,
                "steps": n_round,
                "loss": losses[lr] if math.isfinite(losses[lr]) else None,
                "seconds": round(time.perf_counter() - started, 3),
            }
            trials.append(trial)
            keep()
            note(f"  learning rate {lr:g}: loss {losses[lr]:.3f} after {n_round} steps")
        lrs = sorted(lrs, key=losses.__getitem__)[: max(1, len(lrs) // 2)]
        if not math.isfinite(losses[lrs[0]]):
            raise TlpipeError(
                f"With every learning rate from {min(losses):g} to {max(losses):g} the loss "
                "stopped being a number.\n"
                f"  Give a smaller one:  --lr {min(losses) / 10:.1g},  or try --precision fp32."
            )
    return lrs[0]


def _try(trainer: Trainer, choose: Batches | None) -> float:
    """Train a few steps, score, and put the network back; infinity where it diverged."""
    network, names = trainer.network, trainer.policy.changing(trainer.network)
    start = snapshot(network, names)
    try:
        loss = trainer.steps_only()
        if choose is not None and math.isfinite(loss):
            outputs = trainer.team.joined(outputs_of(network, choose, trainer.device))
            loss, _ = trainer.objective.scores(outputs, choose.targets)
        return loss if math.isfinite(loss) else math.inf
    finally:
        restore(network, start)
