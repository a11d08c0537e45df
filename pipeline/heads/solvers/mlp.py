"""Many small networks trained as one program on one X.

Networks of one shape are a stack. The stack reads a mini-batch once and multiplies it by the first
layers of all its members side by side, later layers are one batched product, and the update runs
over views of the stacked parameters. Members differ in width, depth, dropout, learning rate, weight
decay, label smoothing, seed, and in the samples that they see.

The order of the samples belongs to the call (``Training.seed``), the starting weights and dropout
to the member (``MlpSetting.seed``): what a member learns does not depend on who else is trained.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.adamw import adamw

from pipeline.heads.solvers.mlp_loss import Objective, mean_over_tasks
from pipeline.heads.solvers.mlp_setting import FittedMlp, MlpSetting, Training
from pipeline.heads.solvers.samples import Samples, as_float32
from pipeline.heads.tasks import task_slices

__all__ = ["FittedMlp", "MlpSetting", "Training", "fit_mlps", "mlp_logits"]

Array = NDArray[Any]

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
_MOMENTUM = 0.9
_STACK_BYTES = 2**30
_STATES = 5  # parameters, gradients, two moments, the best ones so far
_BLOCK_NUMBERS = 2**24
_KINDS = ("weights", "biases", "log_variances")


def fit_mlps(
    X: Array | Tensor,
    y: Array,
    members: Sequence[MlpSetting],
    *,
    n_classes: int | Sequence[int],
    training: Training | None = None,
    rows: Array | None = None,
    sample_weight: Array | None = None,
    X_val: Array | Tensor | None = None,
    y_val: Array | None = None,
    val_rows: Array | None = None,
    val_weight: Array | None = None,
) -> list[FittedMlp]:
    """Train every member on the weighted cross-entropy; with validation samples, keep the best.

    A fold of all members is ``rows`` of X, and ``val_rows`` of the same X; nothing is copied, and
    it is as if X had no other rows. Where members differ in their folds, a fold is a pair of
    weights: of 0 in ``sample_weight`` and 1 in ``val_weight`` for a sample that must not be seen.

    Args:
        X: (n_samples, n_features), or (n_samples, n_views, n_features): then each step draws one
            view of each sample. float32 is used as it is.
        y: (n_samples,), int class indices; of several tasks (n_samples, n_tasks), with NO_LABEL
            where a sample has none.
        members: the networks.
        n_classes: outputs of each; of several tasks, one number a task.
        training: what the members share.
        rows: of X that train, in an order that the seed is applied to; None for all.
        sample_weight: (n_samples,), or (n_members, n_samples).
        X_val: samples that choose the epoch, likewise; of several views the first is taken.
        y_val: (n_val,) or (n_val, n_tasks).
        val_rows: of X_val; None for all.
        val_weight: (n_val,), or (n_members, n_val).

    Returns:
        One a member, in their order. A member that blew up says so in ``failure``; the others are
        as if it had not been there.

    Raises:
        ValueError: no samples, values that are not finite, labels or weights that do not
            fit, or patience without validation samples.
    """
    training = training or Training()
    device, n_members = torch.device(training.device), len(members)
    tasks = task_slices([n_classes] if isinstance(n_classes, int) else n_classes)
    n_outputs = tasks[-1].stop
    train = Samples.check("X", X, y, rows, sample_weight, n_members, n_classes).to(device)
    n_features = train.x.shape[-1]
    val = None
    if X_val is not None and y_val is not None:
        val = Samples.check("X_val", X_val, y_val, val_rows, val_weight, n_members, n_classes)
        val = replace(val, x=train.x) if X_val is X else val.to(device)
        if val.x.shape[-1] != n_features:
            raise ValueError(
                f"X_val has {val.x.shape[-1]} features, expected {n_features} as X has"
            )
    elif training.patience is not None:
        raise ValueError("Early stopping (patience) needs X_val and y_val")
    # Several stacks at a time, one thread each, and one for a single stack too: threads that share
    # each small product wait for one another at its end. Beside other programs, two were seen to
    # take seven times as long as one.
    n_threads = torch.get_num_threads()
    n_jobs = n_threads if device.type == "cpu" else 1
    groups = list(_groups(members, n_features, n_outputs, n_parts=n_jobs))

    def train_group(group: NDArray[np.intp]) -> dict[int, FittedMlp]:
        if device.type == "cpu":
            torch.set_num_threads(1)
        stack = _Stack.start(members, group, n_features, n_outputs, training)
        if training.task_weights == "uncertainty" and len(tasks) > 1:
            stack.log_variances.append(torch.zeros(len(group), len(tasks), device=device))
        return _train(stack, train, val, training, tasks)

    try:
        n_jobs = min(n_jobs, len(groups))
        parts = Parallel(n_jobs=n_jobs, prefer="threads")(map(delayed(train_group), groups))
    finally:
        torch.set_num_threads(n_threads)
    fitted = {i: model for part in parts for i, model in part.items()}
    return [fitted[i] for i in range(n_members)]


def mlp_logits(
    models: Sequence[FittedMlp], X: Array | Tensor, *, device: str | torch.device = "cpu"
) -> NDArray[np.float32]:
    """Scores of all models, in float32: (n_models, n_samples, n_outputs).

    Args:
        models: of any shapes, with the same classes.
        X: (n_samples, n_features).
        device: a torch device.
    """
    x = as_float32(X)
    scores = np.empty((len(models), len(x), len(models[0].biases[-1])), np.float32)
    settings = [model.setting for model in models]
    for group in _groups(settings, x.shape[1], scores.shape[2]):
        layers = range(len(models[group[0]].weights))
        stack = _Stack(
            members=group,
            settings=[settings[i] for i in group],
            weights=[_gather([models[i].weights[k] for i in group], device) for k in layers],
            biases=[_gather([models[i].biases[k] for i in group], device) for k in layers],
            dtype=torch.float32,
        )
        for rows in stack.blocks(len(x)):
            block = stack.score(x[rows].to(device))
            scores[group, rows] = block.cpu().numpy()
    return scores


def _gather(arrays: Sequence[Array], device: str | torch.device) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)


# Members


def _groups(
    members: Sequence[MlpSetting], n_features: int, n_outputs: int, *, n_parts: int = 1
) -> Iterator[NDArray[np.intp]]:
    """Members of one shape, as many as fit into a stack.

    Where there are enough, those of one shape are ``n_parts`` stacks or more.
    """
    by_shape: defaultdict[Any, list[int]] = defaultdict(list)
    for i, setting in enumerate(members):
        by_shape[setting.hidden].append(i)
    for hidden, group in by_shape.items():
        widths = [n_features, *hidden, n_outputs]
        member_bytes = 4 * _STATES * sum(a * b for a, b in pairwise(widths))
        n_stacks = max(n_parts, math.ceil(len(group) * member_bytes / _STACK_BYTES))
        yield from np.array_split(np.array(group), min(n_stacks, len(group)))


@dataclass
class _Stack:
    """Networks of one shape.

    Attributes:
        members: their numbers in the call.
        settings: one a member.
        weights: one (n_members, n_outputs, n_inputs) a layer.
        biases: one (n_members, n_outputs) a layer.
        dtype: of the products into hidden layers.
        generators: of dropout, one a member.
        log_variances: (n_members, n_tasks), where the weights of the tasks are learned; or none.
    """

    members: NDArray[np.intp]
    settings: list[MlpSetting]
    weights: list[Tensor]
    biases: list[Tensor]
    dtype: torch.dtype
    generators: list[torch.Generator] = field(default_factory=list)
    log_variances: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        members: Sequence[MlpSetting],
        group: NDArray[np.intp],
        n_features: int,
        n_outputs: int,
        training: Training,
    ) -> _Stack:
        """He's uniform weights for hidden layers, small ones for the last, zeros for biases."""
        settings = [members[i] for i in group]
        hidden = settings[0].hidden
        widths = [n_features, *hidden, n_outputs]
        # Drawn on the processor, so that every device starts from the same weights.
        draws = [torch.Generator().manual_seed(setting.seed) for setting in settings]
        weights = []
        for layer, (n_inputs, width) in enumerate(pairwise(widths)):
            weight = torch.zeros(len(group), width, n_inputs)
            bound = ((6 if layer < len(hidden) else 1) / n_inputs) ** 0.5
            for one, draw in zip(weight, draws, strict=True):
                if hidden:
                    one.uniform_(-bound, bound, generator=draw)
            weights.append(weight.to(training.device))
        biases = [torch.zeros(len(group), n, device=training.device) for n in widths[1:]]
        noise = [
            torch.Generator(training.device).manual_seed(setting.seed + 1) for setting in settings
        ]
        return cls(group, settings, weights, biases, training.dtype, noise)

    def select(self, kept: Tensor) -> _Stack:
        """Some of the members."""
        places = kept.tolist()
        return replace(
            self,
            members=self.members[places],
            settings=[self.settings[i] for i in places],
            weights=[weight[kept] for weight in self.weights],
            biases=[bias[kept] for bias in self.biases],
            generators=[self.generators[i] for i in places],
            log_variances=[tensor[kept] for tensor in self.log_variances],
        )

    def blocks(self, n_samples: int) -> Iterator[slice]:
        """Rows that are scored at once."""
        widest = sum(bias.numel() for bias in self.biases)
        n_rows = max(1, _BLOCK_NUMBERS // widest)
        for start in range(0, n_samples, n_rows):
            yield slice(start, start + n_rows)

    def forward(self, x: Tensor, *, noisy: bool) -> list[Tensor]:
        """Activations of every layer, each (n_members, n, n_outputs); the last are the scores.

        Args:
            x: (n, n_inputs).
            noisy: with dropout.
        """
        activations: list[Tensor] = []
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            is_last = layer == len(self.weights) - 1
            dtype = torch.float32 if is_last else self.dtype
            if layer == 0:
                # All members read the same rows: one wide product instead of one a member.
                flat = x.to(dtype) @ weight.to(dtype).flatten(0, 1).T
                z = flat.view(len(x), *weight.shape[:2]).transpose(0, 1)
            else:
                z = torch.bmm(activations[-1].to(dtype), weight.to(dtype).mT)
            z += bias.to(dtype)[:, None]
            if not is_last:
                z.relu_()
                if noisy:
                    self._drop(z)
            activations.append(z)
        return activations

    def _drop(self, hidden: Tensor) -> None:
        """Dropout in place, each member by its own generator."""
        for one, setting, generator in zip(hidden, self.settings, self.generators, strict=True):
            if setting.dropout:
                draws = torch.rand(one.shape, generator=generator, device=one.device)
                one *= (draws >= setting.dropout) / (1 - setting.dropout)

    def backward(
        self, x: Tensor, activations: list[Tensor], by_score: Tensor, into: _Gradients
    ) -> None:
        """Write the gradients of the parameters.

        Args:
            x: (n, n_inputs).
            activations: of :meth:`forward`.
            by_score: (n_members, n, n_outputs), gradient of the loss by the scores.
            into: where to.
        """
        by_output = by_score
        for layer in reversed(range(len(self.weights))):
            torch.sum(by_output, dim=1, out=into.biases[layer])
            dtype = self.dtype if layer < len(self.weights) - 1 else torch.float32
            if layer == 0:
                columns = by_output.to(dtype).transpose(0, 1).flatten(1)
                into.weights[0].flatten(0, 1).copy_(columns.T @ x.to(dtype))
                return
            inputs = activations[layer - 1]
            into.weights[layer].copy_(torch.bmm(by_output.to(dtype).mT, inputs.to(dtype)))
            by_output = torch.bmm(by_output.to(dtype), self.weights[layer].to(dtype)).float()
            by_output *= inputs > 0
            for one, setting in zip(by_output, self.settings, strict=True):
                if setting.dropout:
                    one /= 1 - setting.dropout

    def score(self, x: Tensor) -> Tensor:
        """(n_members, n, n_outputs), without dropout."""
        return self.forward(x, noisy=False)[-1]

    def is_finite(self) -> Tensor:
        """(n_members,): whether all parameters are numbers."""
        params = (*self.weights, *self.biases, *self.log_variances)
        sums = [param.flatten(1).sum(dim=1) for param in params]
        return torch.isfinite(torch.stack(sums).sum(dim=0))


# Training


@dataclass
class _Gradients:
    """Gradients and moments, shaped as the parameters they belong to."""

    weights: list[Tensor]
    biases: list[Tensor]
    log_variances: list[Tensor]

    @classmethod
    def like(cls, stack: _Stack) -> _Gradients:
        return cls(*([torch.zeros_like(p) for p in getattr(stack, kind)] for kind in _KINDS))

    def select(self, kept: Tensor) -> _Gradients:
        return _Gradients(*([p[kept] for p in getattr(self, kind)] for kind in _KINDS))


class _Optimizer:
    """One step of every member at its own learning rate and weight decay.

    Each member's parameters are contiguous views of the stack, so that torch's fused kernel passes
    over them once.
    """

    def __init__(self, stack: _Stack, training: Training) -> None:
        self.name = training.optimizer
        self.gradients = _Gradients.like(stack)
        self.moments = [_Gradients.like(stack) for _ in range(2 if self.name == "adamw" else 1)]
        self.n_steps = 0
        self._bind(stack)

    def select(self, stack: _Stack, kept: Tensor) -> None:
        """Go on with some of the members; ``stack`` has been narrowed already."""
        self.gradients = self.gradients.select(kept)
        self.moments = [moment.select(kept) for moment in self.moments]
        self._bind(stack)

    def _bind(self, stack: _Stack) -> None:
        self.settings = stack.settings
        self._views = []
        for i in range(len(stack.settings)):
            for kind in _KINDS:
                owners = (stack, self.gradients, *self.moments)
                tensors = [[tensor[i] for tensor in getattr(owner, kind)] for owner in owners]
                counts = [torch.full((), float(self.n_steps), device=p.device) for p in tensors[0]]
                if counts:
                    self._views.append((i, kind == "weights", tensors, counts))

    def step(self, lr_factor: float) -> None:
        """Move the parameters against the gradients."""
        self.n_steps += 1
        for i, decays, (params, gradients, *moments), counts in self._views:
            lr = self.settings[i].lr * lr_factor
            weight_decay = self.settings[i].weight_decay if decays else 0.0
            if self.name == "adamw":
                adamw(
                    params, gradients, moments[0], moments[1], [], counts,
                    fused=True, amsgrad=False, maximize=False,
                    beta1=_BETA1, beta2=_BETA2, eps=_EPS, lr=lr, weight_decay=weight_decay,
                )  # fmt: skip
                continue
            for param, gradient, momentum in zip(params, gradients, moments[0], strict=True):
                momentum.mul_(_MOMENTUM).add_(gradient)
                if weight_decay:
                    momentum.add_(param, alpha=weight_decay)
                param.add_(momentum, alpha=-lr)


@dataclass
class _Progress:
    """The best parameters of each member so far, by validation loss."""

    loss: Tensor
    epoch: Tensor
    best: _Gradients

    @classmethod
    def start(cls, stack: _Stack) -> _Progress:
        device = stack.biases[0].device
        loss = torch.full((len(stack.settings),), torch.inf, device=device, dtype=torch.float64)
        return cls(loss, torch.zeros(len(loss), dtype=torch.int64), _Gradients.like(stack))

    def see(self, stack: _Stack, losses: Tensor, epoch: int) -> None:
        better = (losses < self.loss).nonzero().flatten()
        self.loss[better] = losses[better]
        self.epoch[better.cpu()] = epoch
        for kind in _KINDS:
            for kept, now in zip(getattr(self.best, kind), getattr(stack, kind), strict=True):
                for i in better.tolist():
                    kept[i].copy_(now[i])

    def select(self, kept: Tensor) -> _Progress:
        return _Progress(self.loss[kept], self.epoch[kept.cpu()], self.best.select(kept))


@torch.no_grad()
def _train(
    stack: _Stack,
    train: Samples,
    val: Samples | None,
    training: Training,
    tasks: Sequence[slice],
) -> dict[int, FittedMlp]:
    """Train a stack to its end: the fitted members by their number."""
    device = torch.device(training.device)
    fitted: dict[int, FittedMlp] = {}
    optimizer = _Optimizer(stack, training)
    progress = None if val is None else _Progress.start(stack)
    weights = train.weights_of(stack.members, device)
    val_weights = None if val is None else val.weights_of(stack.members, device)
    objective = Objective.of(tasks, stack.settings, device)
    batches = _Batches(train, training)
    for epoch in range(1, training.n_epochs + 1):
        for step, places, x, y in batches.epoch(epoch, device):
            activations = stack.forward(x, noisy=True)
            by_score = objective.gradient(
                activations[-1], y, weights[:, places.to(device)],
                stack.log_variances, optimizer.gradients.log_variances,
            )  # fmt: skip
            stack.backward(x, activations, by_score, optimizer.gradients)
            optimizer.step(training.lr_factor(step, batches.n_steps))
        finite = stack.is_finite().cpu()
        done = ~finite
        if progress is not None and val is not None and val_weights is not None:
            progress.see(stack, _val_losses(stack, val, val_weights, objective), epoch)
            if training.patience is not None:
                done |= epoch - progress.epoch >= training.patience
        if epoch == training.n_epochs:
            done[:] = True
        for i in done.nonzero().flatten().tolist():
            fitted[int(stack.members[i])] = _result(stack, i, progress, epoch, bool(finite[i]))
        if done.all():
            break
        if done.any():
            kept = (~done).nonzero().flatten().to(device)
            stack = stack.select(kept)
            optimizer.select(stack, kept)
            progress = progress and progress.select(kept)
            objective = objective.select(kept)
            weights = weights if len(weights) == 1 else weights[kept]
            if val_weights is not None and len(val_weights) > 1:
                val_weights = val_weights[kept]
    return fitted


@dataclass
class _Batches:
    """The same rows in the same order for every stack."""

    samples: Samples
    training: Training

    def __post_init__(self) -> None:
        self.n_batches = math.ceil(len(self.samples) / self.training.batch_size)
        self.n_steps = self.n_batches * self.training.n_epochs
        self.order = torch.Generator().manual_seed(self.training.seed)
        self.views = torch.Generator().manual_seed(self.training.seed + 1)

    def epoch(
        self, epoch: int, device: torch.device
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield (step, places among the samples, x, y) of each batch."""
        x, y = self.samples.x, self.samples.y
        order = torch.randperm(len(self.samples), generator=self.order)
        step = (epoch - 1) * self.n_batches
        for places in torch.split(order, self.training.batch_size):
            rows = self.samples.rows_at(places)
            if x.ndim == 3:
                views = torch.randint(x.shape[1], (len(places),), generator=self.views)
                batch = x[rows, views.to(x.device)]
            else:
                batch = x[rows]
            yield step, places, batch.to(device), y[places].to(device)
            step += 1


def _val_losses(stack: _Stack, val: Samples, weights: Tensor, objective: Objective) -> Tensor:
    """Mean negative log-likelihood of each member, nats: (n_members,) float64."""
    device = weights.device
    sums: Tensor | float = 0.0
    counts: Tensor | int = 0
    plain = val.x[:, 0] if val.x.ndim == 3 else val.x
    everyone = torch.arange(len(val))
    for block in stack.blocks(len(val)):
        x = plain[val.rows_at(everyone[block])]
        scores = stack.score(x.to(device))
        found = objective.validation(scores, val.y[block].to(device), weights[:, block])
        sums, counts = sums + found[0], counts + found[1]
    assert isinstance(sums, Tensor)
    assert isinstance(counts, Tensor)
    return mean_over_tasks(sums, counts)


def _result(
    stack: _Stack, i: int, progress: _Progress | None, epoch: int, finite: bool
) -> FittedMlp:
    setting = stack.settings[i]
    best_epoch = epoch if progress is None else int(progress.epoch[i])
    failure = "" if finite and best_epoch else (
        f"its parameters are not finite in epoch {epoch}: try a learning rate below {setting.lr:g}"
    )  # fmt: skip
    # Before it blew up it may have had a best epoch, but the setting is not to be trusted.
    source: _Stack | _Gradients = stack if progress is None or failure else progress.best
    return FittedMlp(
        setting=setting,
        weights=tuple(weight[i].cpu().numpy().copy() for weight in source.weights),
        biases=tuple(bias[i].cpu().numpy().copy() for bias in source.biases),
        log_variances=tuple(v for one in source.log_variances for v in one[i].tolist()),
        n_epochs=epoch,
        best_epoch=best_epoch,
        val_loss=math.nan if progress is None else float(progress.loss[i]),
        failure=failure,
    )
