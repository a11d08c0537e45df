"""The frozen forward pass: uint8 images in, finite features in the storage dtype out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backbones.backbone import FeatureNet
from pipeline.backbones.preprocess import Preprocess
from pipeline.errors import ResourceError
from pipeline.extract.half import at_precision, input_dtype

Features = NDArray[np.floating]


class FrozenForward:
    """Runs batches of one fixed shape through a frozen network.

    The shape never changes, short batches are filled up: so a row's features do not depend on how
    many images happen to be left, and an interrupted run ends up bit-equal to an uninterrupted one.

    Args:
        net: the network and its layers.
        preprocess: normalisation, applied on the device.
        device: where it runs.
        precision: "fp32", "bf16", "fp16" or "bf16 after STAGE".
        storage: "float16" or "float32".
        batch_size: images in a batch.
    """

    def __init__(
        self,
        net: FeatureNet,
        preprocess: Preprocess,
        *,
        device: torch.device,
        precision: str,
        storage: str,
        batch_size: int,
    ) -> None:
        self.preprocess = preprocess
        self.device = device
        self.precision = precision
        self.storage = {"float16": torch.float16, "float32": torch.float32}[storage]
        self.batch_size = batch_size
        self.layers = net.layers
        # Laid out as (n, height, width, 3), which is channels-last for a network.
        self._images = torch.zeros(
            (batch_size, preprocess.height, preprocess.width, 3),
            dtype=torch.uint8,
            pin_memory=device.type == "cuda",
        ).permute(0, 3, 1, 2)
        self._full_net = net
        self._net = self._on_device(precision)

    def __call__(self, images: list[torch.Tensor]) -> tuple[dict[str, Features], dict[int, str]]:
        """Features of up to ``batch_size`` images.

        Args:
            images: (3, height, width) uint8 each.

        Returns:
            (n, ...) features by layer, and by index why an image's features cannot be stored:
            those rows must not be used.

        Raises:
            ResourceError: the device has too little memory for a batch.
        """
        n = len(images)
        for i, image in enumerate(images):
            self._images[i] = image
        self._images[n:] = 0
        batch = self._images.to(self.device, non_blocking=True)
        features = self._run(self._net, batch, n, self.precision)
        bad = _not_finite(features)
        if len(bad) and self.precision != "fp32":
            full = self._run(self._exact_net, batch, n, "fp32")
            for name, values in features.items():
                values[bad] = full[name][bad]
            bad = _not_finite(features)
        refused = {int(i): _refusal({k: v[i] for k, v in features.items()}) for i in bad}
        return features, refused

    @cached_property
    def _exact_net(self) -> FeatureNet:
        """The float32 network that batches are retried with; most runs never need it."""
        return self._on_device("fp32")

    def _on_device(self, precision: str) -> FeatureNet:
        """A copy of the network that computes in ``precision``."""
        example = self.preprocess.normalise(self._images[:1])
        return at_precision(self._full_net, precision, example).to(self.device)

    def _run(
        self, net: FeatureNet, batch: torch.Tensor, n: int, precision: str
    ) -> dict[str, Features]:
        try:
            with torch.inference_mode():
                outputs = net(self.preprocess.normalise(batch, input_dtype(precision)))
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{self.device} has too little memory for batches of {self.batch_size}.\n"
                f"  Use --batch-size {max(1, self.batch_size // 2)}."
            ) from error
        stored = [output[:n].to(self.storage).cpu().numpy() for output in outputs]
        return dict(zip(self.layers, stored, strict=True))


def _not_finite(features: Mapping[str, Features]) -> NDArray[np.intp]:
    """Indices of rows with a NaN or an infinity in any layer."""
    finite = [
        np.isfinite(values.reshape(len(values), -1)).all(axis=1) for values in features.values()
    ]
    return np.flatnonzero(~np.logical_and.reduce(finite))


def _refusal(row: Mapping[str, Features]) -> str:
    layers = [name for name, values in row.items() if not np.isfinite(values).all()]
    overflow = all(not np.isnan(values).any() for values in row.values())
    remedy = "; --dtype float32 can hold larger values" if overflow else ""
    kind = "larger than float16 holds" if overflow else "not a number"
    return f"features of layer {layers[0]} are {kind}{remedy}"
