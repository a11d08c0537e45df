"""The blocks of a network, in the order in which they run, found by running it.

No list of architectures is kept: ``Backbone.stages`` names the modules that make up the forward
pass, and one traced pass says what else runs before, between and after them. Block 0 is what runs
before the first stage; block i is the i-th stage with what runs between the stage before and it;
the last one also has all that follows. So everything after the output of a stage belongs to later
blocks, and what is frozen below can be computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

from pipeline.backbones.layers import twin


@dataclass(frozen=True)
class Blocks:
    """Which block each module of a trunk belongs to.

    Attributes:
        stages: module paths, the last module of each block but block 0 and the trailing parts.
        of_module: module path ("" for the trunk itself) -> block, 0 to ``len(stages)``.
    """

    stages: tuple[str, ...]
    of_module: dict[str, int]

    def __len__(self) -> int:
        return len(self.stages) + 1

    def of_parameter(self, name: str) -> int:
        """Block of a parameter or buffer of the trunk."""
        return self.of(name.rpartition(".")[0])

    def of(self, path: str) -> int:
        """Block of a module, also of one that was put into it later."""
        while path not in self.of_module:
            path = path.rpartition(".")[0]
        return self.of_module[path]


def find_blocks(trunk: nn.Module, stages: tuple[str, ...], height: int, width: int) -> Blocks:
    """Part a trunk into blocks.

    Args:
        trunk: (N, 3, height, width) -> features; left as it is.
        stages: module paths in it, in the order in which they run.
        height: of its input, pixels.
        width: of its input, pixels.
    """
    try:
        starts, ends = _run(twin(trunk, "meta"), height, width, "meta")
    except RuntimeError:  # also NotImplementedError: something in it needs real numbers
        starts, ends = _run(twin(trunk), height, width, "cpu")
    of_module = {"": 0}
    for name, _ in trunk.named_modules():
        inside = [i for i, stage in enumerate(stages, 1) if f"{name}.".startswith(f"{stage}.")]
        if inside:
            of_module[name] = inside[0]
        elif name in starts:
            is_before_all = all(starts[name] < starts[stage] for stage in stages)
            n_ended = sum(ends[stage] < starts[name] for stage in stages)
            of_module[name] = 0 if is_before_all else min(n_ended + 1, len(stages))
        else:  # used without being called, as attention's projections may be
            of_module[name] = of_module[name.rpartition(".")[0]]
    return Blocks(stages, of_module)


def _run(
    trunk: nn.Module, height: int, width: int, device: str
) -> tuple[dict[str, int], dict[str, int]]:
    """When each module was first entered and last left, counted in events."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    clock = count()

    def on_start(name: str, *_: Any) -> None:
        starts.setdefault(name, next(clock))

    def on_end(name: str, *_: Any) -> None:
        ends[name] = next(clock)

    for name, module in trunk.named_modules():
        module.register_forward_pre_hook(partial(on_start, name))
        module.register_forward_hook(partial(on_end, name))
    trunk.eval()
    with torch.inference_mode():
        trunk(torch.zeros(1, 3, height, width, device=device))
    return starts, ends
