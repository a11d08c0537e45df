"""The frozen forward pass: uint8 images in, finite features in the storage dtype out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backbones.backbone import FeatureNet
from pipeline.backbones.preprocess import Preprocess
from pipeline.extract.engines.eager import EagerEngine
from pipeline.extract.engines.engine import Engine, Work, enough_memory

Features = NDArray[np.floating]
Result = tuple[dict[str, Features], dict[int, str]]


def n_on_the_way(device: torch.device) -> int:
    """How many batches may be submitted before the first result is asked for.

    On a GPU one is copied there while one is computed and one comes back.
    """
    return 2 if device.type == "cuda" else 0


class FrozenForward:
    """Runs batches of one fixed shape through a frozen network.

    The shape never changes, short batches are filled up: so a row's features do not depend on how
    many images happen to be left, and an interrupted run ends up bit-equal to an uninterrupted one.

    Args:
        net: the network and its layers; float32, on the CPU.
        preprocess: its normalisation, applied on the device.
        device: where it runs.
        precision: "fp32", "bf16" or "fp16".
        storage: "float16" or "float32".
        batch_size: images in a batch.
        until: the module before which half precision does not begin; "" for none.
        engine: computes the network; None for eager.

    Attributes:
        note: what a user should know of how the batches were run; "" for nothing.
        copying_seconds: spent on making batches of images and sending them to the device.
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
        until: str = "",
        engine: Engine | None = None,
    ) -> None:
        self.storage = {"float16": torch.float16, "float32": torch.float32}[storage]
        self.layers = net.layers
        self.note = ""
        self.copying_seconds = 0.0
        self._work = Work(net, preprocess, device, precision, until, batch_size)
        self._engine: Engine = engine or EagerEngine(self._work)
        self._piece_size = batch_size
        self._slots = [_Slot(self._work) for _ in range(1 + n_on_the_way(device))]
        self._n_submitted = 0

    def __call__(self, images: list[torch.Tensor]) -> Result:
        """Features of up to ``batch_size`` images; see :meth:`submit` and :class:`Handle`."""
        return self.submit(images).result()

    def submit(self, images: list[torch.Tensor]) -> Handle:
        """Send a batch on its way: on a GPU this does not wait, elsewhere it is computed at once.

        Args:
            images: (3, height, width) uint8 each, up to ``batch_size``.

        Raises:
            ResourceError: the device has too little memory for a single image.
        """
        slot = self._slots[self._n_submitted % len(self._slots)]
        self._n_submitted += 1
        if slot.handle is not None:
            slot.handle.collect()  # its buffers are about to be used again
        with enough_memory(self._work.device, self._piece_size):
            started = time.perf_counter()
            slot.fill(images)
            batch = slot.on_device()
            self.copying_seconds += time.perf_counter() - started
            outputs = self._run(self._engine, batch)
            stored = slot.take(outputs, len(images), self.storage)
        slot.handle = Handle(self, slot, stored)
        return slot.handle

    def finite(self, features: dict[str, Features], images: torch.Tensor) -> Result:
        """Compute again in float32 what is not finite, and say what stays so.

        Args:
            features: (n, ...) by layer; changed in place.
            images: (batch_size, height, width, 3) uint8, on the CPU.
        """
        bad = _not_finite(features)
        if len(bad) and (self._work.precision != "fp32" or self._engine.name != "eager"):
            with enough_memory(self._work.device, self._piece_size):
                exact = self._run(self._exact_engine, images.to(self._work.device))
                for values, output in zip(features.values(), exact, strict=True):
                    values[bad] = output.to(self.storage).cpu().numpy()[bad]
            bad = _not_finite(features)
        refused = {int(i): _refusal({k: v[i] for k, v in features.items()}) for i in bad}
        return features, refused

    @cached_property
    def _exact_engine(self) -> EagerEngine:
        """The float32 network that batches are retried with; most runs never need it."""
        return EagerEngine(replace(self._work, precision="fp32", until=""))

    def _run(self, engine: Engine, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The engine's outputs for a batch, in smaller pieces where memory does not suffice."""
        while True:
            try:
                if self._piece_size >= len(batch):
                    return engine(batch)
                # The engine may overwrite one piece's outputs with those of the next.
                pieces = [
                    [output.clone() for output in engine(piece)]
                    for piece in torch.split(batch, self._piece_size)
                ]
                return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))
            except torch.OutOfMemoryError:
                if self._piece_size == 1:
                    raise
                self._piece_size //= 2
                self.note = (
                    f"{self._work.device} has too little memory for batches of "
                    f"{self._work.batch_size} images, which are run {self._piece_size} at a time."
                )
            # Only here has the failed attempt let go of what it held.
            if batch.device.type == "cuda":
                torch.cuda.empty_cache()


class Handle:
    """A batch on its way through the network."""

    def __init__(self, forward: FrozenForward, slot: _Slot, stored: list[torch.Tensor]) -> None:
        self._forward = forward
        self._slot: _Slot | None = slot
        self._stored = stored
        self._result: Result = ({}, {})

    def result(self) -> Result:
        """Wait for the batch.

        Returns:
            (n, ...) features by layer, and by index why an image's features cannot be stored:
            those rows must not be used.

        Raises:
            ResourceError: the device has too little memory.
        """
        self.collect()
        return self._result

    def collect(self) -> None:
        """Wait for the batch, and let its buffers go."""
        if self._slot is None:
            return
        slot, self._slot = self._slot, None
        slot.wait()
        slot.handle = None
        # A copy where the buffers are used again.
        arrays = [np.array(stored.numpy(), copy=slot.is_cuda) for stored in self._stored]
        self._stored = []
        features = dict(zip(self._forward.layers, arrays, strict=True))
        self._result = self._forward.finite(features, slot.current())


class _Slot:
    """The buffers of one batch: on a GPU pinned ones, so that copies need not be waited for.

    Attributes:
        images: (batch_size, height, width, 3) uint8, on the CPU.
        handle: of the batch that is in the buffers; None where they are free.
    """

    def __init__(self, work: Work) -> None:
        self.is_cuda = work.device.type == "cuda"
        self.images = torch.zeros(work.batch_shape, dtype=torch.uint8, pin_memory=self.is_cuda)
        self.handle: Handle | None = None
        self._device = work.device
        self._n_filled = 0
        self._there: list[tuple[int, torch.Tensor]] = []
        if self.is_cuda:
            self._on_device = torch.empty_like(self.images, device=work.device)
            self._copying = torch.cuda.Stream(work.device)  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._pinned: list[torch.Tensor] = []

    def fill(self, images: list[torch.Tensor]) -> None:
        """Put images in, and black ones behind them."""
        n = len(images)
        self._there = [(i, image) for i, image in enumerate(images) if image.is_cuda]
        for i, image in enumerate(images):
            if not image.is_cuda:
                self.images[i] = image.permute(1, 2, 0)
        self.images[n : max(n, self._n_filled)] = 0
        self._n_filled = n

    def on_device(self) -> torch.Tensor:
        """The images on the device; on a GPU they are there before anything that follows."""
        if not self.is_cuda:
            return self.images.to(self._device)
        # What used these buffers last was waited for, so the copy may overtake the network.
        with torch.cuda.stream(self._copying):
            self._on_device.copy_(self.images, non_blocking=True)
            for i, image in self._there:
                self._on_device[i].copy_(image.permute(1, 2, 0))
                image.record_stream(self._copying)  # or its memory might be used again before
        torch.cuda.current_stream(self._device).wait_stream(self._copying)
        return self._on_device

    def current(self) -> torch.Tensor:
        """(batch_size, height, width, 3) uint8: the images, wherever all of them are."""
        return self._on_device if self.is_cuda else self.images

    def take(
        self, outputs: tuple[torch.Tensor, ...], n: int, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Outputs of the first ``n`` images in ``dtype``; on a GPU only once :meth:`wait` did."""
        if not self.is_cuda:
            return [output[:n].to("cpu", dtype, copy=True) for output in outputs]
        outputs = tuple(output.to(dtype) for output in outputs)
        if not self._pinned:
            self._pinned = [
                torch.empty(output.shape, dtype=dtype, pin_memory=True) for output in outputs
            ]
        for pinned, output in zip(self._pinned, outputs, strict=True):
            pinned.copy_(output, non_blocking=True)
        self._done.record(torch.cuda.current_stream(self._device))
        return [pinned[:n] for pinned in self._pinned]

    def wait(self) -> None:
        """Wait until the features are there."""
        if self.is_cuda:
            self._done.synchronize()


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
