"""Which parameters a policy trains, and in which mode every module is.

What is frozen is in eval mode as a whole: no statistics, no dropout, no gradient; so a frozen
bottom always gives the same activations. Statistics of BatchNorm in what is trained are a choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import TlpipeError, UsageError
from pipeline.finetune.blocks import Blocks
from pipeline.finetune.network import Classifier
from pipeline.finetune.settings import Settings

_LORA = "lora_"


class MissingExtraError(TlpipeError):
    """A package that an option needs is not installed."""


@dataclass(frozen=True)
class Policy:
    """What is trained.

    Attributes:
        name: as in `Settings.policy`.
        blocks: of the trunk.
        parameters: names in the trunk of all that is ever trained.
        first: the lowest block that is trained; ``len(blocks)`` for none.
        trains_batchnorm: whether statistics change in trained blocks.
    """

    name: str
    blocks: Blocks
    parameters: frozenset[str]
    first: int
    trains_batchnorm: bool

    def first_block(self, epoch: int, n_epochs: int) -> int:
        """The lowest block that is trained in an epoch.

        "gradual" starts with the head alone and thaws from the top, so that all blocks are
        trained in the second half of the epochs (Howard and Ruder, ULMFiT, 2018, section 3.3).
        """
        if self.name != "gradual":
            return self.first
        share = min(1.0, epoch / max(1, n_epochs // 2))
        return len(self.blocks) - math.ceil(share * len(self.blocks))

    def apply(self, network: Classifier, epoch: int, n_epochs: int) -> None:
        """Set gradients and modes for an epoch."""
        first = self.first_block(epoch, n_epochs)
        for name, parameter in network.trunk.named_parameters():
            is_trained = name in self.parameters and self.blocks.of_parameter(name) >= first
            parameter.requires_grad_(is_trained)
        for path, module in network.trunk.named_modules():
            module.training = self.blocks.of(path) >= first and (
                self.trains_batchnorm or not isinstance(module, _BatchNorm)
            )
        network.head.train()

    def changing(self, network: Classifier) -> list[str]:
        """Names in ``network.state_dict()`` of all that training may change."""
        buffers = {name for name, _ in network.named_buffers()}
        return [
            name
            for name in network.state_dict()
            if name.startswith("head.")
            or name.removeprefix("trunk.") in self.parameters
            or (name in buffers and self.trains_batchnorm)
        ]

    def n_trained(self, network: Classifier) -> int:
        """Parameters that are ever trained, the head's among them."""
        in_trunk = (p.numel() for n, p in network.trunk.named_parameters() if n in self.parameters)
        return sum(in_trunk) + sum(p.numel() for p in network.head.parameters())


def make_policy(network: Classifier, blocks: Blocks, settings: Settings) -> Policy:
    """Work out what is trained; for "lora", put the low-rank updates into the trunk.

    Raises:
        UsageError: the network has no such blocks or parameters.
        MissingExtraError: peft is not installed.
    """
    name, n_blocks = settings.policy, len(blocks)
    check_fits(name, blocks.stages)
    if name == "lora":
        _inject_lora(network, blocks, settings)
    names = [n for n, p in network.trunk.named_parameters() if p.is_floating_point()]
    first = 0
    if name == "head":
        first = n_blocks
    elif name.startswith("last:"):
        first = n_blocks - int(name.removeprefix("last:"))
    chosen = [n for n in names if blocks.of_parameter(n) >= first]
    if name == "bitfit":
        chosen = [n for n in chosen if n.endswith("bias")]
    elif name == "norm":
        norms = {path for path, module in network.trunk.named_modules() if _is_norm(module)}
        chosen = [n for n in chosen if n.rpartition(".")[0] in norms]
    elif name == "lora":
        chosen = [n for n in chosen if _LORA in n]
    if name != "head" and not chosen:
        raise UsageError(
            f"Policy {name!r} finds nothing to train in this network: it has {len(names)} "
            "parameters, none of that kind.\n  Use --policy head or --policy full."
        )
    return Policy(name, blocks, frozenset(chosen), first, settings.trains_batchnorm)


def check_fits(policy: str, stages: Sequence[str]) -> None:
    """Refuse a policy that a network with these stages, or this installation, cannot follow.

    Raises:
        UsageError: it has too few blocks.
        MissingExtraError: peft is not installed.
    """
    if policy == "lora":
        _peft()
    elif policy.startswith("last:") and int(policy.removeprefix("last:")) > len(stages):
        raise UsageError(_too_many(int(policy.removeprefix("last:")), stages))


def _too_many(n_last: int, stages: Sequence[str]) -> str:
    if not stages:
        return (
            "The blocks of this network cannot be told apart, so last:N means nothing for it.\n"
            "  Use --policy head or --policy full."
        )
    return (
        f"Policy last:{n_last} asks for more blocks than the {len(stages)} that this "
        f"network has: {', '.join(stages)}.\n"
        f"  Use --policy last:{len(stages)} or less, or --policy full."
    )


def _is_norm(module: nn.Module) -> bool:
    """Normalisations have it in their names, in torch, torchvision and timm."""
    return "norm" in type(module).__name__.lower()


def _peft() -> Any:
    try:
        return import_module("peft")
    except ImportError as error:
        raise MissingExtraError(
            "--policy lora needs the package peft, which is not installed.\n"
            "  Install it:  pip install 'tlpipe[lora]',  or use --policy bitfit."
        ) from error


def _inject_lora(network: Classifier, blocks: Blocks, settings: Settings) -> None:
    """Add a low-rank update to every linear layer of the stages (Hu et al., LoRA, 2021)."""
    peft = _peft()
    attention = tuple(
        f"{path}." for path, m in network.trunk.named_modules()
        if isinstance(m, nn.MultiheadAttention)
    )  # fmt: skip
    targets = [
        path
        for path, module in network.trunk.named_modules()
        # torch's own attention reads the weights of its projection without calling it
        if type(module) is nn.Linear and blocks.of(path) and not path.startswith(attention)
    ]
    if not targets:
        raise UsageError(
            "Policy 'lora' is for transformers: this network has no linear layer in its blocks.\n"
            "  Use --policy last:1 or --policy norm."
        )
    config = peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=targets
    )
    peft.inject_adapter_in_model(config, network.trunk)


def merge_lora(network: Classifier) -> None:
    """Add the low-rank updates to the weights and take them out: a plain network again."""
    adapted: list[tuple[str, Any]] = [
        (path, module)
        for path, module in network.trunk.named_modules()
        if hasattr(module, "get_base_layer") and hasattr(module, "merge")
    ]
    for path, module in adapted:
        module.merge()
        network.trunk.set_submodule(path, module.get_base_layer())
