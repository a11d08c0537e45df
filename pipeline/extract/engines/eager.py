"""Torch as it is: nothing to build, and never wrong; what every other engine is compared with."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.extract.engines.engine import Work, prepared


class EagerEngine:
    """Runs the network's modules one by one.

    Args:
        work: what to compute.
    """

    name = "eager"

    def __init__(self, work: Work) -> None:
        self.details: dict[str, Any] = {"version": torch.__version__}
        self._model = prepared(work)

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Engine`; takes any number of images."""
        with torch.inference_mode():
            return self._model(images)  # type: ignore[no-any-return]
