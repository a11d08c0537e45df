"""Stage three: train the backbone itself, or a part of it, and score it as heads are scored.

fit.py          finetune(): data, network, search, training, scoring, in this order
settings.py     Settings: how to train
data.py         who trains, who chooses, who scores; files that cannot be read are left out
images.py       batches of images: decoded in threads, augmented by (seed, epoch, sample)
cached.py       activations at the last frozen block, stored once and trained on
top.py          the part of a network above them, checked against the whole
augment.py      torchvision's augmentations, made to depend on a seed alone
blocks.py       the blocks of a network, found by running it
policies.py     which parameters a policy trains, and in which mode each module is
network.py      Classifier: a backbone without its own classifier, and a new head
initial.py      the new head: fresh, or that of a run on cached features
objective.py    what is learned: one label column, or several at once
trainer.py      the training loop, on any source of batches and any loss
parallel.py     several processes, started by torchrun, that train together
optim.py        parameter groups, learning rates by step, moving averages, pull to the start
evaluate.py     logits of a source, loss and accuracy
search.py       --lr auto
checkpoint.py   what a killed training is taken up from
logs.py         TensorBoard and MLflow
run.py          FinetuneRun: what was found out, and its folder
bundle.py       the trained network: saved as arrays and a card, loaded without running code
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.finetune.fit import finetune
    from pipeline.finetune.run import FinetuneRun
    from pipeline.finetune.settings import Settings

__all__ = ["FinetuneRun", "Settings", "finetune"]

_HOME = {
    "FinetuneRun": "pipeline.finetune.run",
    "Settings": "pipeline.finetune.settings",
    "finetune": "pipeline.finetune.fit",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
