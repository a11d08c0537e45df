"""Train a backbone, or a part of it, on a data source, and score it once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.backbones import load_backbone
from pipeline.backbones.backbone import Backbone
from pipeline.data import DataSource
from pipeline.data.names import counted
from pipeline.errors import UsageError
from pipeline.extract.precision import resolve_device
from pipeline.finetune.augment import make_augment
from pipeline.finetune.blocks import find_blocks
from pipeline.finetune.bundle import Architecture, random_origin
from pipeline.finetune.cached import (
    Cached,
    StoredBatches,
    check_store,
    embed_activations,
    stored_data,
)
from pipeline.finetune.checkpoint import Checkpoint, StoppedError, check_writable
from pipeline.finetune.data import (
    TrainingData,
    check_group_column,
    choose_columns,
    load_data,
    training_notes,
)
from pipeline.finetune.evaluate import choose_precision, outputs_of, probabilities_of
from pipeline.finetune.images import ImageBatches
from pipeline.finetune.initial import InitialHead, find_run, fresh_head, head_of_run
from pipeline.finetune.logs import open_log
from pipeline.finetune.network import (
    Classifier,
    L2Normalise,
    fresh_like,
    linear_layers,
    make_trunk,
)
from pipeline.finetune.objective import Classification, MultiTask, Objective
from pipeline.finetune.optim import restore, snapshot
from pipeline.finetune.parallel import ALONE, Team
from pipeline.finetune.policies import Policy, make_policy, merge_lora
from pipeline.finetune.run import FinetuneRun
from pipeline.finetune.search import MAX_CHOOSING, MAX_SHARE, N_TRIALS, search_lr
from pipeline.finetune.settings import Settings
from pipeline.finetune.top import SplitPoint, find_split
from pipeline.finetune.trainer import Hooks, Trainer
from pipeline.heads.tasks import Task, task_slices
from pipeline.runs.tasks import MEAN_NOTE, score_task
from pipeline.store import Store, open_store
from pipeline.sweep.head_run import Clock

AUTO, NONE = "auto", "none"
FRESH = "fresh"


@dataclass(frozen=True)
class Watcher:
    """Who is told what happens.

    Attributes:
        on_plan: "Reading", "Embedding" or "Training" begins: of how many images in all, and how
            many to do.
        on_progress: how many more images were read or trained on.
        on_epoch: an entry of the curve.
        note: a sentence for the user, at once.
        should_stop: whether the user asked to stop.
        log: "tensorboard" or "mlflow"; None for neither.
    """

    on_plan: Callable[[str, int, int], None] = lambda *_: None
    on_progress: Callable[[int], None] = lambda _: None
    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None
    note: Callable[[str], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False
    log: str | None = None


def finetune(
    source: DataSource,
    backbone: Backbone | str,
    settings: Settings | None = None,
    *,
    label: str | Sequence[str] | None = None,
    groups: str | None = None,
    init_head: str | Path = AUTO,
    out: Path | None = None,
    cache_dir: Path = Path("cache"),
    resume: bool = False,
    watcher: Watcher | None = None,
    team: Team = ALONE,
) -> FinetuneRun:
    """Train a network on the train split and score it once on the test split.

    The epoch and, where none is given, the learning rate are chosen on the val split or, where
    there is none, on a fifth of train (a tenth above 50,000); what is kept was trained without
    them. Nothing is written but a checkpoint: see :meth:`FinetuneRun.save`.

    Args:
        source: labelled images.
        backbone: a network, or its name.
        settings: how to train.
        label: label column; None for "label" or the only one. Several are learned at once, each
            with outputs of its own behind one trunk; a sample counts wherever it has a label.
        groups: column of samples that belong together, none of which is ever parted. A test split
            that was made sample by sample is then made anew, by group.
        init_head: "auto" for the best head of a run on cached features of the same backbone and
            classes in ``out``, where there is one; "none" for a fresh one; or a run's folder.
        out: folder for the run's folder, and for the checkpoint until then;
            ``runs/<data source>`` by default.
        cache_dir: where stores are kept; with ``settings.cached`` that of the activations.
        resume: take up a training of the same data with the same settings.
        watcher: who is told what happens; of several processes, that of the first.
        team: the processes that train together, each of which calls this; see
            :func:`~pipeline.finetune.parallel.together`.

    Raises:
        UsageError: a name or an option that does not fit.
        DataError: no labels, no train split, too few classes, or no image can be read.
        MismatchError: the head to start from is of another backbone or has other classes.
        ResourceError: the device has too little memory for a single image, or the disk too little
            room for activations.
        StoreError: ``out`` cannot be written to.
        LockedError: another process is at the same training.
        LostProcessError: another one of the team has ended.
        StoppedError: the user asked to stop; a checkpoint holds all of it.
        TlpipeError: every learning rate diverged.
    """
    settings, watcher = settings or Settings(), watcher or Watcher()
    whole, settings = settings, team.own(settings)
    if not team.is_first:
        watcher = Watcher(should_stop=watcher.should_stop)
    clock = Clock()
    device = resolve_device(settings.device)
    if isinstance(backbone, str):
        backbone = load_backbone(backbone)
    dtype = choose_precision(settings.precision, device, backbone.module)
    backbone = _starting_weights(backbone, settings)
    out = out or Path("runs") / source.name
    columns = choose_columns(source, label)
    if settings.task_weights != "equal" and len(columns) == 1:
        raise UsageError(
            f"task_weights is {settings.task_weights!r}, but only {columns[0]!r} is learned.\n"
            "  Give a second --label, or leave --task-weights out."
        )
    if groups is not None:
        check_group_column(groups, source)
    cached = None
    stores: list[str] = []
    team.first(partial(check_writable, out))
    if settings.cached:
        clock.lap("load")
        # The first process embeds for all, and has the machine to itself.
        store, split = _embed(source, backbone, whole, dtype, cache_dir, watcher, team)
        clock.lap("embed")
        stores.append(str(store.path))
        data, cached = stored_data(store, source, split, settings, columns, groups)
    else:
        data = load_data(
            source,
            settings,
            columns,
            groups=groups,
            on_plan=partial(watcher.on_plan, "Reading"),
            on_progress=partial(_read, watcher),
            team=team,
        )
    head = team.first(lambda: _choose_head(init_head, out, backbone, data, settings))
    if head.note:
        watcher.note(head.note)
    work = _prepare(backbone, head, data, cached, settings, device, dtype, team)
    checkpoint = Checkpoint(out, _facts(backbone, data, settings, head))
    clock.lap("load")
    team.first(checkpoint.acquire)
    try:
        with open_log(watcher.log, out, settings.to_dict()) as log:
            trainer, trials, seconds = _train(work, checkpoint, resume, watcher, log)
    finally:
        if team.is_first:
            checkpoint.release()
    clock = Clock(clock.laps | seconds)
    stores += [path for path in head.stores if path not in stores]
    return _finish(work, backbone, data, head, stores, trainer, trials, checkpoint, out, clock)


def _read(watcher: Watcher, n_images: int) -> None:
    watcher.on_progress(n_images)
    if watcher.should_stop():
        raise StoppedError("Stopped while the images were read; nothing was kept.")


def _embed(
    source: DataSource,
    backbone: Backbone,
    settings: Settings,
    dtype: torch.dtype | None,
    cache_dir: Path,
    watcher: Watcher,
    team: Team,
) -> tuple[Store, SplitPoint]:
    """The store of the activations, which are there or come to be."""
    split = find_split(backbone, settings.policy)

    def embed() -> Path:
        store = embed_activations(
            source,
            backbone,
            split,
            settings,
            dtype,
            cache_dir=cache_dir,
            on_plan=partial(watcher.on_plan, "Embedding"),
            on_progress=watcher.on_progress,
            note=watcher.note,
            should_stop=watcher.should_stop,
        )
        return store.path

    store = open_store(team.first(embed))
    check_store(store, backbone, split)
    return store, split


@dataclass(frozen=True)
class _Work:
    """A network with what it is trained on.

    Attributes:
        whole: what is kept in the end.
        network: what is trained: the whole, or the top of it, which shares its numbers.
    """

    whole: Classifier
    network: Classifier
    policy: Policy
    settings: Settings
    train: ImageBatches | StoredBatches
    choose: ImageBatches | StoredBatches | None
    test: ImageBatches | StoredBatches
    device: torch.device
    dtype: torch.dtype | None
    tasks: tuple[Task, ...]
    first_can_be_best: bool
    n_parameters: int
    n_trained: int
    team: Team
    notes: list[str] = field(default_factory=list)

    def trainer(self, lr: float, n_steps: int | None = None, **options: Any) -> Trainer:
        """A trainer of the network as it is now."""
        return Trainer(
            self.network, self.policy, self.settings, self.train, self.choose,
            self._objective(), lr=lr, dtype=self.dtype, n_steps=n_steps, team=self.team,
            wrap=self._wrap, first_can_be_best=self.first_can_be_best, **options,
        )  # fmt: skip

    def _objective(self) -> Objective:
        n_classes = [len(task.classes) for task in self.tasks]
        if len(n_classes) == 1:
            return Classification(self.settings, n_classes[0])
        return MultiTask(self.settings, n_classes, self.device)

    def _wrap(self, network: nn.Module) -> nn.Module:
        if not self.settings.compile:
            return network
        compiled: nn.Module = torch.compile(network)  # type: ignore[assignment]
        return compiled


def _starting_weights(backbone: Backbone, settings: Settings) -> Backbone:
    """The backbone as it is; for "scratch" the same one with random weights."""
    if settings.policy != "scratch":
        return backbone
    origin = random_origin(dict(backbone.origin))
    return load_backbone(**{**origin, "seed": settings.seed})


def _choose_head(
    init_head: str | Path, out: Path, backbone: Backbone, data: TrainingData, settings: Settings
) -> InitialHead:
    n_outputs = sum(len(task.classes) for task in data.tasks)
    if str(init_head) == AUTO:
        found = None
        if settings.policy != "scratch":
            found = find_run(out, backbone, data, settings)
        if found is None:
            return fresh_head(backbone, n_outputs, settings)
        return head_of_run(found, backbone, data, settings)
    if str(init_head) == NONE:
        return fresh_head(backbone, n_outputs, settings)
    if settings.hidden:
        raise UsageError("--init-head brings the layers of its head, so leave --hidden out.")
    return head_of_run(Path(init_head), backbone, data, settings)


def _prepare(
    backbone: Backbone,
    head: InitialHead,
    data: TrainingData,
    cached: Cached | None,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype | None,
    team: Team,
) -> _Work:
    """Put network and policy together, and part the images."""
    preprocess = backbone.preprocess
    network = Classifier(make_trunk(backbone), copy.deepcopy(head.module))
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    blocks = find_blocks(network.trunk, backbone.stages, preprocess.height, preprocess.width)
    policy = make_policy(network, blocks, settings)
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    network = network.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    augment = make_augment(settings, preprocess)

    def batches(rows: NDArray[np.intp]) -> ImageBatches | StoredBatches:
        if cached is not None:
            return replace(cached.batches(data, rows, settings), team=team)
        return ImageBatches(
            data.images, rows, data.samples.inputs.ids[rows],
            torch.from_numpy(data.samples.codes[rows]), preprocess, augment,
            settings.batch_size, settings.seed, team,
        )  # fmt: skip

    train, choose = batches(data.fold.fit), data.fold.choose
    n_least = len(train.rows) // train.n_steps
    if n_least < team.n:
        raise UsageError(
            f"A batch has as few as {n_least} of the {len(train.rows):,} images that are trained "
            f"on, too few for {team.n} processes to share.\n"
            "  Use fewer processes, or a larger --batch-size."
        )
    return _Work(
        whole=network,
        network=network if cached is None else cached.top(network, data, preprocess),
        policy=policy,
        settings=settings,
        train=train,
        choose=batches(choose) if len(choose) else None,
        test=batches(data.samples.protocol.test),
        device=device,
        dtype=dtype,
        tasks=data.tasks,
        first_can_be_best=not head.saw_choosers,
        n_parameters=n_parameters,
        n_trained=policy.n_trained(network),
        team=team,
    )


def _facts(
    backbone: Backbone, data: TrainingData, settings: Settings, head: InitialHead
) -> dict[str, Any]:
    """All that decides the result of a training."""
    return {
        "backbone": backbone.name,
        "weights": backbone.weights_digest,
        "preprocess": backbone.preprocess.to_dict(),
        "data": data.samples.key(),
        "label": data.samples.inputs.label_column,
        "settings": settings.key(),
        "head": head.digest,
    }


def _train(
    work: _Work,
    checkpoint: Checkpoint,
    resume: bool,
    watcher: Watcher,
    log: Callable[[dict[str, Any]], None],
) -> tuple[Trainer, list[dict[str, Any]], dict[str, float]]:
    """Search the learning rate and train, or take up where that was stopped."""
    settings, team = work.settings, work.team

    def on_epoch(entry: dict[str, Any]) -> None:
        watcher.on_epoch(entry)
        log(entry)

    def note(text: str) -> None:
        watcher.note(text)
        work.notes.append(text)

    hooks = Hooks(on_epoch, watcher.on_progress, note, watcher.should_stop)
    if team.n > 1 and settings.trains_batchnorm:
        note(
            f"Each of {team.n} processes computes the statistics of BatchNorm from its own part of "
            "a batch."
        )
    saved = team.first(lambda: checkpoint.load() if resume and checkpoint.exists() else None)
    if saved is None and resume:
        watcher.note("There is nothing to take up: the training starts at its first step.")
    elif saved is None and team.is_first and checkpoint.exists():
        watcher.note(
            "An unfinished training of the same data with the same settings is dropped; --resume "
            "would have taken it up."
        )
        checkpoint.drop()
    checkpoint.beside = {
        name: saved[name] if saved else nothing
        for name, nothing in (("lr_trials", []), ("search_seconds", 0.0))
    }
    state = saved if saved and "lr" in saved else None  # else only learning rates were tried
    lr = state["lr"] if state else _find_lr(work, checkpoint, watcher)
    trials, search_seconds = checkpoint.beside["lr_trials"], checkpoint.beside["search_seconds"]
    trainer = work.trainer(lr, checkpoint=checkpoint, hooks=hooks)
    if state:
        trainer.load_state(state)
        watcher.note(f"Taken up at step {trainer.progress.step:,} of {trainer.n_steps:,}.")
    else:
        trainer.progress.seconds = search_seconds
    n_all = settings.epochs * len(work.train.rows)
    n_done = n_all * trainer.progress.step // trainer.n_steps
    watcher.on_plan("Training", n_all, n_all - n_done)
    progress = trainer.run()
    if progress.note:
        work.notes.append(progress.note)
    seconds = {"search": search_seconds, "train": progress.seconds - search_seconds}
    return trainer, trials, seconds


def _find_lr(work: _Work, checkpoint: Checkpoint, watcher: Watcher) -> float:
    """The learning rate; the checkpoint keeps what was tried, and the seconds that it took."""
    if work.settings.lr is not None:
        return work.settings.lr
    beside = checkpoint.beside
    trials, started = beside["lr_trials"], time.perf_counter() - beside["search_seconds"]
    if trials:
        watcher.note(f"Taken up after {counted(len(trials), 'trial')} of learning rates.")

    def keep() -> None:
        beside["search_seconds"] = time.perf_counter() - started
        if work.team.is_first:
            checkpoint.save({})

    some = None if work.choose is None else work.choose.take(MAX_CHOOSING)
    budget = work.settings.budget_seconds
    share = None if budget is None else budget * MAX_SHARE / N_TRIALS
    settings = replace(work.settings, ema=0.0, budget_seconds=share)
    quick = replace(work, settings=settings)
    hooks = Hooks(should_stop=watcher.should_stop)
    head = work.network.head
    start = snapshot(head, head.state_dict())
    # From a fitted head so few steps mostly lose, and the smallest rate, which moves least, may
    # win though it learns least in the end (digits: 0.91 with 1e-4, 0.95 with 3e-4). So the rate is
    # found with a fresh one.
    restore(head, fresh_like(head, settings.seed).state_dict())
    n_steps = settings.epochs * work.train.n_steps
    make = partial(quick.trainer, hooks=hooks)
    lr = search_lr(make, some, settings, n_steps, trials, keep=keep, note=watcher.note)
    restore(head, start)
    watcher.note(f"Learning rate {lr:g}, the best of {len({t['lr'] for t in trials})}.")
    return lr


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _finish(
    work: _Work,
    backbone: Backbone,
    data: TrainingData,
    head: InitialHead,
    stores: list[str],
    trainer: Trainer,
    trials: list[dict[str, Any]],
    checkpoint: Checkpoint,
    out: Path,
    clock: Clock,
) -> FinetuneRun:
    """Score what was kept, and write down what was found out."""
    samples, network = data.samples, work.whole
    if work.settings.policy == "lora":
        merge_lora(network)
    network.requires_grad_(False).eval()
    test, choose = samples.protocol.test, data.fold.choose
    parts = {"test": (test, work.test), "val": (choose, work.choose)}
    probabilities = {
        split: (rows, probabilities_of(_all_outputs(work, batches), data.tasks))
        for split, (rows, batches) in parts.items()
        if len(rows) and batches is not None
    }
    slices = task_slices([len(task.classes) for task in data.tasks])
    results = tuple(
        score_task(
            column.task,
            column.unseen,
            column.codes,
            {split: (rows, found[:, part]) for split, (rows, found) in probabilities.items()},
            ids=samples.inputs.ids,
            splits=samples.inputs.splits,
            seed=samples.seed,
        )
        for column, part in zip(data.columns, slices, strict=True)
    )
    notes = [*training_notes(data), *([head.note] if head.note else []), *work.notes]
    if len(results) > 1:
        notes.append(MEAN_NOTE)
    clock.lap("score")
    layers = linear_layers(network.head)
    return FinetuneRun(
        network=network.cpu(),
        architecture=Architecture(
            random_origin(dict(backbone.origin)),
            backbone.preprocess,
            tuple(layer.out_features for layer in layers[:-1]),
            isinstance(network.head.get_submodule("0"), L2Normalise),
        ),
        settings=work.settings,
        lr=trainer.lr,
        lr_trials=trials,
        backbone={
            "name": backbone.name,
            "weights": backbone.weights,
            "weights_digest": backbone.weights_digest,
        },
        source=data.source,
        head=str(head.run) if head.run else FRESH,
        head_refitted=head.refitted,
        head_seconds=head.seconds,
        stores=stores,
        n_parameters=work.n_parameters,
        n_trained=work.n_trained,
        best_epoch=trainer.progress.best_epoch,
        curve=trainer.progress.curve,
        chosen_by=samples.protocol.chosen_by,
        results=results,
        task_weights=trainer.objective.task_weights,
        n_samples=samples.n_samples(),
        n_fit=len(data.fold.fit),
        split_origin=samples.split_origin,
        seconds=clock.seconds(),
        device=_device_name(work.device),
        n_processes=work.team.n,
        data_digest=samples.inputs.digest(),
        failures=data.failures,
        notes=notes,
        checkpoint=checkpoint,
        out=out,
    )


def _all_outputs(work: _Work, batches: ImageBatches | StoredBatches) -> torch.Tensor:
    """(n_samples, n_outputs) of the network in its last state, from all processes."""
    return work.team.joined(outputs_of(work.network, batches, work.device))
