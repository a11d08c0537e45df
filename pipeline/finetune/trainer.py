"""The training loop: on any source of batches, for any objective, taken up after a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import ResourceError
from pipeline.finetune.augment import seed_of, seeded_step
from pipeline.finetune.checkpoint import Checkpoint, StoppedError
from pipeline.finetune.evaluate import autocast, is_out_of_memory, outputs_of
from pipeline.finetune.images import Batch, Batches
from pipeline.finetune.network import Classifier
from pipeline.finetune.objective import Objective
from pipeline.finetune.optim import (
    MovingAverage,
    PullToStart,
    State,
    lr_factor,
    make_optimizer,
    restore,
    set_lr,
    snapshot,
)
from pipeline.finetune.parallel import ALONE, Team
from pipeline.finetune.policies import Policy
from pipeline.finetune.settings import Settings

# Weights of tasks are numbers about 1, whatever rate suits the network; far from the best they move
# by so much a step.
_OBJECTIVE_LR = 0.05


@dataclass
class Progress:
    """How far a training is; plain values for a checkpoint.

    Attributes:
        epoch: the one in hand, from 0.
        step: steps of all epochs.
        step_in_epoch: steps of the one in hand.
        loss_sum: of its samples so far.
        n_seen: of its samples so far.
        best_epoch: epochs before the best state; -1 where there is none yet.
        best_score: accuracy and negative loss of the best state.
        curve: one entry an epoch; the first is before training.
        seconds: of search and training so far.
        done: nothing is left to train.
        note: why it ended before its last epoch; "" where it did not.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    n_seen: int = 0
    best_epoch: int = -1
    best_score: list[float] = field(default_factory=lambda: [-math.inf, -math.inf])
    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    done: bool = False
    note: str = ""


@dataclass(frozen=True)
class Hooks:
    """Who is told.

    Attributes:
        on_epoch: an entry of the curve.
        on_samples: how many more samples were trained on.
        note: a sentence for the user.
        should_stop: whether the user asked to stop.
    """

    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None
    on_samples: Callable[[int], None] = lambda _: None
    note: Callable[[str], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False


class Trainer:
    """Trains a network under a policy.

    Every random number is a function of seed and step, and the learning rate of the step, so a
    training that is taken up at a step goes on as if nothing had happened.

    Several processes take every step together, each with its part of the batch: the gradients are
    those of the whole batch, so that all of them hold the same network.

    Args:
        network: on its device; changed in place.
        policy: what of it is trained.
        settings: how.
        train: samples to learn from.
        choose: samples that choose the best epoch; None where there are none to spare.
        objective: what is learned.
        lr: the learning rate at its highest.
        dtype: of mixed precision; None for float32.
        n_steps: steps in all; None for all epochs.
        checkpoint: where progress is kept; None for nowhere.
        hooks: who is told.
        team: the processes that train together.
        wrap: makes what is called of the network, such as torch.compile's.
        first_can_be_best: whether the network as it starts may be kept.
    """

    def __init__(
        self,
        network: Classifier,
        policy: Policy,
        settings: Settings,
        train: Batches,
        choose: Batches | None,
        objective: Objective,
        *,
        lr: float,
        dtype: torch.dtype | None = None,
        n_steps: int | None = None,
        checkpoint: Checkpoint | None = None,
        hooks: Hooks = Hooks(),
        team: Team = ALONE,
        wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
        first_can_be_best: bool = True,
    ) -> None:
        self.network, self.policy, self.settings = network, policy, settings
        self.train, self.choose, self.objective = train, choose, objective
        self.lr, self.hooks, self.team = lr, hooks, team
        self.progress = Progress()
        self.device = next(network.head.parameters()).device
        self.n_steps = n_steps or settings.epochs * train.n_steps
        self.n_epochs = -(-self.n_steps // train.n_steps)
        self._dtype = dtype
        self._checkpoint = checkpoint
        self._names = policy.changing(network)
        self._forward = wrap(network)
        self._optimizer = make_optimizer(network, policy, settings)
        self._trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        if objective.parameters:
            beside = {"params": list(objective.parameters), "scale": _OBJECTIVE_LR / lr}
            self._optimizer.add_param_group({**beside, "weight_decay": 0.0})
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)
        self._pull = PullToStart(network, policy, settings.l2_sp)
        self._average = MovingAverage(network, self._names, settings.ema) if settings.ema else None
        self._best: State = {}
        self._first_can_be_best = first_can_be_best
        self._micro_batch_size = settings.micro_batch_size or settings.batch_size
        self._lr = 0.0
        self._started = self._saved = time.perf_counter()

    def run(self) -> Progress:
        """Train to the end, and leave the best state in the network.

        Raises:
            StoppedError: the user asked to stop; a checkpoint holds all of it.
            ResourceError: the device has too little memory for a single sample.
        """
        self._saved = time.perf_counter()
        self._started = self._saved - self.progress.seconds
        if not self.progress.curve:
            self._end_of_epoch(train_loss=None, images_per_second=None)
        while not self.progress.done:
            self._epoch()
        restore(self.network, self._best)
        return self.progress

    def steps_only(self) -> float:
        """Train all steps without looking at the samples that choose; the mean loss of them.

        Returns:
            Infinity where it stopped being a number.
        """
        self._started = time.perf_counter()
        total, n_seen = 0.0, 0
        self.policy.apply(self.network, self.n_epochs, self.n_epochs)
        while self._share_done() < 1:
            with closing(self.train.training(self.progress.epoch)) as batches:
                for batch in batches:
                    loss = self._step(batch)
                    if not math.isfinite(loss):
                        return math.inf
                    total, n_seen = total + loss * batch.n_all, n_seen + batch.n_all
                    self.progress.step += 1
                    if self._is_asked_to_stop():
                        raise StoppedError(
                            "Stopped while learning rates were tried; those tried before are kept."
                        )
                    if self._share_done() >= 1:
                        break
            self.progress.epoch += 1
        return total / n_seen

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint needs."""
        self.progress.seconds = self._seconds()
        return {
            "progress": asdict(self.progress),
            "lr": self.lr,
            "network": snapshot(self.network, self._names),
            "optimizer": self._optimizer.state_dict(),
            "objective": [parameter.detach().clone() for parameter in self.objective.parameters],
            "scaler": self._scaler.state_dict(),
            "average": self._average.values if self._average else {},
            "best": self._best,
            "micro_batch_size": self._micro_batch_size,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.progress = Progress(**state["progress"])
        self.lr = state["lr"]
        restore(self.network, state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(self.objective.parameters, state["objective"], strict=True):
                parameter.copy_(value)
        self._scaler.load_state_dict(state["scaler"])
        if self._average:
            for name, value in state["average"].items():
                self._average.values[name].copy_(value)
        self._best = {name: value.to(self.device) for name, value in state["best"].items()}
        self._micro_batch_size = state["micro_batch_size"]

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _share_done(self) -> float:
        """Share of the steps or of the time that is used up, whichever is larger."""
        share = self.progress.step / self.n_steps
        if self.settings.budget_seconds is not None:
            seconds = self.team.largest(self._seconds())
            share = max(share, seconds / self.settings.budget_seconds)
        return share

    def _is_asked_to_stop(self) -> bool:
        """Whether the user asked any of the processes."""
        return self.team.any(self.hooks.should_stop())

    def _epoch(self) -> None:
        """One pass over the samples, or what is left of it."""
        progress, started = self.progress, time.perf_counter()
        n_seen_before = progress.n_seen
        self.policy.apply(self.network, progress.epoch, self.n_epochs)
        with closing(self.train.training(progress.epoch, progress.step_in_epoch)) as batches:
            for batch in batches:
                loss = self._step(batch)
                if not math.isfinite(loss):
                    self._give_up()
                    return
                progress.step += 1
                progress.step_in_epoch += 1
                progress.loss_sum += loss * batch.n_all
                progress.n_seen += batch.n_all
                self.hooks.on_samples(batch.n_all)
                if self._share_done() >= 1:
                    break
                if progress.step_in_epoch < self.train.n_steps:
                    self._keep()
        rate = (progress.n_seen - n_seen_before) / max(1e-9, time.perf_counter() - started)
        train_loss = progress.loss_sum / max(1, progress.n_seen)
        progress.epoch += 1
        progress.step_in_epoch, progress.loss_sum, progress.n_seen = 0, 0.0, 0
        self._end_of_epoch(train_loss=train_loss, images_per_second=rate)

    def _step(self, batch: Batch) -> float:
        """One update of the weights; the mean loss, which is not finite where nothing was updated.

        Where memory does not suffice, fewer samples are computed at once and gradients added up.
        Each process may do so by itself, as they meet only once all pieces are computed.
        """
        self._lr = self.lr * lr_factor(
            max(self._share_done(), (self.progress.step + 0.5) / self.n_steps), self.settings.warmup
        )
        set_lr(self._optimizer, self._lr)
        while True:
            try:
                loss = self._accumulate(batch)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error, len(batch.inputs))
            if self.device.type == "cuda":  # only here has the failed attempt let go of its memory
                torch.cuda.empty_cache()
        loss = self._add_up_over_processes(loss, len(batch.inputs) / batch.n_all)
        if not math.isfinite(loss):
            return loss
        self._scaler.unscale_(self._optimizer)
        self._pull.add_gradient()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self._trained, self.settings.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average:
            self._average.update(self.network, self.progress.step)
        return loss

    def _accumulate(self, batch: Batch) -> float:
        """Gradients of what a batch adds to the step's mean loss, a piece at a time; that share."""
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        # Dropout and mixing of the first process are those of a process alone.
        others = [self.team.rank] if self.team.rank else []
        seed = seed_of(self.settings.seed, "step", self.progress.step, *others)
        with seeded_step(seed, self.device):
            inputs, targets = self.objective.mix(
                self.train.to_device(batch.inputs, self.device),
                batch.targets.to(self.device),
                batch.all_targets,
            )
            size = self._micro_batch_size
            parts = torch.split(inputs, size), torch.split(targets, size)
            for some, wanted in zip(*parts, strict=True):
                with autocast(self.device, self._dtype):
                    outputs = self._forward(some)
                loss = self.objective.loss(outputs, wanted) * (len(some) / batch.n_all)
                torch.autograd.backward(self._scaler.scale(loss))
                total += loss.detach()
        return float(total)

    def _add_up_over_processes(self, loss: float, share: float) -> float:
        """Make gradients and loss those of the whole step in every process.

        Statistics of BatchNorm that change become the mean of the processes', by ``share``, this
        process's share of the samples; variance between the parts of a batch is left out, as it is
        between the pieces of one.
        """
        if self.team.n == 1:
            return loss
        total = torch.tensor([loss], device=self.device)
        learned = (*self._trained, *self.objective.parameters)
        gradients = [p.grad for p in learned if p.grad is not None]
        statistics = [
            values.mul_(share)
            for module in self.network.modules()
            if isinstance(module, _BatchNorm) and module.training
            for values in (module.running_mean, module.running_var)
            if values is not None
        ]
        self.team.add_up([total, *gradients, *statistics])
        return float(total)

    def _halve(self, error: RuntimeError, n_samples: int) -> None:
        n_at_once = min(self._micro_batch_size, n_samples)
        if n_at_once == 1:
            raise ResourceError(
                f"{self.device} has too little memory to train on a single image at a time.\n"
                "  Train less of the network (--policy last:1), or use a smaller --image-size or "
                "--backbone."
            ) from error
        self._micro_batch_size = n_at_once // 2
        self.hooks.note(
            f"{self.device} has too little memory for {n_at_once} images at once: gradients of "
            f"{self._micro_batch_size} at a time are added up."
        )

    def _end_of_epoch(self, *, train_loss: float | None, images_per_second: float | None) -> None:
        """Evaluate, keep the state if it is the best one, and see whether this was the last."""
        progress, settings = self.progress, self.settings
        trained = snapshot(self.network, self._names) if self._average else None
        if self._average:
            restore(self.network, self._average.values)
        val_loss, val_top1 = self._evaluate()
        is_candidate = progress.epoch > 0 or self._first_can_be_best
        loss = math.inf if val_loss is None else val_loss
        score = [progress.epoch, 0.0] if val_top1 is None else [val_top1, -loss]
        if not self._best or (is_candidate and score > progress.best_score):
            self._best = snapshot(self.network, self._names)
            progress.best_epoch = progress.epoch
            progress.best_score = score if is_candidate else [-math.inf, -math.inf]
        if trained is not None:
            restore(self.network, trained)
        entry = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_top1": val_top1,
            "lr": self._lr,
            "seconds": round(self._seconds(), 3),
            "images_per_second": images_per_second and round(images_per_second, 1),
        }
        progress.curve.append(entry)
        self.hooks.on_epoch(entry)
        n_without = progress.epoch - progress.best_epoch
        if self._share_done() >= 1:
            progress.done = True
            if progress.step < self.n_steps:
                progress.note = f"The time was up in epoch {progress.epoch} of {self.n_epochs}."
        elif self.choose is not None and settings.patience and n_without >= settings.patience:
            progress.done = True
            progress.note = (
                f"Stopped after epoch {progress.epoch} of {self.n_epochs}: none of the last "
                f"{n_without} was better."
            )
        self._keep(at_once=True)

    def _evaluate(self) -> tuple[float | None, float | None]:
        """Loss and accuracy on the samples that choose."""
        if self.choose is None:
            return None, None
        part = outputs_of(self.network, self.choose, self.device, self._dtype)
        outputs = self.team.joined(part)
        loss, top1 = self.objective.scores(outputs, self.choose.targets)
        # A loss that is not a number would not be valid JSON, and chooses nothing.
        return (loss, top1) if math.isfinite(loss) else (None, 0.0)

    def _give_up(self) -> None:
        """The loss is not a number: nothing after this can be learned."""
        progress = self.progress
        progress.done = True
        epoch = progress.best_epoch
        kept = f"the state after epoch {epoch}" if epoch > 0 else "the state at the start"
        progress.note = (
            f"Warning: the loss was not a number at step {progress.step + 1} (epoch "
            f"{progress.epoch + 1}, learning rate {self._lr:.2g}): training stopped, and "
            f"{kept} was kept. Try --lr {self.lr / 10:.1g}, --clip 0.5 or --precision fp32."
        )
        self._keep(at_once=True)

    def _keep(self, *, at_once: bool = False) -> None:
        """Write a checkpoint where it is time for one, or the user asks to stop."""
        is_asked = self._is_asked_to_stop()
        now = time.perf_counter()
        is_time = at_once or is_asked or now - self._saved >= self.settings.checkpoint_seconds
        if is_time and self._checkpoint is not None and self.team.is_first:
            self._checkpoint.save(self.state())
            self._checkpoint.write_metrics(self.progress.curve)
            self._saved = now
        if is_asked and self._checkpoint is None:
            raise StoppedError("Stopped; nothing was kept.")
        if is_asked and not self.progress.done:
            raise StoppedError(
                f"Stopped after step {self.progress.step:,} of {self.n_steps:,}; all of it is kept."
            )
