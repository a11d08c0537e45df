"""A map or a sequence of tokens -> one vector an image, always in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.errors import UsageError

Layout = Literal["vector", "tokens", "nchw", "nhwc"]

GEM_POWER = 3.0


@dataclass(frozen=True)
class Pool:
    """How one layer's activation is pooled.

    Attributes:
        pooling: "avg", "max", "gem", "cls" or "none".
        layout: what the axes of the activation mean.
        n_prefix: tokens before those of the patches (class, distillation and register tokens);
            left out of avg, max and gem.
    """

    pooling: str
    layout: Layout
    n_prefix: int = 0

    def __call__(self, activation: torch.Tensor) -> torch.Tensor:
        """Pool a batch of activations, in float32 whatever the network ran in.

        Args:
            activation: (N, C), (N, T, C), (N, C, H, W) or (N, H, W, C), as `layout` says.

        Returns:
            (N, C), float32; for "none" (N, C, H, W) or (N, T, C), a copy of its own, since
            the network may go on to overwrite the activation in place.
        """
        values = activation.to(torch.float32, copy=self.pooling == "none")
        if self.layout == "vector":
            return values
        if self.layout == "nhwc":
            values = values.permute(0, 3, 1, 2)
        if self.pooling == "none":
            return values.contiguous()
        if self.pooling == "cls":
            return values[:, 0].clone()
        if self.layout == "tokens":
            positions = values[:, self.n_prefix :].transpose(1, 2)
        else:
            positions = values.flatten(2)
        if self.pooling == "max":
            return positions.amax(dim=2)
        if self.pooling == "gem":
            return gem(positions)
        return positions.mean(dim=2)


def gem(positions: torch.Tensor, power: float = GEM_POWER) -> torch.Tensor:
    """Generalised mean (Radenović, Tolias and Chum, TPAMI 2019, equation 3).

    Between the mean (power 1) and the maximum (power ∞). Negative activations count as zero.

    Args:
        positions: (N, C, n_positions), float.
        power: the exponent.

    Returns:
        (N, C).
    """
    return positions.clamp(min=1e-6).pow(power).mean(dim=2).pow(1 / power)


def layout_of(shape: tuple[int, ...], *, channels_last: bool = False) -> Layout:
    """What the axes of one sample's activation mean.

    Args:
        shape: of one sample, without the batch axis; 1 to 3 axes.
        channels_last: which it is where the shape allows both.
    """
    if len(shape) == 1:
        return "vector"
    if len(shape) == 2:
        return "tokens"
    first, second, third = shape
    if first == second != third:
        return "nhwc"
    if second == third != first:
        return "nchw"
    return "nhwc" if channels_last else "nchw"


def n_prefix_tokens(n_tokens: int, declared: int) -> int:
    """How many tokens of a sequence stand before those of the patches.

    Some networks add their class token only in the last blocks, so what the network declares
    holds only where the remaining tokens can be a square grid, or nothing better is known.

    Args:
        n_tokens: length of the sequence.
        declared: prefix tokens that the network says it has.
    """
    if declared == 0 or _is_square(n_tokens - declared):
        return declared
    return 0 if _is_square(n_tokens) else declared


def check_class_token(layer: str, layout: Layout, n_prefix: int, *, has_class_token: bool) -> None:
    """Refuse pooling "cls" where there is no class token.

    Raises:
        UsageError: with the poolings that do work.
    """
    if layout == "vector" or (layout == "tokens" and n_prefix > 0 and has_class_token):
        return
    raise UsageError(
        f'Pooling "cls" takes the class token, and layer "{layer}" has none.\n'
        f"  Use --pooling avg, max, gem or none."
    )


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
