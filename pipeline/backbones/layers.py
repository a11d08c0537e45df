"""Which modules of a network make good layers, found by running it once without numbers.

No list of architectures is kept: a network is run on the meta device, which computes shapes
only, and its module tree is walked down to the level where it is a row of blocks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Distinctive enough that an axis of this length is the batch: no network has 3 of anything first.
_TRACED_BATCH = 3


@dataclass(frozen=True)
class Trace:
    """What one forward pass of a network went through.

    Attributes:
        shapes: module path -> shape of one sample's activation (1 to 3 axes), in the order in
            which they were last computed; only modules that give one row an image.
        trunk: module paths that ran before the head.
        classifier: module path whose input is the penultimate layer, or None for networks with
            ``forward_features`` and ``forward_head`` (timm's protocol).
        n_features: length of the penultimate vector.
    """

    shapes: dict[str, tuple[int, ...]]
    trunk: frozenset[str]
    classifier: str | None
    n_features: int


@dataclass
class Tap:
    """A hook that keeps what flows through it; an object, so that it is copied with its module."""

    value: Any = None

    def take(self) -> Any:
        """What was kept, once: nothing of a batch outlives its forward pass."""
        value, self.value = self.value, None
        return value

    def on_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Forward pre-hook: keep the first input."""
        self.value = inputs[0]

    def on_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Forward hook: keep the output."""
        self.value = first_tensor(output)


@dataclass
class _Recorder:
    """A forward hook that notes the shape of what its module gave."""

    name: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.ran.add(self.name)
        tensor = first_tensor(output)
        self.shapes.pop(self.name, None)
        if tensor is not None and 2 <= tensor.ndim <= 4 and tensor.shape[0] == _TRACED_BATCH:
            self.shapes[self.name] = tuple(tensor.shape[1:])


def first_tensor(output: Any) -> torch.Tensor | None:
    """A module's output, or the first of several where that is a tensor (attention gives two)."""
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def twin(module: nn.Module, device: str | None = None) -> nn.Module:
    """A copy of a module's structure on the same numbers, so that its hooks are its own.

    Moving or casting the twin leaves the original alone.

    Args:
        module: frozen.
        device: None shares the tensors; "meta" gives tensors of the same shapes without numbers.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        values = parameter.detach()
        values = values if device is None else torch.empty_like(values, device=device)
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in module.buffers():
        values = buffer.detach()
        memo[id(buffer)] = values if device is None else torch.empty_like(values, device=device)
    return copy.deepcopy(module, memo)


def follows_timm(network: nn.Module) -> bool:
    """Whether a network splits its forward pass into features and head, as timm's do."""
    return hasattr(network, "forward_features") and hasattr(network, "forward_head")


def trace(network: nn.Module, height: int, width: int) -> Trace:
    """Run a frozen network once and note what every module gave.

    Args:
        network: in eval mode.
        height: of its input, pixels.
        width: of its input, pixels.

    Raises:
        RuntimeError, AssertionError, ValueError: the network cannot take this size.
    """
    try:
        return _trace(twin(network, "meta"), height, width, "meta")
    except RuntimeError:  # also NotImplementedError: something in it needs real numbers
        return _trace(twin(network), height, width, "cpu")


def _trace(network: nn.Module, height: int, width: int, device: str) -> Trace:
    shapes: dict[str, tuple[int, ...]] = {}
    ran: set[str] = set()
    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(_Recorder(name, shapes, ran))
    images = torch.zeros(_TRACED_BATCH, 3, height, width, device=device)
    with torch.inference_mode():
        if follows_timm(network):
            features = network.forward_features(images)  # type: ignore[operator]
            trunk = frozenset(ran)
            penultimate = network.forward_head(features, pre_logits=True)  # type: ignore[operator]
            n_features = penultimate.flatten(1).shape[1]
            network.forward_head(features)  # type: ignore[operator]
            return Trace(shapes, trunk, None, n_features)
        network(images)
    classifier = find_classifier(network)
    head = classifier.split(".")[0]
    trunk = frozenset(name for name in ran if name.split(".")[0] != head)
    return Trace(shapes, trunk, classifier, n_inputs(network.get_submodule(classifier)))


def n_inputs(classifier: nn.Module) -> int:
    """Length of the vector that a linear or convolutional classifier takes."""
    if isinstance(classifier, nn.Conv2d):
        return classifier.in_channels
    return int(classifier.in_features)  # type: ignore[arg-type]


def find_classifier(network: nn.Module) -> str:
    """Path of the module that makes the logits: the last linear one, else the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        names: list[str] = [
            name for name, module in network.named_modules() if isinstance(module, kind)
        ]
        if names:
            return names[-1]
    raise ValueError("The network has neither a linear layer nor a convolution.")


@dataclass(frozen=True)
class _Node:
    """A module of the trunk with weights."""

    path: str
    module: nn.Module
    n_weights: int


def find_stages(network: nn.Module, traced: Trace) -> tuple[str, ...]:
    """Module paths of a network's stages, in the order in which they run.

    Walks down the tree of modules that have weights, from the root:

    1. where one child holds over 90 % of the weights, go into it;
    2. where three or more children are built of blocks themselves and hold over a quarter of
       the weights, these are the stages (residual stages, transformer blocks, inception modules;
       stems, norms and downsampling between stages are not built of blocks);
    3. where one child holds over half of the weights, go into it;
    4. where lists of modules are in the way, look through them;
    5. otherwise this is a row of plain layers (VGG, SqueezeNet): each weighted one starts a
       stage, which ends with what follows it (activation, pooling).

    Returns:
        Possibly (): some networks pass lists of tensors between their stages.
    """
    level = _children(network, "", traced)
    siblings = [(name, module) for name, module in network.named_children()]
    prefix = ""
    while level:
        total = sum(node.n_weights for node in level)
        largest = max(level, key=lambda node: node.n_weights)
        can_enter = bool(_children(largest.module, f"{largest.path}.", traced))
        blocks = [n for n in level if _is_map(n.path, traced) and _has_blocks(n, traced)]
        n_in_blocks = sum(node.n_weights for node in blocks)
        lists = [node for node in level if not _is_map(node.path, traced)]
        opened = _open_lists(level, traced)
        if len(lists) == len(level) > 1 and opened != level:
            level = opened
        elif can_enter and largest.n_weights > 0.9 * total:
            prefix, siblings = f"{largest.path}.", list(largest.module.named_children())
            level = _children(largest.module, prefix, traced)
        elif len(blocks) >= 3 and n_in_blocks > 0.25 * total:
            return _in_order([node.path for node in blocks], traced)
        elif can_enter and largest.n_weights > 0.5 * total:
            prefix, siblings = f"{largest.path}.", list(largest.module.named_children())
            level = _children(largest.module, prefix, traced)
        elif opened != level:
            level = opened
        else:
            return _plain_stages(prefix, siblings, traced)
    return ()


def _children(module: nn.Module, prefix: str, traced: Trace) -> list[_Node]:
    """The children that have weights and run in the trunk, or hold some that do."""
    nodes = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        n_weights = sum(parameter.numel() for parameter in child.parameters())
        runs = path in traced.trunk or any(ran.startswith(f"{path}.") for ran in traced.trunk)
        if n_weights and runs:
            nodes.append(_Node(path, child, n_weights))
    return nodes


def _open_lists(level: list[_Node], traced: Trace) -> list[_Node]:
    """Replace each child that gives no map itself, such as a list of modules, by its children."""
    opened = []
    for node in level:
        inner = _children(node.module, f"{node.path}.", traced)
        if inner and not _is_map(node.path, traced):
            opened += inner
        else:
            opened.append(node)
    return opened


def _has_blocks(node: _Node, traced: Trace) -> bool:
    """Whether a child with weights has children with weights in turn."""
    return any(
        _children(child.module, f"{child.path}.", traced)
        for child in _children(node.module, f"{node.path}.", traced)
    )


def _is_map(path: str, traced: Trace) -> bool:
    """Whether a module gives a map or a sequence of tokens (not yet one vector an image)."""
    return path in traced.trunk and len(traced.shapes.get(path, ())) >= 2


def _in_order(paths: list[str], traced: Trace) -> tuple[str, ...]:
    order = {path: position for position, path in enumerate(traced.shapes)}
    return tuple(sorted(paths, key=order.__getitem__))


def _plain_stages(
    prefix: str, siblings: list[tuple[str, nn.Module]], traced: Trace
) -> tuple[str, ...]:
    stages: list[str] = []
    for name, module in siblings:
        path = f"{prefix}{name}"
        if not _is_map(path, traced):
            continue
        if any(parameter.ndim > 1 for parameter in module.parameters()):
            stages.append(path)
        elif stages:
            stages[-1] = path
    return tuple(stages)
