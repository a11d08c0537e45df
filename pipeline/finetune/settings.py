"""How to train."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import UnknownNameError, UsageError
from pipeline.heads.tasks import TASK_WEIGHTS

POLICIES = ("head", "last:N", "full", "gradual", "scratch", "bitfit", "norm", "lora")
AUGMENTATIONS = ("none", "crop", "trivial", "rand")
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BATCHNORMS = ("frozen", "train")

# What decides how fast a result comes, and not the result; a resumed run may change it.
_NOT_IN_KEY = ("device", "n_threads", "checkpoint_seconds", "cache_bytes")


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        policy: "head", "last:N", "full", "gradual", "scratch", "bitfit", "norm" or "lora".
        epochs: passes over the training samples, at most.
        batch_size: samples a step, over all processes.
        micro_batch_size: samples that are computed at once, their gradients added up; None for
            all of a step.
        lr: the learning rate at its highest, of the head and the last block; None searches.
        optimizer: "adamw", or "sgd" with Nesterov momentum.
        momentum: of SGD.
        weight_decay: decoupled for AdamW; norms, biases and single vectors have none.
        layer_decay: each block's learning rate is this times that of the next; None is 0.8, and 1
            for "scratch" and "lora".
        warmup: share of the steps in which the learning rate rises; it then falls along a cosine.
        label_smoothing: share of each target that is spread evenly over the classes.
        task_weights: of several label columns: "equal", or "uncertainty", which learns them.
        mixup: alpha of mixup's Beta distribution; 0 for none.
        cutmix: alpha of CutMix; 0 for none. With both, each step takes one of them.
        augment: "none" (the plain view), "crop" (random resized crop), "trivial" or "rand" (the
            crop and TrivialAugment or RandAugment).
        cached: whether the activations at the last frozen block are stored, and trained on instead
            of the images; for "last:N" and "head", without new augmentations.
        n_views: stored views of each image that cached training draws from; the first is plain.
        flip: whether an augmented view is mirrored in one of two.
        min_crop: smallest share of an image's area that a crop shows. Much smaller ones are so
            unlike the plain views that a fitted head is torn down before it is built up again.
        ema: decay of the weights' moving average, which is then what is evaluated; 0 for none.
        clip: largest norm of a step's gradient; 0 for any.
        l2_sp: strength of the pull towards the starting weights, in place of their weight decay.
        patience: epochs without a better one until training stops; 0 for all of them.
        batchnorm: statistics of BatchNorm in what is trained: "frozen" or "train"; None is "train"
            for "scratch" alone, since those of few images a step are worse than those that were
            learned. Elsewhere they are always frozen.
        hidden: widths of the new head's hidden layers.
        dropout: before each linear layer of the new head.
        lora_rank: of the low-rank updates.
        precision: "auto", "fp32", "bf16" or "fp16", of training; scores are in float32.
        channels_last: memory format of the images and convolutions.
        compile: whether torch.compile makes a program of the network.
        hold_out: whether a part of train is held out to choose the epoch where there is no val
            split; else all of it trains, and the last state is kept.
        seed: of everything random.
        budget_seconds: for search and training together; None for as long as it takes.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        n_threads: decoding threads; None for one a core.
        checkpoint_seconds: between checkpoints within an epoch.
        cache_bytes: memory for decoded images, so that they are decoded once.
    """

    policy: str = "full"
    epochs: int = 10
    batch_size: int = 32
    micro_batch_size: int | None = None
    lr: float | None = None
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.02
    layer_decay: float | None = None
    warmup: float = 0.1
    label_smoothing: float = 0.0
    task_weights: str = "equal"
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str = "crop"
    cached: bool = False
    n_views: int = 1
    flip: bool = True
    min_crop: float = 0.7
    ema: float = 0.0
    clip: float = 1.0
    l2_sp: float = 0.0
    patience: int = 10
    batchnorm: str | None = None
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    lora_rank: int = 8
    precision: str = "auto"
    channels_last: bool = True
    compile: bool = False
    hold_out: bool = True
    seed: int = 0
    budget_seconds: float | None = None

    device: str = "auto"
    n_threads: int | None = None
    checkpoint_seconds: float = 60.0
    cache_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: a value is out of its range, or no known name.
        """
        check_policy(self.policy)
        for name, value, known in (
            ("augmentation", self.augment, AUGMENTATIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("precision", self.precision, PRECISIONS),
            ("BatchNorm choice", self.batchnorm or "frozen", BATCHNORMS),
            ("task weighting", self.task_weights, TASK_WEIGHTS),
        ):
            if value not in known:
                raise UnknownNameError(name, value, known)
        for name, number, low, high in (
            ("epochs", self.epochs, 1, None),
            ("batch_size", self.batch_size, 1, None),
            ("micro_batch_size", self.micro_batch_size or 1, 1, None),
            ("weight_decay", self.weight_decay, 0, None),
            ("momentum", self.momentum, 0, 1),
            ("layer_decay", self.decay, 0, 1),
            ("warmup", self.warmup, 0, 1),
            ("label_smoothing", self.label_smoothing, 0, 1),
            ("mixup", self.mixup, 0, None),
            ("cutmix", self.cutmix, 0, None),
            ("min_crop", self.min_crop, 0, 1),
            ("ema", self.ema, 0, 1),
            ("clip", self.clip, 0, None),
            ("l2_sp", self.l2_sp, 0, None),
            ("patience", self.patience, 0, None),
            ("dropout", self.dropout, 0, 1),
            ("lora_rank", self.lora_rank, 1, None),
            ("n_views", self.n_views, 1, None),
            *(("hidden", width, 1, None) for width in self.hidden),
        ):
            if not number >= low or (high is not None and number > high):
                expected = f"{low} or more" if high is None else f"{low} to {high}"
                raise UsageError(f"{name} is {number}; expected {expected}.")
        for name, positive in (("lr", self.lr), ("budget_seconds", self.budget_seconds)):
            if positive is not None and not 0 < positive < float("inf"):
                raise UsageError(f"{name} is {positive}; expected a number above 0.")
        if self.ema == 1 or self.dropout == 1 or self.decay == 0:
            raise UsageError("With ema 1, dropout 1 or layer_decay 0 nothing would be learned.")
        if self.cached:
            self._check_cached()
        elif self.n_views > 1:
            raise UsageError(
                f"n_views is {self.n_views}, but only cached training has stored views.\n"
                "  Add --cached, or use --augment crop."
            )

    def _check_cached(self) -> None:
        """Refuse what needs the images.

        Raises:
            UsageError: there is such a setting.
        """
        if self.augment != "none":
            raise UsageError(
                "Stored activations cannot be augmented anew in every epoch.\n"
                "  With --cached use --augment none; --views 4 stores augmented views to draw from."
            )
        if self.mixup or self.cutmix:
            raise UsageError(
                "Of mixup and CutMix, which mix images, stored activations know nothing.\n"
                "  Leave them out, or leave --cached out."
            )
        if self.compile:
            raise UsageError("torch.compile cannot take a part of a network; leave it out.")

    @property
    def decay(self) -> float:
        """``layer_decay``, or what suits the policy."""
        if self.layer_decay is not None:
            return self.layer_decay
        return 1.0 if self.policy in ("scratch", "lora") else 0.8

    @property
    def trains_batchnorm(self) -> bool:
        """Whether statistics of BatchNorm change in what is trained."""
        if self.batchnorm is not None:
            return self.batchnorm == "train"
        return self.policy == "scratch"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "hidden": list(self.hidden)}

    def key(self) -> dict[str, Any]:
        """Those that decide the result."""
        return {name: value for name, value in self.to_dict().items() if name not in _NOT_IN_KEY}


def check_policy(policy: str) -> None:
    """Raise UnknownNameError or UsageError for what is no policy."""
    name, _, number = policy.partition(":")
    if name == "last" and not re.fullmatch(r"[1-9]\d{0,3}", number, re.ASCII):
        raise UsageError(f"Policy {policy!r} is not understood; expected last:N, such as last:2.")
    if name != "last" and policy not in POLICIES:
        raise UnknownNameError("policy", policy, POLICIES)
