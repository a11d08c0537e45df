"""``tlpipe finetune``: images -> a trained network, scored on held-out images."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.backbones import DEFAULT_BACKBONE
from pipeline.commands.console import (
    Console,
    Progress,
    cache_option,
    format_seconds,
    output_options,
    printable,
)
from pipeline.commands.sweep_options import labels_option, parse_seconds, split_commas
from pipeline.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SKIPPED, UsageError

if TYPE_CHECKING:
    from pipeline.finetune.parallel import Team
    from pipeline.finetune.run import FinetuneRun

SHOWN_FAILURES = 20

_METRICS = {
    "top1": "top-1 [95 %]",
    "top5": "top-5",
    "macro_f1": "macro-F1",
    "mean_per_class_accuracy": "per-class",
    "nll": "NLL",
    "ece": "ECE",
}
_CHOSE = "validation (chose the epoch)"


@click.command()
@click.argument("data")
@click.option(
    "--backbone", default=DEFAULT_BACKBONE, show_default=True, help="Network to start from."
)
@click.option(
    "--weights",
    default="default",
    show_default=True,
    help="default, random, one of the network's tags, or a file.",
)
@click.option("--image-size", type=click.IntRange(min=1), help="Side of the input, pixels.")
@click.option(
    "--policy",
    default="full",
    show_default=True,
    help="What is trained: head, last:N blocks, full, gradual (from the top down), scratch (full, "
    "from random weights), bitfit (biases), norm, or lora (needs the extra lora).",
)
@labels_option
@click.option(
    "--task-weights",
    default="equal",
    show_default=True,
    help="Of the losses of several label columns: equal, or uncertainty, which learns them.",
)
@click.option(
    "--group-column",
    "groups",
    help="Column of samples that belong together (patients, scenes): none is ever parted.",
)
@click.option(
    "--init-head",
    default="auto",
    show_default=True,
    metavar="RUN",
    help="Run of fit-head whose head is the start; auto for the best that fits, none for none.",
)
@click.option("--epochs", type=int, default=10, show_default=True, help="Passes over train.")
@click.option("--budget", metavar="TIME", help="Stop by then: 90s, 30m, 2h.")
@click.option(
    "--batch-size", type=int, default=32, show_default=True, help="Images a step of the optimiser."
)
@click.option(
    "--micro-batch-size",
    type=int,
    help="Images computed at once; their gradients are added up.  [default: all of a step]",
)
@click.option(
    "--lr", default="auto", show_default=True, help="Highest learning rate; auto tries four."
)
@click.option("--optimizer", default="adamw", show_default=True, help="adamw or sgd.")
@click.option("--weight-decay", type=float, default=0.02, show_default=True, help="Of matrices.")
@click.option(
    "--layer-decay",
    type=float,
    help="Learning rate of a block to that of the next.  [default: 0.8; 1 for scratch and lora]",
)
@click.option(
    "--warmup", type=float, default=0.1, show_default=True, help="Share of the steps to warm up."
)
@click.option("--clip", type=float, default=1.0, show_default=True, help="Gradient norm; 0: any.")
@click.option("--ema", type=float, default=0.0, show_default=True, help="Decay, such as 0.999.")
@click.option("--l2-sp", type=float, default=0.0, show_default=True, help="Pull to the start.")
@click.option(
    "--label-smoothing", type=float, default=0.0, show_default=True, help="Share of each target."
)
@click.option("--mixup", type=float, default=0.0, show_default=True, help="Alpha, such as 0.2.")
@click.option("--cutmix", type=float, default=0.0, show_default=True, help="Alpha, such as 1.")
@click.option(
    "--augment",
    help="none, crop, trivial (crop and TrivialAugment) or rand (crop and RandAugment).  "
    "[default: crop; none with --cached]",
)
@click.option("--flip/--no-flip", default=True, show_default=True, help="Mirror one in two.")
@click.option(
    "--min-crop", type=float, default=0.7, show_default=True, help="Least share of the area shown."
)
@click.option(
    "--cached",
    is_flag=True,
    help="Store what the last frozen block gives, and train on that: for last:N and head.",
)
@click.option(
    "--views",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --cached: stored views of each image, of which each epoch shows one.",
)
@click.option("--hidden", metavar="WIDTHS", help="Hidden layers of the new head: 512 or 512,256.")
@click.option("--dropout", type=float, default=0.0, show_default=True, help="In the new head.")
@click.option("--lora-rank", type=int, default=8, show_default=True, help="Of the updates.")
@click.option(
    "--batchnorm",
    help="Statistics in what is trained: frozen or train.  [default: train for scratch]",
)
@click.option(
    "--patience",
    type=int,
    default=10,
    show_default=True,
    help="Stop after so many epochs without a better one; 0: never.",
)
@click.option(
    "--precision", default="auto", show_default=True, help="Of training: auto, fp32, bf16 or fp16."
)
@click.option("--compile", "compiled", is_flag=True, help="Use torch.compile.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of it all.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many samples of each split.")
@click.option("--root", type=click.Path(path_type=Path), help="Where a manifest's paths start.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--threads", type=click.IntRange(min=1), help="Decoding threads.  [default: cores]")
@click.option("--log", help="Also log to tensorboard or mlflow, where it is installed.")
@click.option("--resume", is_flag=True, help="Take up the same training where it was stopped.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to make the run's folder in.  [default: runs/<data source>]",
)
@cache_option
@output_options
def command(data: str, as_json: bool, quiet: bool, **options: Any) -> int:
    """Train a network on DATA, and score it on held-out images.

    DATA is what extract takes. The epoch that is kept and the learning rate are chosen on the val
    split or, where there is none, on a fifth of train; the test split is scored once. A head that
    was fitted on cached features of the same backbone is the start where there is one. Progress is
    kept: after Ctrl-C or a crash, the same command with --resume goes on, to the same result.

    \b
    Examples:
      tlpipe finetune photos/ --policy last:2
      tlpipe finetune photos/ --backbone resnet50 --budget 30m
      tlpipe finetune photos/ --policy last:1 --cached --epochs 30
      tlpipe finetune photos.csv --label species --label age --group-column scene
      tlpipe finetune photos/ --policy head --epochs 20 --augment trivial
      tlpipe finetune photos/ --init-head runs/photos/logreg-resnet50-0001 --backbone resnet50
      tlpipe finetune digits --image-size 64 --no-flip --resume
    """
    from pipeline.finetune.parallel import together

    with together() as team:
        console = Console(as_json=as_json, quiet=quiet or not team.is_first)
        return _finetune(data, console, team, options)


def _finetune(data: str, console: Console, team: Team, options: dict[str, Any]) -> int:
    """Train, save and print; of several processes, the first saves and prints."""
    from pipeline.backbones import load_backbone
    from pipeline.data import open_source
    from pipeline.extract.interrupt import graceful_interrupt
    from pipeline.finetune.checkpoint import StoppedError
    from pipeline.finetune.fit import Watcher, finetune
    from pipeline.finetune.settings import Settings

    chosen = Settings(**_settings_values(options))
    source = open_source(
        data,
        cache_dir=options["cache_dir"],
        root=options["root"],
        limit=options["limit"],
        seed=chosen.seed,
    )
    backbone = load_backbone(
        options["backbone"],
        weights="random" if chosen.policy == "scratch" else options["weights"],
        image_size=options["image_size"],
        seed=chosen.seed,
    )
    typed = shlex.join(["tlpipe", *sys.argv[1:]])
    if team.n > 1:
        typed = f"torchrun --nproc-per-node {team.n_local} --no-python {typed}"
    bars = _Bars(source.name, console.quiet)
    with bars, graceful_interrupt(console.note) as should_stop:
        try:
            run = finetune(
                source,
                backbone,
                chosen,
                label=options["labels"],
                groups=options["groups"],
                init_head=options["init_head"],
                out=options["out"],
                cache_dir=options["cache_dir"],
                resume=options["resume"],
                watcher=Watcher(
                    on_plan=bars.start,
                    on_progress=bars.advance,
                    on_epoch=lambda entry: console.note(_epoch_line(entry, chosen.epochs)),
                    note=lambda text: console.note(printable(text)),
                    should_stop=should_stop,
                    log=options["log"],
                ),
                team=team,
            )
        except StoppedError as stop:
            again = typed if options["resume"] else f"{typed} --resume"
            console.note(f"{stop}\nGo on with:\n  {again}")
            return EXIT_INTERRUPTED
    path = team.first(lambda: run.save(command=typed))
    if not team.is_first:
        return EXIT_DONE
    console.document({"path": str(path)} | run.to_dict())
    _print_run(console, run)
    shown = shlex.quote(str(path))
    console.next_steps([f"tlpipe predict {shown} image.jpg", f"tlpipe inspect {shown}"])
    console.result(str(path))
    # torchrun takes every code but 0 for a crash.
    return EXIT_SKIPPED if run.failures and team.n == 1 else EXIT_DONE


def _settings_values(options: dict[str, Any]) -> dict[str, Any]:
    """What ``Settings`` takes, from the options."""
    same = (
        "policy", "epochs", "batch_size", "micro_batch_size", "optimizer", "weight_decay",
        "layer_decay", "warmup", "clip", "ema", "l2_sp", "label_smoothing", "task_weights", "mixup",
        "cutmix", "cached", "flip", "min_crop", "dropout", "lora_rank", "batchnorm", "patience",
        "precision", "seed", "device",
    )  # fmt: skip
    try:
        lr = None if options["lr"] == "auto" else float(options["lr"])
        hidden = tuple(int(width) for width in split_commas(options["hidden"]))
    except ValueError as error:
        raise UsageError(f"{error}: --lr takes auto or a number, --hidden whole numbers.") from None
    return {
        **{name: options[name] for name in same},
        "lr": lr,
        "hidden": hidden,
        "augment": options["augment"] or ("none" if options["cached"] else "crop"),
        "n_views": options["views"],
        "compile": options["compiled"],
        "n_threads": options["threads"],
        "budget_seconds": parse_seconds(options["budget"], "--budget"),
    }


class _Bars:
    """One progress bar after the other."""

    def __init__(self, name: str, quiet: bool) -> None:
        self._name, self._quiet = name, quiet
        self._stack = ExitStack()
        self._bar: Progress | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, what: str, n_images: int, n_todo: int) -> None:
        """Begin another one."""
        self._stack.close()
        self._bar = self._stack.enter_context(Progress(f"{what} {self._name}", quiet=self._quiet))
        self._bar.start(n_images, n_todo)

    def advance(self, n_images: int) -> None:
        """So many more are done."""
        if self._bar is not None:
            self._bar.advance(n_images)


def _epoch_line(entry: dict[str, Any], n_epochs: int) -> str:
    parts = []
    if entry["train_loss"] is not None:
        parts.append(f"loss {entry['train_loss']:.3f}")
    if entry["val_top1"] is not None:
        loss = "not a number" if entry["val_loss"] is None else f"{entry['val_loss']:.3f}"
        parts.append(f"validation top-1 {entry['val_top1']:.3f}, loss {loss}")
    if entry["images_per_second"]:
        parts.append(f"{entry['images_per_second']:.0f} images/s")
    parts.append(format_seconds(entry["seconds"]))
    return f"  epoch {entry['epoch']} of {n_epochs}: {', '.join(parts)}"


def _print_run(console: Console, run: FinetuneRun) -> None:
    for note in run.notes:
        console.note(printable(note))
    for name, why in list(run.failures.items())[:SHOWN_FAILURES]:
        console.note(f"Skipped {printable(name)}: {printable(why)}")
    _print_scores(console, run)
    found = f" (the best of {len({t['lr'] for t in run.lr_trials})})" if run.lr_trials else ""
    console.result(
        f"{run.settings.policy}: {run.n_trained:,} of {run.n_parameters:,} parameters, learning "
        f"rate {run.lr:g}{found}, epoch {run.best_epoch} of {run.curve[-1]['epoch']} kept, chosen "
        f"by {run.chosen_by}"
    )
    seconds = run.seconds
    n_classes = " + ".join(str(len(task.classes)) for task in run.tasks)
    console.result(
        f"{run.n_fit:,} images trained on, {n_classes} classes, "
        f"{format_seconds(seconds['total'])} (search {format_seconds(seconds['search'])}, "
        f"training {format_seconds(seconds['train'])})"
    )


def _print_scores(console: Console, run: FinetuneRun) -> None:
    """A line a split; of several label columns one a column and split."""
    every = [scores for result in run.results for scores in result.scores.values()]
    shown = [name for name in _METRICS if any(name in scores for scores in every)]
    rows = []
    for result in run.results:
        of_task = f"{printable(result.task.label)}, " if len(run.results) > 1 else ""
        for split, scores in result.scores.items():
            cells = [f"{scores[name].value:.3f}" if name in scores else "" for name in shown]
            cells[0] = str(scores["top1"])
            is_test = split == "test"
            words = f"test ({result.n_samples['test']:,})" if is_test else _CHOSE
            rows.append([f"{of_task}{words}", *cells])
    if rows:
        console.table(["scored on", *(_METRICS[name] for name in shown)], rows)
    if run.settings.task_weights != "equal":
        pairs = zip(run.tasks, run.task_weights, strict=True)
        weights = ", ".join(f"{printable(task.label)} {weight:.2f}" for task, weight in pairs)
        console.result(f"learned weights of the losses: {weights}")
