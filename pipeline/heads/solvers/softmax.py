"""Linear softmax layers by gradient steps: every (learning rate, weight decay, layers) at once.

The linear evaluation of DINOv2 (Oquab et al., 2023, B.3): each setting is a block of columns of one
product of the mini-batch. A softmax layer is an MLP without hidden layers, see ``solvers.mlp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, product

from pipeline.errors import UsageError
from pipeline.heads.solvers.mlp import MlpSetting


def softmax_grid(
    lrs: Sequence[float],
    weight_decays: Sequence[float] = (0.0,),
    layer_sets: Sequence[Sequence[int]] = ((),),
    *,
    widths: Sequence[int] = (),
    label_smoothing: float = 0.0,
) -> list[MlpSetting]:
    """Members for ``fit_mlps``: learning rate × weight decay × layer set, the last changing first.

    Args:
        lrs: highest learning rates.
        weight_decays: decays of the weights.
        layer_sets: positions in ``widths`` of the layers that a member sees; () for all of X.
        widths: features of each layer, side by side in X; ``HeadInputs.widths``.
        label_smoothing: see :class:`MlpSetting`.

    Raises:
        UsageError: a layer that ``widths`` does not have.
    """
    columns = [layer_columns(widths, layers) for layers in layer_sets]
    return [
        MlpSetting(
            hidden=(),
            lr=lr,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            columns=seen,
        )
        for lr, weight_decay, seen in product(lrs, weight_decays, columns)
    ]


def layer_columns(widths: Sequence[int], layers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ranges of columns of some layers; neighbours become one range.

    Args:
        widths: features of each layer, side by side.
        layers: their positions, in any order.

    Raises:
        UsageError: a layer that is not there.
    """
    ends = [0, *accumulate(widths)]
    ranges: list[tuple[int, int]] = []
    for layer in sorted(set(layers)):
        if not 0 <= layer < len(widths):
            raise UsageError(f"There is no layer {layer}: X has {len(widths)}, from 0.")
        start, stop = ends[layer], ends[layer + 1]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return tuple(ranges)
